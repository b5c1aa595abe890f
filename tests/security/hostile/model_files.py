"""Model folders and adapters that must be refused: (name, what is done to a sound folder)."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Case = tuple[str, Callable[[Path], None]]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def broken_safetensors() -> Iterator[tuple[str, bytes]]:
    """Whole files."""
    d16, a = bytes(16), "model.embed_tokens.weight"
    yield "empty", b""
    yield "seven-bytes", bytes(7)
    yield "length-only", struct.pack("<Q", 2)
    yield "length-zero", bytes(8)
    yield "length-huge", safetensors({a: tensor()}, d16, (1 << 64) - 1)
    yield "length-signed", safetensors({a: tensor()}, d16, 1 << 63)
    yield "length-beyond-the-file", safetensors({a: tensor()}, d16, 10_000)
    yield "length-short", safetensors({a: tensor()}, d16, 10)
    yield "header-not-json", safetensors(b"{oops}", d16)
    yield "header-not-utf-8", safetensors(b'{"\xff\xfe": 1}', d16)
    yield "header-list", safetensors([1, 2], d16)
    yield "header-number", safetensors(b"7", d16)
    yield "header-null", safetensors(b"null", d16)
    yield "header-text", safetensors(b'"a"', d16)
    yield "header-deep", safetensors(b'{"a":' * 20_000 + b"1" + b"}" * 20_000, d16)
    yield "header-white", safetensors(b" " * 100, d16)
    yield "header-empty", safetensors({}, b"")
    yield "header-duplicates", safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2), d16)
    yield "only-metadata", safetensors({"__metadata__": {"format": "pt"}})
    yield "metadata-not-texts", safetensors({"__metadata__": {"format": 3}, a: tensor()}, d16)
    yield "entry-number", safetensors({a: 3}, d16)
    yield "entry-empty", safetensors({a: {}}, d16)
    for name, changed in (
        ("dtype-unknown", tensor(dtype="F33")),
        ("dtype-number", tensor(dtype=32)),
        ("dtype-null", tensor(dtype=None)),
        ("dtype-list", tensor(dtype=["F32"])),
        ("dtype-wider", tensor(dtype="F64")),
        ("dtype-narrower", tensor(dtype="F16")),
        ("shape-larger", tensor(shape=(2, 3))),
        ("shape-smaller", tensor(shape=(1, 2))),
        ("shape-negative", tensor(shape=(-2, -2))),
        ("shape-overflow", tensor(shape=(1 << 32, 1 << 32))),
        ("shape-overflow-to-four", tensor(shape=(1 << 62, 4, 4))),
        ("shape-text", tensor(shape="22")),
        ("shape-floats", tensor(shape=(2.0, 2.5))),
        ("shape-null", tensor(shape=None)),
        ("shape-deep", tensor(shape=[[2, 2]])),
        ("offsets-swapped", tensor(offsets=(16, 0))),
        ("offsets-negative", tensor(offsets=(-16, 0))),
        ("offsets-beyond", tensor(offsets=(0, 1 << 40))),
        ("offsets-overflow", tensor(offsets=((1 << 64) - 16, 1 << 64))),
        ("offsets-late", tensor(offsets=(8, 24))),
        ("offsets-one", tensor(offsets=(0,))),
        ("offsets-three", tensor(offsets=(0, 8, 16))),
        ("offsets-texts", tensor(offsets=("0", "x"))),
        ("offsets-null", tensor(offsets=None)),
        ("offsets-nan", tensor(offsets=(0, float("nan")))),
    ):
        yield name, safetensors({a: changed}, d16)
    yield "overlapping", safetensors({a: tensor(), "b": tensor(offsets=(8, 24))}, bytes(24))
    yield "same-place", safetensors({a: tensor(), "b": tensor()}, d16)
    yield "gap", safetensors({a: tensor(), "b": tensor(offsets=(20, 36))}, bytes(36))
    yield "bytes-after", safetensors({a: tensor()}, bytes(20))
    yield "bytes-missing", safetensors({a: tensor()}, bytes(10))
    yield "pickle", b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    yield "zip", b"PK\x03\x04" + bytes(200)
    yield "lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


def _write(name: str, content: bytes | object) -> Callable[[Path], None]:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()

    def do(folder: Path) -> None:
        (folder / name).write_bytes(raw)

    return do


def _config(**changes: Any) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return do


def _index(weight_map: object) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "shard.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return do


def _link(name: str, target: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return do


def _only(name: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / name)

    return do


_NAMES = (
    *("../shard.safetensors", "/etc/passwd", "/tmp/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors"),
    *("C:\\x.safetensors", "\\\\host\\share\\x.safetensors", "", ".", "..", "x.bin", "x.safetensors\0", "x" * 5000),
    *("file:///x.safetensors", "missing.safetensors", "~/x.safetensors", "x" * 5000 + ".safetensors"),
)


def model_cases() -> Iterator[Case]:
    for name, raw in broken_safetensors():
        yield f"weights-{name}", _write(WEIGHTS, raw)
    tensor_name = "model.embed_tokens.weight"
    for i, name in enumerate(_NAMES):
        yield f"index-name-{i}", _index({tensor_name: name})
    for kind, value in (("number", 3), ("null", None), ("list", ["shard.safetensors"]), ("object", {"a": "b"})):
        yield f"index-name-{kind}", _index({tensor_name: value})
    for kind, value in (("empty", {}), ("list", []), ("text", "a"), ("null", None)):
        yield f"index-map-{kind}", _index(value)
    yield "index-lacks-the-tensor", _index({"not.there": "shard.safetensors"})
    yield "link-out", _link(WEIGHTS, "/etc/passwd")
    yield "link-up", _link(WEIGHTS, "../outside.safetensors")
    yield "link-loop", _link(WEIGHTS, WEIGHTS)
    yield "link-device", _link(WEIGHTS, "/dev/zero")
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "pytorch_model-00001-of-00002.bin"):
        yield f"pickle-{name}", _only(name)
    for name, value in (
        ("remote-code", {"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}),
        ("remote-repo", {"model_type": "strange", "auto_map": {"AutoModelForCausalLM": "who/evil--evil.Model"}}),
        ("model-type-number", {"model_type": 3}),
        ("model-type-none", {"model_type": None}),
        ("layers-absurd", {"num_hidden_layers": 10**9}),
        ("layers-float", {"num_hidden_layers": 1e30}),
        ("weights-elsewhere", {"transformers_weights": "../x.safetensors"}),
        ("weights-number", {"transformers_weights": 3}),
        ("quantization-text", {"quantization_config": "nf4"}),
        ("quantization-list", {"quantization_config": [1]}),
    ):
        yield f"config-{name}", _config(**value)
    for name, raw in (
        ("empty", b""),
        ("list", b"[]"),
        ("deep", b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        ("nul", bytes(100)),
        ("latin", b'{"model_type": "\xe9"}'),
        ("utf-16", '{"model_type": "llama"}'.encode("utf-16")),
        ("long-number", b'{"model_type": ' + b"9" * 5000 + b"}"),
    ):
        yield f"config-{name}", _write("config.json", raw)
    yield "adapter-inside", _write(ADAPTER_CONFIG, {"peft_type": "LORA"})


def _adapter(**changes: Any) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / ADAPTER_CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return do


def adapter_cases() -> Iterator[Case]:
    for name, raw in broken_safetensors():
        yield f"weights-{name}", _write(ADAPTER_WEIGHTS, raw)
    for name, raw in (
        ("empty", b""),
        ("list", b"[]"),
        ("deep", b"[" * 100_000),
        ("nul", bytes(50)),
        ("no-type", b"{}"),
        ("latin", b'{"peft_type": "\xe9"}'),
    ):
        yield f"config-{name}", _write(ADAPTER_CONFIG, raw)
    for name, changes in (
        ("type-unknown", {"peft_type": "EVIL"}),
        ("type-number", {"peft_type": 3}),
        ("type-list", {"peft_type": ["LORA"]}),
        ("rank-huge", {"r": 10**9}),
        ("rank-larger", {"r": 64}),
        ("rank-zero", {"r": 0}),
        ("rank-negative", {"r": -4}),
        ("rank-text", {"r": "4"}),
        ("rank-float", {"r": 4.5}),
        ("rank-null", {"r": None}),
        ("rank-pattern-huge", {"rank_pattern": {"q_proj": 10**12}}),
        ("rank-pattern-list", {"rank_pattern": [4]}),
        ("rank-pattern-evil", {"rank_pattern": {"(a+)+$": 4}}),
        ("alpha-pattern-evil", {"alpha_pattern": {"(.*)*x": 4}}),
        ("targets-evil", {"target_modules": "(a|a)*b"}),
        ("targets-long", {"target_modules": "a" * 100_000}),
        ("targets-numbers", {"target_modules": [1, 2]}),
        ("code", {"auto_mapping": {"base_model_class": "X", "parent_library": "evil_marker"}}),
        ("code-megatron", {"megatron_config": {"a": 1}, "megatron_core": "evil_marker"}),
        ("layers-again", {"layer_replication": [[0, 10**6]]}),
        ("base-number", {"base_model_name_or_path": 3}),
        ("base-list", {"base_model_name_or_path": ["x"]}),
    ):
        yield f"config-{name}", _adapter(**changes)


def record_cases() -> Iterator[tuple[str, bytes]]:
    """record.json of a run."""
    yield "empty", b""
    yield "list", b"[]"
    yield "deep", b"[" * 100_000
    yield "nul", bytes(9)
    yield "long-number", b'{"a": ' + b"9" * 5000 + b"}"
    for key in ("model", "data", "training", "before"):
        for kind, value in (("list", [1]), ("text", "x"), ("number", 3)):
            yield f"{key}-{kind}", json.dumps({key: value}).encode()
    for path in ("model.location", "model.revision", "data.bad.path", "data.bad", "data.normal", "data.template"):
        value: object = 7
        for key in reversed(path.split(".")):
            value = {key: value}
        yield path, json.dumps(value).encode()
    yield "template-strange", json.dumps({"data": {"template": {"kind": "x"}}}).encode()
