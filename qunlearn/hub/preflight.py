"""Check a model folder before anything of it is loaded: its JSON files and its weight files' headers.

Nothing here imports torch or transformers, and a check reads headers only: a wrong model is refused at once.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from qunlearn.errors import ModelError
from qunlearn.hub.safetensors_file import MAX_HEADER_BYTES
from qunlearn.hub.small_files import MAX_INDEX_BYTES, refuse_strange_files
from qunlearn.utils.json_files import CLOSED, SMALL_BYTES, read_object

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "model*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
DOWNLOAD_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class FolderFacts:
    """What the files of a model folder say. `weight_bytes` counts tensor data, without the files' headers."""

    config: Mapping[str, Any]
    weight_files: tuple[Path, ...]
    weight_bytes: int
    quantization: str | None
    tensors: int
    has_tokenizer: bool
    has_chat_template: bool


def preflight_folder(folder: Path, *, trust_remote_code: bool = False) -> FolderFacts:
    """Check a model folder before anything is loaded, from its JSON files and its weight files' headers.

    A model that needs Python code of its own is refused unless that is trusted; where transformers has the
    architecture itself such code is never run, and the folder passes. Raises ModelError.
    """
    config = read_config(folder)
    refuse_strange_files(folder)
    if not trust_remote_code:
        _refuse_remote_code(folder, config)
    headers = dict(headers_of_weights(folder, config))
    _refuse_absurd(config, sum(len(header.names) for header in headers.values()), folder)
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZERS):
        hint = "copy tokenizer.json (or the vocabulary) and tokenizer_config.json of the same model beside it"
        raise ModelError("no tokenizer files", where=str(folder), hint=hint)
    return FolderFacts(
        config=config,
        weight_files=tuple(headers),
        weight_bytes=sum(header.data_bytes for header in headers.values()),
        quantization=_quantization(folder, config),
        tensors=sum(len(header.names) for header in headers.values()),
        has_tokenizer=True,
        has_chat_template=_has_chat_template(folder),
    )


@dataclass(frozen=True)
class _Header:
    names: frozenset[str]
    spans: tuple[tuple[int, int], ...]  # where each tensor is in the data, in order
    data_bytes: int


def read_json(path: Path, most_bytes: int = SMALL_BYTES) -> dict[str, Any]:
    """A JSON object of a model. Raises ModelError."""
    return read_object(path, ModelError, hint=DOWNLOAD_AGAIN, most_bytes=most_bytes)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError("not a folder", where=str(folder), hint="give the folder that holds config.json")
    if (folder / "adapter_config.json").exists():
        if not path.exists():
            hint = "give its base as --model; `qunlearn eval BASE --adapter FOLDER` measures the two together"
            raise ModelError("an adapter, not a whole model", where=str(folder), hint=hint)
        # transformers would put the adapter on the base unasked, and the reference would not be the base.
        hint = (
            "move adapter_config.json and the adapter's weights to another folder, for `qunlearn eval BASE --adapter`"
        )
        raise ModelError("a model and an adapter in one folder", where=str(folder), hint=hint)
    if not path.exists():
        if any(folder.glob("*.gguf")):
            raise _no_weights(folder)
        hint = "give the folder that save_pretrained wrote, or a hub snapshot"
        raise ModelError("no config.json in the folder", where=str(path), hint=hint)
    config = read_json(path)
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        hint = "this is not the configuration of a transformers model"
        raise ModelError("no model_type", where=str(path), hint=hint)
    return config


def _refuse_remote_code(folder: Path, config: Mapping[str, Any]) -> None:
    if not config.get("auto_map") or _is_native(config["model_type"]):
        return
    hint = "read the .py files of the repository, then pass --trust-remote-code; or choose another model"
    message = "the model brings Python code of its own (auto_map), which is not run unless you trust it"
    raise ModelError(message, where=str(folder / "config.json"), hint=hint)


