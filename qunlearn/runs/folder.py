"""The run folder: the names of its files, and how later commands open it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError, QunlearnError
from qunlearn.utils.file_names import ADAPTER, RECORD
from qunlearn.utils.json_files import CLOSED, read_object
from qunlearn.utils.output import INSIDE
from qunlearn.utils.text import command_line

_NAMED = 4  # runs in a message
FINISHED = ("done", "failed", "target not reached")
BEGUN_IN = "begun_in"  # in a record: the folder that relative paths of its configuration are seen from


@dataclass(frozen=True)
class Run:
    """A finished run, or a bare adapter folder (then `record` is empty)."""

    adapter: Path
    record: Mapping[str, Any]
    adapter_config: Mapping[str, Any]

    @property
    def base(self) -> str:
        """Return what the run's base was called: a folder or a hub id."""
        base = self.record.get("model", {}).get("location") or self.adapter_config.get("base_model_name_or_path")
        return str(base or "")

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the adapter's folder, and that of the run it is in where there is one."""
        return (self.adapter, *([self.adapter.absolute().parent] if self.adapter.absolute().name == ADAPTER else []))


def open_run(folder: Path) -> Run:
    """Read a run folder or an adapter folder. Raises AdapterError."""
    try:
        adapter = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
        config_path = adapter / "adapter_config.json"
        there = config_path.is_file()
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise AdapterError(message, where=str(folder)[:400], hint=CLOSED) from error
    if not there:
        what, meant = what_is_there(folder)
        raise AdapterError(what, where=str(folder), hint=meant or "give the folder that `qunlearn forget` wrote")
    record_path = folder / RECORD
    record = read_object(record_path) if record_path.is_file() else {}
    _check_record(record, record_path)
    return Run(adapter, record, read_object(config_path))


def what_is_there(folder: Path) -> tuple[str, str]:
    """Return of a path that is no run what is there, and which run may have been meant, "" where none is near."""
    try:
        stages = (folder.parent / f".{folder.name}{INSIDE}", folder / INSIDE)
        if any((stage / "unfinished.json").is_file() for stage in stages):
            return "the run is not finished", f"{command_line('qunlearn', 'forget', '--resume', '-o', folder)} ends it"
        if not folder.is_dir():
            near = {path.name: path for path in _runs_in(folder.parent)}
            close = difflib.get_close_matches(folder.name, near, n=1)
            what = "is a file, not a folder" if folder.exists() else "no such folder"
            meant = f"did you mean {near[close[0]]}?" if close else ""
        elif below := _runs_in(folder):
            names = ", ".join(map(str, below[:_NAMED])) + (", …" if below[_NAMED:] else "")
            what, meant = "no adapter in the folder, but runs", f"give one of them: {names}"
        else:
            is_model = (folder / "config.json").is_file()
            what = "no adapter in the folder" + (", which is a model" if is_model else "")
            what, meant = what if any(folder.iterdir()) else "the folder is empty", ""
        if (folder.parent / RECORD).is_file():
            meant = f"the run is {folder.parent}"
    except OSError as error:
        return f"cannot be read: {error.strerror}", CLOSED
    return what, meant


def _runs_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_adapter_folder(path)) if folder.is_dir() else []


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder is a run or an adapter, rather than a model."""
    return (folder / ADAPTER).is_dir() or (folder / "adapter_config.json").is_file()


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
_TEMPLATE = {"name", "kind", "text", "why", "date"}
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
    """Return what later commands rely on. Raises AdapterError for a record that was edited into something else."""
    places = [*((name, dict) for name in _RECORD_OBJECTS), *((name, str) for name in (*_RECORD_TEXTS, *_RECORD_FILES))]
    for name, kind in places:
        value: Any = record
        for key in name.split("."):
            value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
        # A text that is not known is null; an object that is not there is left out.
        if value is not _ABSENT and not isinstance(value, kind) and not (kind is str and value is None):
            raise AdapterError(f"{name} is not {'an object' if kind is dict else 'a text'}", where=str(path))
    template = record.get("data", {}).get("template")
    if template and ({*template, "date"} != _TEMPLATE or not all(isinstance(v, str) for v in template.values())):
        raise AdapterError("data.template is not a template", where=str(path), hint="was it edited?")
