"""Outputs: where a folder may be written, and what it may replace (staging.py: how it gets its name whole).

Every command that writes a folder goes by the rule of `Place`: links are followed first; what is, holds or lies in an
input is refused; --overwrite replaces only what carries our own mark; and all of it is asked again just before the
finished folder is put in place, for much may have happened since.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn import __version__
from qunlearn.errors import OutputError
from qunlearn.utils.file_names import (
    ADAPTER,
    AUDIT,
    AUDIT_RESULT,
    CONFIG,
    EVAL,
    EVAL_CACHE,
    METRICS,
    NORMAL,
    RECORD,
    REPORT,
)
from qunlearn.utils.files import output_error, write_json
from qunlearn.utils.json_files import CLOSED, read_object

MARK = "qunlearn.json"  # in all but runs: by whom it was made, and the names of all files
# Which files tell what kind of output a folder with that mark is.
MODELS, GUARDS, AUDITS = ("config.json", "adapter_config.json", "*.gguf"), ("guard.json",), (AUDIT_RESULT,)
CONTENTS = "contents"
INSIDE = ".unfinished"  # staging within a folder that cannot be renamed
_LATER = {EVAL, EVAL_CACHE, REPORT}  # what `eval` and `report` add
_RUN = {ADAPTER, AUDIT, f".{AUDIT}{INSIDE}", CONFIG, RECORD, METRICS, NORMAL, *_LATER}
_NEEDED_BYTES = 64 << 20
_NAME_BYTES = 255  # where the system does not tell
_MOST_FOLDERS = 300
_AROUND_A_NAME = len(f".{INSIDE}-old")
_OTHER_OUTPUT = "choose another --output"


@dataclass(frozen=True)
class Place:
    """A folder that will be written. `mark`: the file that tells which kind of folder may be replaced, RECORD for a
    run, MARK for others, of which `tells` names files that only the right kind has; `inputs`: files and folders that
    must outlive the work."""

    folder: Path
    mark: str
    overwrite: bool = False
    inputs: tuple[Path, ...] = ()
    tells: tuple[str, ...] = ("*",)

    def check(self, needed_bytes: int = _NEEDED_BYTES) -> None:
        """Refuse an output that cannot be written or would lose something. Raises OutputError."""
        folder, where = real(self.folder), str(self.folder)
        try:
            self._check_inputs(folder)
            if os.path.lexists(folder) and not folder.is_dir():
                raise OutputError("exists and is not a folder", where=where, hint=_OTHER_OUTPUT)
            if folder.is_dir() and content(folder):
                if not self.overwrite:
                    hint = f"{_OTHER_OUTPUT}, or --overwrite to replace it"
                    raise OutputError("the folder is not empty", where=where, hint=hint)
                self._check_ours(folder)
            _check_space(folder, needed_bytes)
        except OSError as error:
            raise output_error(error, self.folder) from error

    def _check_inputs(self, folder: Path) -> None:
        for given in self.inputs:
            other = given.resolve()
            if folder == other:
                what = "is an input of this very command"
            elif other.is_relative_to(folder):
                what = f"holds {given}, which this command reads"
            elif folder.is_relative_to(other) and other.is_dir():
                what = f"lies in {given}, which this command reads"
            else:
                continue
            raise OutputError(what, where=str(self.folder), hint=_OTHER_OUTPUT)

    def _check_ours(self, folder: Path) -> None:
        """Whatever the names, only a folder that says itself that we made it, and what is in it, is replaced."""
        known = _known(folder, self.mark)
        if known is not None and not any(path for pattern in self.tells for path in folder.glob(pattern)):
            message = f"--overwrite replaces only its own kind of output, and no {self.tells[0]} is there"
        elif known is None:
            kind = "runs" if self.mark == RECORD else "what was merged or exported before"
            message = f"--overwrite replaces only {kind}, and there is no {self.mark} of ours in it"
        else:
            strange = [path.name for path in content(folder) if path.name not in known]
            if not strange:
                return
            message = f"--overwrite replaces only what we wrote, but {strange[0]!r} is there too"
        raise OutputError(message, where=str(self.folder), hint=f"move it away, or {_OTHER_OUTPUT}")


def _known(folder: Path, mark: str) -> set[str] | None:
    """The names that a folder of ours may hold; None for a folder without our mark."""
    found = _object(folder / mark)
    if mark == RECORD:
        versions = found.get("versions")
        return _RUN if isinstance(versions, dict) and "qunlearn" in versions else None
    listed = found.get(CONTENTS)
    if not str(found.get("made_by", "")).startswith("qunlearn ") or not isinstance(listed, list):
        return None
    return {MARK, *_LATER, *map(str, listed)}


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, OutputError)
    except OutputError:  # no such file, or none of ours
        return {}


def write_mark(folder: Path, more: dict[str, Any] | None = None) -> None:
    """Say in a finished folder that it is ours, and what is in it, so that --overwrite may replace it."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MARK)
    write_json(folder / MARK, {"made_by": f"qunlearn {__version__}", **(more or {}), CONTENTS: names})