def _refuse_absurd(config: Mapping[str, Any], tensors: int, folder: Path) -> None:
    """More layers than there are tensors would be built one by one before anyone noticed. Raises ModelError."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            layers = part.get(key)
            if isinstance(layers, (int, float)) and layers > tensors:
                message = f"{key} is {str(layers)[:40]}, and the weights have {tensors} tensors"
                raise ModelError(message, where=str(folder / "config.json"), hint=DOWNLOAD_AGAIN)


def _is_native(model_type: str) -> bool:
    """Return whether transformers has this architecture, told from its files since importing it takes seconds."""
    spec = importlib.util.find_spec("transformers")
    module = model_type.replace("-", "_")
    if spec is None or spec.origin is None or not module.isidentifier():
        return False
    return (Path(spec.origin).parent / "models" / module / "__init__.py").is_file()


def headers_of_weights(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[Path, _Header]]:
    """The weight files transformers would load, each checked, in the order of their names."""
    named = config.get("transformers_weights")
    if named is None:
        present = [n for n in (_SINGLE, _INDEX) if (folder / n).is_file() or (folder / n).is_symlink()]
        if not present:
            raise _no_weights(folder)
        named = present[0]
    entry = _inside(folder, named, folder / "config.json", (".safetensors", ".safetensors.index.json"))
    if entry.suffix == ".safetensors":
        yield entry, _read_header(entry)
        return
    weight_map = read_json(entry, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("no weight_map in the index", where=str(entry), hint=DOWNLOAD_AGAIN)
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        shards.setdefault(str(shard), set()).add(tensor)
    for shard, tensors in sorted(shards.items()):
        path = _inside(folder, shard, entry, (".safetensors",))
        header = _read_header(path)
        missing = sorted(tensors - header.names)
        if missing:
            message = f"{shard} lacks {len(missing)} tensors the index places there, {missing[0]!r} first"
            hint = "the index and the shards are of different models; download both again"
            raise ModelError(message, where=str(entry), hint=hint)
        yield path, header


def _no_weights(folder: Path) -> ModelError:
    where = str(folder)
    if any(folder.glob("*.safetensors")):
        found = min(path.name for path in folder.glob("*.safetensors"))
        hint = f"{found} is there: rename it if it is the whole model, or bring {_INDEX} for its shards"
        return ModelError(f"neither {_SINGLE} nor {_INDEX}", where=where, hint=hint)
    pickle = next((path for pattern in _PICKLES for path in sorted(folder.glob(pattern))), None)
    if pickle is not None:
        hint = (
            "convert it where you trust its source: AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(NEW, safe_serialization=True), and the tokenizer likewise"
        )
        message = "only pickled weights, which can run code when they are opened"
        return ModelError(message, where=str(pickle), hint=hint)
    if any(folder.glob("*.gguf")):
        hint = "GGUF is for inference; give the original model's folder or hub id"
        return ModelError("only GGUF weights", where=where, hint=hint)
    return ModelError("no weights in the folder", where=where, hint=f"{_SINGLE}, or shards with {_INDEX}")


def _inside(folder: Path, name: object, named_in: Path, suffixes: tuple[str, ...]) -> Path:
    """The file `name` of the folder; one that is elsewhere, by its name or through a link, is refused."""
    where, hint = str(named_in), "do not use this copy unless you know why; download the model again"
    # Windows rules know both slashes and drives, so they refuse whatever is absolute on either system.
    pure = PureWindowsPath(name if isinstance(name, str) else "")
    if not isinstance(name, str) or "\0" in name or pure.anchor or ".." in pure.parts or not pure.parts:
        raise ModelError(f"names a weight file outside the folder: {str(name)[:120]!r}", where=where, hint=hint)
    if not name.endswith(suffixes):
        raise ModelError(f"names weights that are not safetensors: {str(name)[:120]!r}", where=where, hint=hint)
    path = within(folder, folder / name)
    if not path.is_file():
        what = "a link to nothing" if path.is_symlink() else f"missing, but named in {named_in.name}"
        raise ModelError(what, where=str(path), hint=DOWNLOAD_AGAIN)
    return path


def commit_of(folder: Path) -> str | None:
    """Return the hub's commit of a snapshot in its cache: a branch moves on, and a run belongs to what it was."""
    real = folder.absolute()
    return real.name if real.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", real.name) else None


