"""Preflight, fingerprint and download of a model: every failure by name, from folders built by hand."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qunlearn.errors import AdapterError, ModelError
from qunlearn.hub import download as source_module
from qunlearn.hub.download import ModelSource, fetch, go_offline, is_offline, local_snapshot, resolve_model
from qunlearn.hub.fingerprint import fingerprint, take_fingerprint
from qunlearn.hub.preflight import preflight_folder
from qunlearn.hub.side_files import companions, copy_into
from qunlearn.runs.base_model import check_run_model
from qunlearn.runs.folder import open_run
from qunlearn.training.record import base_revision

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def tensors(*names: str, seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal((4, 3)).astype(np.float32) for name in names}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model in one file: two float32 tensors of 4 x 3."""
    path = tmp_path / "model"
    path.mkdir()
    write_json(path / "config.json", {"model_type": "llama", "hidden_size": 8})
    save_file(tensors("a", "b"), path / SINGLE)
    write_json(path / "tokenizer.json", {})
    return path


@pytest.fixture
def sharded(folder: Path) -> Path:
    (folder / SINGLE).unlink()
    for shard, name in zip(SHARDS, "ab", strict=True):
        save_file(tensors(name), folder / shard)
    write_json(folder / INDEX, {"weight_map": dict(zip("ab", SHARDS, strict=True))})
    return folder


def refused(folder: Path, where: Path | None = None, **options: bool) -> ModelError:
    with pytest.raises(ModelError) as caught:
        preflight_folder(folder, **options)
    error = caught.value
    assert type(error) is ModelError and error.exit_code == 6
    assert error.where and error.hint
    if where is not None:
        assert error.where == str(where)
    return error


# --- what a good folder says ---


def test_single_file(folder: Path) -> None:
    facts = preflight_folder(folder)
    assert facts.config["hidden_size"] == 8
    assert facts.weight_files == (folder / SINGLE,)
    assert (facts.weight_bytes, facts.tensors, facts.quantization) == (2 * 4 * 3 * 4, 2, None)
    assert facts.has_tokenizer and not facts.has_chat_template


def test_shards(sharded: Path) -> None:
    facts = preflight_folder(sharded)
    assert facts.weight_files == tuple(sharded / shard for shard in SHARDS)
    assert (facts.weight_bytes, facts.tensors) == (2 * 4 * 3 * 4, 2)


def test_single_file_wins_over_an_index_as_in_transformers(sharded: Path) -> None:
    save_file(tensors("a"), sharded / SINGLE)
    assert preflight_folder(sharded).weight_files == (sharded / SINGLE,)


def test_weights_named_in_the_config(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "other.safetensors")
    write_json(folder / "config.json", {"model_type": "llama", "transformers_weights": "other.safetensors"})
    assert preflight_folder(folder).weight_files == (folder / "other.safetensors",)


def test_pickles_beside_safetensors_are_left_alone(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not opened")
    assert preflight_folder(folder).weight_files == (folder / SINGLE,)


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}, "bitsandbytes nf4"),
        ({"load_in_4bit": True}, "bitsandbytes fp4"),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes int8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq 4-bit"),
        ({"quant_method": "fp8"}, "fp8"),
        ({}, "unknown"),
    ],
)
def test_quantization(folder: Path, stored: Mapping[str, Any], said: str) -> None:
    write_json(folder / "config.json", {"model_type": "llama", "quantization_config": stored})
    assert preflight_folder(folder).quantization == said


