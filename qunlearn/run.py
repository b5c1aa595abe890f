"""The run folder: refused, staged, filled and put in place whole; and read again by later commands."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn import jsonfile
from qunlearn.errors import AdapterError, OutputError

ADAPTER, CONFIG, RECORD, METRICS, NORMAL = (
    "adapter",
    "config.yaml",
    "record.json",
    "metrics.jsonl",
    "normal.jsonl",
)
EVAL, EVAL_CACHE, REPORT = "eval.json", "eval-cache", "report.html"  # what later commands add
_OURS = {ADAPTER, CONFIG, RECORD, METRICS, NORMAL, EVAL, EVAL_CACHE, REPORT}
_NEEDED_BYTES = 64 << 20


def default_folder(model: str, bad: str) -> Path:
    """runs/MODEL-BAD, in letters that every file system takes."""

    def plain(text: str) -> str:
        return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "x"

    stem = Path(bad).name.split(".")[0]
    return Path("runs") / f"{plain(Path(model).name)}-{plain(stem)}"


def check_output(folder: Path, *, overwrite: bool, needed_bytes: int = _NEEDED_BYTES) -> None:
    """Refuse, before any work, an output that cannot be written or would lose something. Raises OutputError."""
    where = str(folder)
    if folder.exists() or folder.is_symlink():
        if not folder.is_dir():
            raise OutputError("exists and is not a folder", where=where, hint="choose another --output")
        content = {path.name for path in folder.iterdir()}
        if content and not overwrite:
            hint = "choose another --output, or --overwrite to replace it"
            raise OutputError("the folder is not empty", where=where, hint=hint)
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError("cannot be written", where=str(parent), hint="check its permissions")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        message = f"{needed_bytes / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free"
        raise OutputError(f"the disk is full: {message}", where=str(parent), hint="free space")


def check_replaceable(folder: Path) -> None:
    """--overwrite replaces what a run left, nothing else. Raises OutputError."""
    strange = sorted(p.name for p in folder.iterdir() if p.name not in _OURS) if folder.is_dir() else []
    if strange:
        hint = "move it away, or choose another --output"
        message = f"--overwrite replaces only what a run left, but {strange[0]!r} is there too"
        raise OutputError(message, where=str(folder), hint=hint)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A private folder beside `folder` that takes its place when the block ends well, and goes when it does not.

    So a folder of this name is always whole: the old one or the new one. Raises OutputError.
    """
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))  # mode 0700
    except OSError as error:
        raise output_error(error, folder) from error
    try:
        with named_write_errors(folder):
            yield stage
            put_in_place(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


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


def put_in_place(stage: Path, folder: Path) -> None:
    """Rename a finished folder to its name; what had the name before goes only when that has worked."""
    old = stage.with_name(stage.name + "-old")
    if folder.exists():
        folder.rename(old)
    try:
        stage.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def output_error(error: OSError, folder: Path) -> OutputError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "free space and try again" if full else "check the path and its permissions"
    message = "the disk is full" if full else f"cannot be written: {error.strerror or error}"
    return OutputError(message, where=str(error.filename or folder), hint=hint)


def write_private(path: Path, text: str) -> None:
    """Write a text only its owner can read: runs are made from sensitive data."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_private(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


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