def within(folder: Path, path: Path) -> Path:
    """The same path, unless a link in it leads out of the model. Raises ModelError."""
    try:
        target = path.resolve()
        path.is_file()
    except (OSError, RuntimeError) as error:  # a loop of links, or a name too long
        message = f"cannot be read: {str(getattr(error, 'strerror', None) or error)[:200]}"
        raise ModelError(message, where=str(path)[:400], hint=DOWNLOAD_AGAIN) from error
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        hint = f"it is {target}: copy it here, or give the folder it is in"
        raise ModelError("a link that leaves the model folder", where=str(path), hint=hint)
    return path


def _roots(folder: Path) -> list[Path]:
    """Return where a folder's files may really be: in it, or for a hub cache's snapshot in the cache's blobs."""
    real = folder.resolve()
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [repository, repository.parent / "blobs"]  # newer caches share blobs among repositories
    return [real]


def _read_header(path: Path) -> _Header:
    """Names and data size of a safetensors file whose header, offsets and length agree."""
    from safetensors import SafetensorError, safe_open

    where = str(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                hint = "run `git lfs pull` in the folder"
                raise ModelError("a Git LFS pointer, not the weights", where=where, hint=hint)
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                message = f"truncated or not safetensors: a header of {length} bytes in a file of {size}"
                raise ModelError(message, where=where, hint=DOWNLOAD_AGAIN)
            spans = _spans(path, file.read(length), size - 8 - length)
        with safe_open(path, framework="numpy") as tensors:  # checks types, shapes, gaps and overlaps
            names = frozenset(tensors.keys())
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise ModelError(message, where=where, hint=CLOSED) from error
    except SafetensorError as error:
        raise ModelError(f"damaged: {error}", where=where, hint=DOWNLOAD_AGAIN) from error
    if not names:
        raise ModelError("holds no tensors", where=where, hint=DOWNLOAD_AGAIN)
    return _Header(names, spans, size - 8 - length)


def _spans(path: Path, header: bytes, data_bytes: int) -> tuple[tuple[int, int], ...]:
    """Return where each tensor starts and ends, after the file's length was compared with it, in numbers."""
    try:
        offsets = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        spans = tuple(sorted((int(start), int(end)) for start, end in offsets))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError) as error:
        message = f"damaged: its header is not a table of tensors ({type(error).__name__})"
        raise ModelError(message, where=str(path), hint=DOWNLOAD_AGAIN) from error
    expected = max((end for _, end in spans), default=0)
    if expected != data_bytes:
        what = "truncated" if data_bytes < expected else "longer than its header says"
        message = f"{what}: {data_bytes} bytes of tensors, its header describes {expected}"
        raise ModelError(message, where=str(path), hint=DOWNLOAD_AGAIN)
    return spans


def _quantization(folder: Path, config: Mapping[str, Any]) -> str | None:
    stored = config.get("quantization_config")
    if stored is None:
        return None
    if not isinstance(stored, dict):
        where = str(folder / "config.json")
        raise ModelError("quantization_config is not an object", where=where, hint=DOWNLOAD_AGAIN)
    four, eight = stored.get("load_in_4bit"), stored.get("load_in_8bit")
    method = str(stored.get("quant_method") or ("bitsandbytes" if four or eight else "unknown"))
    if four:
        return f"{method} {stored.get('bnb_4bit_quant_type', 'fp4')}"
    if eight:
        return f"{method} int8"
    return f"{method} {stored['bits']}-bit" if "bits" in stored else method


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))