def test_chat_template(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    assert preflight_folder(folder).has_chat_template
    write_json(folder / "tokenizer_config.json", {"chat_template": None})
    assert not preflight_folder(folder).has_chat_template
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert preflight_folder(folder).has_chat_template


# --- the folder and its config ---


def test_not_a_folder(folder: Path) -> None:
    assert "not a folder" in refused(folder / "gone", folder / "gone").message
    assert "not a folder" in refused(folder / SINGLE).message


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder, folder / "config.json").message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "no model_type"),
        (b'{"model_type": 3}', "no model_type"),
        (b'{"model_type": "llama", "quantization_config": 4}', "not an object"),
    ],
)
def test_damaged_config(folder: Path, content: bytes, said: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert said in refused(folder, folder / "config.json").message


def test_config_that_is_a_folder_cannot_be_read(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "cannot be read" in refused(folder, folder / "config.json").message


def test_an_adapter_is_not_a_model(folder: Path) -> None:
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": "gpt2"})
    assert "in one folder" in refused(folder).message
    (folder / "config.json").unlink()
    assert "--adapter" in str(refused(folder).hint)


def test_remote_code_needs_trust(folder: Path) -> None:
    write_json(folder / "config.json", {"model_type": "brandnew", "auto_map": {"AutoConfig": "x.Y"}})
    error = refused(folder, folder / "config.json")
    assert "auto_map" in error.message and "--trust-remote-code" in str(error.hint)
    assert preflight_folder(folder, trust_remote_code=True).tensors == 2


@pytest.mark.parametrize(("kind", "passes"), [("phi3", True), ("gpt_neox", True), ("../llama", False), ("a.b", False)])
def test_remote_code_that_transformers_does_not_need(folder: Path, kind: str, passes: bool) -> None:
    write_json(folder / "config.json", {"model_type": kind, "auto_map": {"AutoConfig": "x.Y"}})
    if passes:
        assert preflight_folder(folder).tensors == 2
    else:
        refused(folder)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    write_json(folder / "tokenizer_config.json", {})
    assert "tokenizer" in refused(folder, folder).message


# --- the weights ---


def test_no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    assert "no weights" in refused(folder, folder).message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "w.pt", "w.pth", "w.ckpt"])
def test_pickles_are_refused(folder: Path, name: str) -> None:
    (folder / SINGLE).unlink()
    (folder / name).write_bytes(b"\x80\x04")
    error = refused(folder, folder / name)
    assert "pickled" in error.message and "save_pretrained" in str(error.hint)


@pytest.mark.parametrize("with_config", [True, False])
def test_gguf_alone(folder: Path, with_config: bool) -> None:
    (folder / SINGLE).unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")
    if not with_config:
        (folder / "config.json").unlink()
    assert "GGUF" in refused(folder, folder).message


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert INDEX in str(refused(sharded, sharded).hint)


