"""The run folder: what is in it, how its files are written, and how later commands read them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn import jsonfile
from qunlearn.errors import AdapterError, OutputError, QunlearnError

ADAPTER, CONFIG, RECORD, METRICS, NORMAL = (
    "adapter",
    "config.yaml",
    "record.json",
    "metrics.jsonl",
    "normal.jsonl",
)
EVAL, EVAL_CACHE, REPORT = "eval.json", "eval-cache", "report.html"  # what later commands add


FINISHED = ("done", "failed", "target not reached")


@contextlib.contextmanager
def named_write_errors(folder: Path) -> Iterator[None]:
    """Turn what a failed write raises into an OutputError."""
    try:
        yield
    except OSError as error:
        raise output_error(error, folder) from error
    except Exception as error:
        # safetensors reports a full disk as an error of its own, with the system's words in it.
        if type(error).__name__ == "SafetensorError" and "os error" in str(error).lower():
            raise OutputError(str(error)[:200], where=str(folder), hint="free space and try again") from error
        raise


def output_error(error: OSError, folder: Path) -> OutputError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "free space and try again" if full else "check the path and its permissions"
    message = "the disk is full" if full else f"cannot be written: {error.strerror or error}"
    return OutputError(message, where=str(error.filename or folder), hint=hint)


def write_private(path: Path, text: str) -> None:
    """Write a text only its owner can read: runs are made from sensitive data.

    What is not Unicode (the bytes of a file name) is escaped, in the way that JSON reads back as the same name.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def write_whole(path: Path, text: str) -> None:
    """Write a private file whole or not at all; a link of this name is replaced, not followed. Raises OSError."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_private(path, json_text(value))


def json_text(value: Mapping[str, Any]) -> str:
    """Return a value as our JSON files have it."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


@dataclass(frozen=True)
class Run:
    """A finished run, or a bare adapter folder (then `record` is empty)."""

    adapter: Path
    record: Mapping[str, Any]
    adapter_config: Mapping[str, Any]

    @property
    def base(self) -> str:
        """What the run's base was called: a folder or a hub id."""
        base = self.record.get("model", {}).get("location") or self.adapter_config.get("base_model_name_or_path")
        return str(base or "")


def open_run(folder: Path) -> Run:
    """Read a run folder or an adapter folder. Raises AdapterError."""
    try:
        adapter = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
        config_path = adapter / "adapter_config.json"
        there = config_path.is_file()
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise AdapterError(message, where=str(folder)[:400], hint="check its permissions") from error
    if not there:
        what = "no adapter in the folder" if folder.is_dir() else "no such folder"
        raise AdapterError(what, where=str(folder), hint="give the folder that `qunlearn forget` wrote")
    record_path = folder / RECORD
    record = read_object(record_path) if record_path.is_file() else {}
    _check_record(record, record_path)
    return Run(adapter, record, read_object(config_path))


def status_of_run(folder: Path) -> object:
    """Return what the record of a run folder says of its end; None where there is no record that can be read."""
    path = folder / RECORD
    try:
        return read_object(path).get("status") if path.is_file() else None
    except (QunlearnError, OSError):
        return None


_ABSENT = object()
_RECORD_OBJECTS = ("model", "data", "training", "data.bad", "data.normal", "data.template", "before")
_RECORD_FILES = ("data.bad.path", "data.bad.sha256", "data.normal.path", "data.normal.sha256")
_TEMPLATE = {"name", "kind", "text", "why"}
_RECORD_TEXTS = (
    "model.location",
    "model.revision",
    "model.commit",
    "model.asked",
    "model.fingerprint",
    "model.config_fingerprint",
    "model.weights_fingerprint",
    "model.quantization",
)


def _check_record(record: Mapping[str, Any], path: Path) -> None:
    """What later commands rely on. Raises AdapterError for a record that was edited into something else."""
    places = [*((name, dict) for name in _RECORD_OBJECTS), *((name, str) for name in (*_RECORD_TEXTS, *_RECORD_FILES))]
    for name, kind in places:
        value: Any = record
        for key in name.split("."):
            value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
        # A text that is not known is null; an object that is not there is left out.
        if value is not _ABSENT and not isinstance(value, kind) and not (kind is str and value is None):
            raise AdapterError(f"{name} is not {'an object' if kind is dict else 'a text'}", where=str(path))
    template = record.get("data", {}).get("template")
    if template and (template.keys() != _TEMPLATE or not all(isinstance(v, str) for v in template.values())):
        raise AdapterError("data.template is not a template", where=str(path), hint="was it edited?")


def read_object(path: Path, hint: str = jsonfile.EDITED) -> dict[str, Any]:
    """A JSON object of a run or an adapter. Raises AdapterError."""
    return jsonfile.read_object(path, AdapterError, hint=hint)