def check_added(folder: Path, own: Iterable[Path]) -> None:
    """Refuse to add files where none can be written, or to an output that is none of the `own`: they would be taken
    for its. Raises OutputError."""
    found, ours = real(folder), {Path(os.path.realpath(path)) for path in own}
    _check_writable(_nearest(found))
    for place in (found, *found.parents):
        if place in ours:
            return
        for mark, word in ((RECORD, "another run"), (MARK, "another output")):
            if _known(place, mark) is not None:
                raise OutputError(f"is the folder of {word}, or lies in it", where=str(folder), hint=_OTHER_OUTPUT)


def default_folder(model: str, bad: str) -> Path:
    """Return runs/MODEL-BAD, in letters and of a length that every file system takes."""

    def plain(text: str) -> str:
        return re.sub(r"[^\w.-]+", "-", text).strip("-.")[:48] or "x"

    stem = Path(bad).name.split(".")[0]
    return Path("runs") / f"{plain(Path(model).name)}-{plain(stem)}"


# -- where it really is ----------------------------------------------------------------------------------


def real(folder: Path) -> Path:
    """Return where a folder really is: links followed, `.` and `..` gone. Raises OutputError."""
    where = ascii(str(folder))[1:-1][:160]
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise OutputError("the name is not UTF-8", where=where, hint=_OTHER_OUTPUT) from None
    try:
        found = folder.resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.lstat()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a loop of links, a null byte
        said = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot be written: {said[:200]}", where=where, hint=_OTHER_OUTPUT) from error
    if len(found.parts) > _MOST_FOLDERS:  # each that is missing is made by a call inside the call for the next
        raise OutputError(f"lies {len(found.parts)} folders deep", where=where, hint=_OTHER_OUTPUT)
    if not found.is_dir() and len(os.fsencode(found.name)) + _AROUND_A_NAME > _longest_name(found):
        raise OutputError("the name is too long", where=where, hint=_OTHER_OUTPUT)
    return found


def _longest_name(path: Path) -> int:
    try:
        return os.pathconf(_nearest(path), "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return _NAME_BYTES


def _nearest(path: Path) -> Path:
    """The folder there is, at or above a path."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def stays(folder: Path) -> bool:
    """Return whether a folder is filled where it is: a mount point, the one this process is in, one whose parent
    takes no new names, or one where that was begun before."""
    if not folder.is_dir():
        return False
    here = os.path.samestat(folder.stat(), Path().stat())
    fixed = here or is_mount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)
    return fixed or (folder / INSIDE).is_dir()


def is_mount(folder: Path) -> bool:
    """Return whether a folder is a mount point. One that is bound within one file system looks like any other: only the
    system's table knows it."""
    if folder.is_mount():
        return True
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return False
    escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in str(folder))
    return any(line.split(" ")[4:5] == [escaped] for line in table.splitlines())


def content(folder: Path) -> list[Path]:
    """List what is in a folder, without our own staging and what a file system puts at its root."""
    if not stays(folder):
        return sorted(folder.iterdir())
    return sorted(p for p in folder.iterdir() if not p.name.startswith(INSIDE) and p.name != "lost+found")


def _check_writable(place: Path) -> None:
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise OutputError("cannot be written", where=str(place), hint=CLOSED)


def _check_space(folder: Path, needed_bytes: int) -> None:
    place = folder if stays(folder) else _nearest(folder.parent)
    _check_writable(place)
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        message = f"{needed_bytes / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free"
        raise OutputError(f"the disk is full: {message}", where=str(place), hint="free space")