def pack(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(start: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


DAMAGED: dict[str, bytes] = {
    "empty file": b"",
    "a few bytes": b"\x01\x02\x03",
    "absurd header length": struct.pack("<Q", 1 << 60) + bytes(64),
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header not JSON": pack(b"{not json}", bytes(8)),
    "header not text": pack(b"\xff\xfe\xff\xff", bytes(8)),
    "header too deep": pack(b"[" * 50_000, b""),
    "header a list": pack([1], bytes(8)),
    "entry not a table": pack({"a": 3}, bytes(8)),
    "no offsets": pack({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "endless offset": pack(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}', bytes(8)),
    "negative offset": pack({"a": entry(-8, 8)}, bytes(8)),
    "overlap": pack({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "gap": pack({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "out of range": pack({"a": entry(0, 8), "b": entry(800, 808)}, bytes(16)),
    "shape and offsets disagree": pack({"a": entry(0, 8, shape=(5,))}, bytes(8)),
    "unknown dtype": pack({"a": entry(0, 8, dtype="F33")}, bytes(8)),
    "no tensors": pack({}, b""),
}


@pytest.mark.parametrize("damage", list(DAMAGED))
def test_damaged_weights(folder: Path, damage: str) -> None:
    (folder / SINGLE).write_bytes(DAMAGED[damage])
    refused(folder, folder / SINGLE)


def test_truncated_and_overlong_weights_are_told_in_bytes(folder: Path) -> None:
    whole = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(whole[:-5])
    assert refused(folder, folder / SINGLE).message == "truncated: 91 bytes of tensors, its header describes 96"
    (folder / SINGLE).write_bytes(whole + b"xyz")
    assert "longer than its header says: 99 bytes" in refused(folder, folder / SINGLE).message


def test_every_truncation_is_noticed(folder: Path) -> None:
    whole = (folder / SINGLE).read_bytes()
    for length in range(len(whole)):
        (folder / SINGLE).write_bytes(whole[:length])
        refused(folder, folder / SINGLE)


def test_git_lfs_pointer(folder: Path) -> None:
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 96\n")
    assert "git lfs pull" in str(refused(folder, folder / SINGLE).hint)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the super-user may read everything")
def test_unreadable_weights(folder: Path) -> None:
    (folder / SINGLE).chmod(0)
    assert "cannot be read" in refused(folder, folder / SINGLE).message


# --- the index and links ---


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "a"}])
def test_index_without_a_map(sharded: Path, index: Mapping[str, Any]) -> None:
    write_json(sharded / INDEX, index)
    assert "weight_map" in refused(sharded, sharded / INDEX).message


def test_index_that_is_not_json(sharded: Path) -> None:
    (sharded / INDEX).write_text("<html>")
    assert "not valid JSON" in refused(sharded, sharded / INDEX).message


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "sub/../../x.safetensors",
        "/x.safetensors",
        "C:\\x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "\\\\host\\x.safetensors",
        "x\0.safetensors",
        "",
        "..",
    ],
)
def test_index_that_leaves_the_folder(sharded: Path, name: str) -> None:
    save_file(tensors("a"), sharded.parent / "x.safetensors")
    write_json(sharded / INDEX, {"weight_map": {"a": name}})
    assert "outside the folder" in refused(sharded, sharded / INDEX).message


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", 3, ["x"], "..\\x.safetensors"])
def test_config_that_leaves_the_folder(folder: Path, name: Any) -> None:
    save_file(tensors("a"), folder.parent / "x.safetensors")
    write_json(folder / "config.json", {"model_type": "llama", "transformers_weights": name})
    assert "outside the folder" in refused(folder, folder / "config.json").message


def test_index_of_pickles(sharded: Path) -> None:
    (sharded / "w.bin").write_bytes(b"\x80\x04")
    write_json(sharded / INDEX, {"weight_map": {"a": "w.bin"}})
    assert "not safetensors" in refused(sharded, sharded / INDEX).message


def test_missing_shard(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    assert "missing" in refused(sharded, sharded / SHARDS[1]).message


def test_shard_name_too_long(sharded: Path) -> None:
    write_json(sharded / INDEX, {"weight_map": {"a": "x" * 5000 + ".safetensors"}})
    refused(sharded)


def test_shard_without_its_tensors(sharded: Path) -> None:
    write_json(sharded / INDEX, {"weight_map": {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}})
    assert "'b' first" in refused(sharded, sharded / INDEX).message


def test_shard_in_a_sub_folder_is_fine(sharded: Path) -> None:
    (sharded / "sub").mkdir()
    (sharded / SHARDS[0]).rename(sharded / "sub" / SHARDS[0])
    write_json(sharded / INDEX, {"weight_map": {"a": f"sub/{SHARDS[0]}", "b": SHARDS[1]}})
    assert preflight_folder(sharded).tensors == 2


def link(path: Path, target: Path | str) -> None:
    try:
        path.symlink_to(target)
    except OSError:  # pragma: no cover - Windows without the right to link
        pytest.skip("no links on this system")


@pytest.mark.parametrize("name", [SINGLE, SHARDS[0]])
def test_link_that_leaves_the_folder(folder: Path, sharded: Path, name: str) -> None:
    outside = sharded.parent / "x.safetensors"
    save_file(tensors("a"), outside)
    (sharded / name).unlink(missing_ok=True)
    link(sharded / name, outside)
    error = refused(sharded, sharded / name)
    assert "leaves the model folder" in error.message and str(outside.resolve()) in str(error.hint)


def test_link_to_a_folder_that_leaves(sharded: Path) -> None:
    (sharded.parent / "elsewhere").mkdir()
    save_file(tensors("a"), sharded.parent / "elsewhere" / "x.safetensors")
    link(sharded / "sub", sharded.parent / "elsewhere")
    write_json(sharded / INDEX, {"weight_map": {"a": "sub/x.safetensors"}})
    assert "leaves" in refused(sharded).message


def test_links_within_the_folder_and_to_the_folder_are_fine(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "real.safetensors")
    link(folder / SINGLE, "real.safetensors")
    link(folder.parent / "alias", folder)
    assert preflight_folder(folder.parent / "alias").tensors == 2


@pytest.mark.parametrize("target", ["gone.safetensors", SINGLE])
def test_broken_and_circular_links(folder: Path, target: str) -> None:
    (folder / SINGLE).unlink()
    link(folder / SINGLE, target)
    refused(folder, folder / SINGLE)


def hub_cache(folder: Path, cache: Path, *, shared: bool = False) -> Path:
    """The folder as the hub client stores it: snapshot files are links to blobs, which may be links too."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (cache / "blobs" / "ab").mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        if shared:
            shutil.copy(path, cache / "blobs" / "ab" / f"ab{number}")
            link(blob, f"../../blobs/ab/ab{number}")
        else:
            shutil.copy(path, blob)
        link(snapshot / path.name, f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_hub_cache_layout(sharded: Path, tmp_path: Path, shared: bool) -> None:
    snapshot = hub_cache(sharded, tmp_path / "hub", shared=shared)
    assert preflight_folder(snapshot).tensors == 2
    link(tmp_path / "alias", snapshot)
    assert preflight_folder(tmp_path / "alias").tensors == 2
    assert fingerprint(snapshot) == fingerprint(sharded)


def test_hub_cache_with_a_foreign_link(sharded: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(sharded, tmp_path / "hub")
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    save_file(tensors("a"), other / "0")
    (snapshot / SHARDS[0]).unlink()
    link(snapshot / SHARDS[0], "../../../models--org--other/blobs/0")
    assert "leaves" in refused(snapshot, snapshot / SHARDS[0]).message


# --- fingerprint ---


def test_fingerprint_is_stable_and_independent_of_the_place(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(folder) == fingerprint(tmp_path / "copy") == fingerprint(folder)
    assert len(fingerprint(folder)) == 64


def test_fingerprint_sees_config_weights_names_and_shards(folder: Path) -> None:
    seen = {fingerprint(folder)}
    save_file(tensors("a", "b", seed=1), folder / SINGLE)
    seen.add(fingerprint(folder))
    save_file(tensors("a", "c", seed=1), folder / SINGLE)
    seen.add(fingerprint(folder))
    write_json(folder / "config.json", {"model_type": "llama", "hidden_size": 9})
    seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_fingerprint_samples_both_ends_and_every_tensor(folder: Path) -> None:
    values = {name: np.zeros(100_000, np.float32) for name in "abc"}
    save_file(values, folder / SINGLE)
    before = fingerprint(folder)
    # What lies between the samples is not covered, as documented.
    for name, position, changes in (("a", 0, True), ("c", -1, True), ("b", 0, True), ("b", 50_000, False)):
        values[name][position] = 1
        save_file(values, folder / SINGLE)
        assert (fingerprint(folder) != before) is changes
        values[name][position] = 0


def test_fingerprint_tells_a_merge_from_its_base(folder: Path) -> None:
    base = tensors("embed", "layer", "norm")
    save_file(base, folder / SINGLE)
    before = fingerprint(folder)
    save_file({**base, "layer": base["layer"] + 1}, folder / SINGLE)
    assert fingerprint(folder) != before


def test_fingerprint_needs_no_tokenizer_but_sound_weights(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    fingerprint(folder)
    (folder / SINGLE).write_bytes(b"")
    with pytest.raises(ModelError):
        fingerprint(folder)


def test_fingerprint_asks_what_config_json_says_and_not_how_it_is_written(folder: Path) -> None:
    before = take_fingerprint(folder)
    write_config = (folder / "config.json").write_text
    write_config(json.dumps({"hidden_size": 8, "model_type": "llama"}, indent=2) + "\n", encoding="utf-8")
    again = take_fingerprint(folder)
    assert (again.whole, again.config, again.weights) == (before.whole, before.config, before.weights)
    assert again.by_bytes != before.by_bytes
    write_config(json.dumps({"hidden_size": 9, "model_type": "llama"}), encoding="utf-8")
    other = take_fingerprint(folder)
    assert other.weights == before.weights and other.config != before.config and other.whole != before.whole


def test_the_fingerprint_of_earlier_versions_is_still_this_models(folder: Path) -> None:
    whole, body = (folder / SINGLE).read_bytes(), 2 * 4 * 3 * 4
    header, tensor = whole[:-body], body // 2
    pieces = [f"\n{SINGLE} {len(whole)}\n".encode(), header, whole, whole, whole[-body:-tensor], whole[-tensor:]]
    known = hashlib.sha256((folder / "config.json").read_bytes() + b"".join(pieces)).hexdigest()
    found = take_fingerprint(folder)
    assert found.by_bytes == found.like(known) == known
    assert found.like("another") == found.like(None) == fingerprint(folder) != known


# --- the base of a run ---

COMMIT, LATER = "0" * 40, "1" * 40


@pytest.fixture
def of_the_hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bare-bones run on a hub model whose branch `main` has moved on: of the later commit the config is another."""
    snapshot = hub_cache(sharded, tmp_path / "hub")
    later = snapshot.with_name(LATER)
    shutil.copytree(snapshot, later, symlinks=True)
    (later / "config.json").unlink()
    write_json(later / "config.json", {"model_type": "llama", "hidden_size": 9})

    def give(name: str, *, revision: str | None, **_: Any) -> str:
        assert name == "org/name"
        return str(later if revision in (None, "main") else snapshot.with_name(revision))

    answer(monkeypatch, give)
    monkeypatch.setattr(source_module, "_unreachable", lambda source: None)
    found = take_fingerprint(snapshot)
    said = {"location": "org/name", "kind": "hub", "revision": None, "commit": COMMIT, "quantization": None}
    said |= {"fingerprint": found.whole, "config_fingerprint": found.config, "weights_fingerprint": found.weights}
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    write_json(run / "adapter" / "adapter_config.json", {"base_model_name_or_path": "org/name"})
    write_json(run / "record.json", {"model": said})
    return run


def changed(run: Path, **values: object) -> None:
    record = json.loads((run / "record.json").read_text())
    record["model"] |= values
    write_json(run / "record.json", record)


@pytest.mark.parametrize("asked", [None, "org/name"])
def test_a_run_finds_the_commit_it_was_made_on(of_the_hub: Path, asked: str | None) -> None:
    assert check_run_model(open_run(of_the_hub), asked).folder.name == COMMIT


def test_another_base_is_told_by_what_differs_and_its_revision(of_the_hub: Path) -> None:
    changed(of_the_hub, commit=LATER)
    with pytest.raises(AdapterError) as caught:
        check_run_model(open_run(of_the_hub), None)
    assert "other config.json;" in caught.value.message and LATER in caught.value.message
    assert f"hf download org/name --revision {LATER}" in str(caught.value.hint)
    changed(of_the_hub, commit=None, config_fingerprint=None, weights_fingerprint=None, fingerprint="0" * 64)
    with pytest.raises(AdapterError, match=f"other config.json and weights; this is revision {LATER}"):
        check_run_model(open_run(of_the_hub), None)


def test_a_run_of_before_knows_its_base(of_the_hub: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    changed(of_the_hub, fingerprint=take_fingerprint(snapshot).by_bytes)
    assert check_run_model(open_run(of_the_hub), None).folder == snapshot


def test_an_adapter_names_the_commit_of_its_base(of_the_hub: Path, folder: Path) -> None:
    checked = check_run_model(open_run(of_the_hub), None)
    assert base_revision(replace(checked, source=resolve_model("org/name"))) == COMMIT
    assert base_revision(replace(checked, source=resolve_model("unsloth/name-bnb-4bit", "v1"))) == "v1"
    assert base_revision(replace(checked, source=resolve_model(str(folder)))) is None


def test_a_snapshot_given_as_a_folder_has_no_revision(of_the_hub: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    changed(of_the_hub, location=str(snapshot), kind="folder")
    assert check_run_model(open_run(of_the_hub), None).folder == snapshot


# --- download ---

HUB = ModelSource("org/name", "hub", "org/name", "v1")


def answer(monkeypatch: pytest.MonkeyPatch, result: Callable[..., Any]) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", result)


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, *, offline: bool = False) -> ModelError:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    answer(monkeypatch, fail)
    with pytest.raises(ModelError) as caught:
        local_snapshot(HUB, offline=offline)
    mapped = caught.value
    assert mapped.exit_code == 6 and mapped.where == "org/name" and mapped.hint
    assert mapped.__cause__ is error and "Traceback" not in str(mapped)
    return mapped


def http_library() -> Any:
    """The HTTP library the installed hub client is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]


def http_error(name: str, status: int) -> Exception:
    """A hub error as the client makes it, with a response of this status."""
    from huggingface_hub import errors

    http = http_library()
    response = http.Response(status, request=http.Request("GET", "https://huggingface.co/api/models/org/name"))
    made: Exception = getattr(errors, name)(f"{status} Client Error.", response=response)
    return made


@pytest.mark.parametrize(
    ("name", "status", "said", "hinted"),
    [
        ("GatedRepoError", 403, "gated", "hf auth login"),
        ("GatedRepoError", 401, "gated", "https://huggingface.co/org/name"),
        ("RepositoryNotFoundError", 404, "no such repository", "qunlearn models"),
        ("RepositoryNotFoundError", 401, "no such repository", "hf auth login"),
        ("RevisionNotFoundError", 404, "no revision 'v1'", "huggingface.co/org/name"),
        ("DisabledRepoError", 403, "disabled", "another model"),
        ("HfHubHTTPError", 401, "refuses access (HTTP 401)", "hf auth login"),
        ("HfHubHTTPError", 403, "refuses access (HTTP 403)", "licence"),
        ("HfHubHTTPError", 429, "HTTP 429", "later"),
        ("HfHubHTTPError", 503, "HTTP 503", "later"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_hub_answers(
    monkeypatch: pytest.MonkeyPatch, name: str, status: int, said: str, hinted: str, wrapped: bool
) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    error = http_error(name, status)
    if wrapped:  # as the client raises it after it has looked in the cache
        outer = LocalEntryNotFoundError("not in the cache either")
        outer.__cause__ = error
        error = outer
    mapped = failing(monkeypatch, error)
    assert said in mapped.message and hinted in str(mapped.hint)


def test_offline_and_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError, OfflineModeIsEnabled

    mapped = failing(monkeypatch, LocalEntryNotFoundError("none"), offline=True)
    assert mapped.message == "offline, and not in the cache"
    assert "hf download org/name --revision v1" in str(mapped.hint)
    mapped = failing(monkeypatch, IncompleteSnapshotError("part", "/x"), offline=True)
    assert mapped.message == "offline, and not completely in the cache"
    by_environment = LocalEntryNotFoundError("none")
    by_environment.__cause__ = OfflineModeIsEnabled("set")
    for error in (by_environment, OfflineModeIsEnabled("set")):
        assert "HF_HUB_OFFLINE" in str(failing(monkeypatch, error).hint)


def test_network_down(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    http = http_library()
    raised = [http.ConnectError("no route"), http.ProxyError("refused"), http.ReadTimeout("late")]
    uncached = errors.LocalEntryNotFoundError("none")
    uncached.__cause__ = http.ConnectError("no route")
    for error in (*raised, ConnectionResetError("gone"), uncached):
        mapped = failing(monkeypatch, error)
        assert "cannot be reached" in mapped.message and "connection" in str(mapped.hint)


def test_disk_full_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("xet: No space left on device")):
        mapped = failing(monkeypatch, error)
        assert "disk is full" in mapped.message and "HF_HOME" in str(mapped.hint)
    assert "cannot be written" in failing(monkeypatch, PermissionError(errno.EACCES, "denied", "/x")).message


def test_other_failures_keep_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HFValidationError

    assert "not a hub id" in failing(monkeypatch, HFValidationError("bad")).message
    assert failing(monkeypatch, RuntimeError("odd\nlines")).message == "the download failed: RuntimeError: odd"
    with pytest.raises(KeyboardInterrupt):
        answer(monkeypatch, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        local_snapshot(HUB, offline=False)


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch, sharded: Path, tmp_path: Path) -> None:
    from huggingface_hub.utils._paths import filter_repo_objects

    asked: dict[str, Any] = {}
    snapshot = hub_cache(sharded, tmp_path / "hub")

    def give(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(snapshot)

    answer(monkeypatch, give)
    assert local_snapshot(HUB, offline=True) == snapshot
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("org/name", "v1", True)
    offered = ["config.json", SINGLE, SHARDS[0], INDEX, "tokenizer.model", "chat_template.jinja", "merges.txt"]
    refused_files = ["consolidated.safetensors", "original/consolidated.00.pth", "pytorch_model.bin", "m.gguf"]
    refused_files += ["onnx/model.onnx", "fp16/model.safetensors", "modeling_x.py", "flax_model.msgpack"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(offered + refused_files, **patterns)) == offered
    local_snapshot(HUB, offline=False, trust_remote_code=True)
    assert "*.py" in asked["allow_patterns"] and asked["local_files_only"] is False


def test_repository_without_safetensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answer(monkeypatch, lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelError) as caught:
        local_snapshot(HUB, offline=False)
    assert caught.value.where == "org/name" and "--revision refs/pr/" in str(caught.value.hint)


def test_the_real_client_finds_its_own_cache(monkeypatch: pytest.MonkeyPatch, sharded: Path, tmp_path: Path) -> None:
    from huggingface_hub import constants

    snapshot = hub_cache(sharded, tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = resolve_model("org/name", "0" * 40)
    assert local_snapshot(commit, offline=True) == snapshot
    with pytest.raises(ModelError, match="not in the cache"):
        local_snapshot(resolve_model("org/other"), offline=True)


class Unreachable:
    """A hub client's interface to a hub that is away, or that answers; it counts its questions."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.limits = error, list[float]()

    def __call__(self) -> Unreachable:
        return self

    def model_info(self, name: str, *, revision: str, timeout: float) -> None:
        assert (name, revision) == ("org/name", "0" * 40)
        self.limits.append(timeout)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("kind", ["down", "up", "refusal"])
def test_a_commit_is_asked_for_once_and_then_looked_up(
    monkeypatch: pytest.MonkeyPatch, sharded: Path, tmp_path: Path, kind: str
) -> None:
    import huggingface_hub

    errors = {"down": http_library().ConnectError("no route"), "up": None, "refusal": http_error("HfHubHTTPError", 503)}
    hub, asked = Unreachable(errors[kind]), []
    snapshot = hub_cache(sharded, tmp_path / "hub")

    def give(*_: Any, local_files_only: bool, **__: Any) -> str:
        asked.append(local_files_only)
        return str(snapshot)

    answer(monkeypatch, give)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    assert local_snapshot(resolve_model("org/name", "0" * 40), offline=False) == snapshot
    assert asked == [kind == "down"] and len(hub.limits) == 1 and hub.limits[0] <= 10
    local_snapshot(resolve_model("org/name", "0" * 40), offline=True)
    assert len(hub.limits) == 1 and asked[1:] == [True]


def test_an_unreachable_hub_is_told_in_seconds_and_once(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from qunlearn.hub.download import ModelSource, fetch\n"
        "for revision in (None, '0' * 40):\n"
        "    try: fetch(ModelSource('o/n', 'hub', 'o/n', revision), ['config.json'], offline=False)\n"
        "    except Exception as error: print(error.message)\n"
    )
    # Nothing listens on this port; a name that is not resolved takes the same path.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code]
    root = Path(source_module.__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True, timeout=15)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("no folder of this name is here, the hub cannot be reached" in s for s in lines)
    assert done.stderr == ""


def test_weights_that_are_not_in_the_cache_are_not_said_to_be_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`plan` fetches config.json alone."""
    write_json(tmp_path / "config.json", {})
    answer(monkeypatch, lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelError, match="offline, and its weights are not in the cache"):
        local_snapshot(ModelSource("o/n", "hub", "o/n", None), offline=True)
    with pytest.raises(ModelError, match="no safetensors weights"):
        local_snapshot(ModelSource("o/n", "hub", "o/n", None), offline=False)


def test_named_chat_templates_belong_to_a_model(tmp_path: Path) -> None:
    folder, out = tmp_path / "m", tmp_path / "out"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    found = companions(folder)
    assert sorted(found) == ["additional_chat_templates/tool_use.jinja", "chat_template.jinja"]
    out.mkdir()
    copy_into(out, found)
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"


def test_local_sources_never_ask_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise AssertionError("the hub was asked")

    answer(monkeypatch, fail)
    assert local_snapshot(resolve_model(str(folder)), offline=False) == folder.resolve()
    sandbox = resolve_model("sandbox")
    assert local_snapshot(sandbox, offline=False) == Path(sandbox.location)


# --- the process ---


def run(code: str) -> str:
    root = Path(source_module.__file__).parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def test_nothing_heavy_is_imported(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from qunlearn.hub.download import resolve_model;"
        "from qunlearn.hub.fingerprint import fingerprint; from qunlearn.hub.preflight import preflight_folder;"
        f"preflight_folder(Path({str(folder)!r})); fingerprint(Path({str(folder)!r})); resolve_model('gpt2');"
        "heavy = 'torch', 'transformers', 'peft', 'bitsandbytes', 'huggingface_hub';"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run(code) == "[]"


@pytest.mark.parametrize(("said", "asks"), [("", True), ("1", False), ("ON", False)])
def test_a_second_model_that_is_named_is_fetched_too(monkeypatch: pytest.MonkeyPatch, said: str, *, asks: bool) -> None:
    """The network is closed behind the first, and open while the next is fetched; unless the user closed it."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", said)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", bool(said))
    seen = []

    def download(*_: Any, local_files_only: bool, **__: Any) -> str:
        seen.append((constants.is_offline_mode(), local_files_only))
        return "."

    answer(monkeypatch, download)
    go_offline()
    assert is_offline() is not asks
    fetch(ModelSource("o/n", "hub", "o/n", None), ["*.json"], offline=is_offline())
    assert seen == [(not asks, not asks)]
    assert constants.is_offline_mode() and is_offline() is not asks


@pytest.mark.parametrize("first", ["", "import huggingface_hub.constants;"])
def test_go_offline_also_after_the_client_was_imported(first: str) -> None:
    code = (
        "import os; [os.environ.pop(n, None) for n in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE')];"
        f"{first} from qunlearn.hub.download import go_offline; go_offline();"
        "from huggingface_hub import constants;"
        "print(constants.is_offline_mode(), constants.HF_HUB_DISABLE_TELEMETRY);"
        "print(os.environ['HF_HUB_OFFLINE'], os.environ['TRANSFORMERS_OFFLINE'])"
    )
    assert run(code) == "True True\n1 1"
