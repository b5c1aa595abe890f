"""Staging folders: what is written for an output until it is whole and gets its name.

`staged` is for work of seconds, which is done again; `resumable` for gigabytes: its folder outlives the process, files
finished before a kill are found, checked and kept, and only the same work continues in it. Both are hidden, beside the
folder they will become, or in it where it cannot be renamed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qunlearn.errors import ModelError, OutputError
from qunlearn.utils.console import say
from qunlearn.utils.file_names import RECORD
from qunlearn.utils.files import PART, named_write_errors, output_error, sha256_of, sync, write_json
from qunlearn.utils.json_files import read_object
from qunlearn.utils.lock import locked
from qunlearn.utils.output import CONTENTS, INSIDE, MARK, Place, content, is_mount, real, stays, write_mark

JOURNAL = MARK  # stays in the finished folder: what it was made from, and the hash of each large file


def staging_folder(folder: Path) -> Path:
    """Return where the work for a folder is kept until it is whole: beside it, or in it where it stays."""
    folder = real(folder)
    beside = folder.parent / f".{folder.name}{INSIDE}"
    inside = (folder / INSIDE).is_dir() or (stays(folder) and (is_mount(folder) or not beside.is_dir()))
    return folder / INSIDE if inside else beside


@contextlib.contextmanager
def staged(place: Place) -> Iterator[Path]:
    """A private folder that takes its place when the block ends well, and goes when it does not.

    So a folder of this name is always whole: the old one or the new one. Raises OutputError.
    """
    try:
        folder = real(place.folder)
        if inside := stays(folder):
            prefix, parent = f"{INSIDE}-", folder
        else:
            prefix, parent = f".{folder.name}-", folder.parent
        parent.mkdir(parents=True, exist_ok=inside or parent.is_dir())
        stage = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))  # mode 0700
    except OSError as error:
        raise output_error(error, place.folder) from error
    try:
        with named_write_errors(place.folder):
            yield stage
            if place.mark == MARK:
                write_mark(stage)
            put_in_place(stage, place)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def put_in_place(stage: Path, place: Place) -> None:
    """Give a finished folder its name; what had the name before goes only when that has worked.

    Raises OutputError when something came there meanwhile that may not be replaced.
    """
    place.check(0)
    folder, old = real(place.folder), stage.with_name(stage.name + "-old")
    if stays(folder):
        _fill(stage, folder, old)
    else:
        if folder.exists():
            folder.rename(old)
        try:
            stage.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _fill(stage: Path, folder: Path, old: Path) -> None:
    """Move what is in a folder out and what is in the stage in, and back again where that fails."""
    old.mkdir(mode=0o700, exist_ok=True)
    moved: list[tuple[Path, Path]] = []
    try:
        for source, target in ((folder, old), (stage, folder)):
            for path in _marks_last(content(source) if source == folder else list(source.iterdir())):
                path.rename(target / path.name)
                moved.append((path, target / path.name))
    except BaseException:
        for was, now in reversed(moved):
            with contextlib.suppress(OSError):
                now.rename(was)
        raise
    stage.rmdir()


def _marks_last(paths: Sequence[Path]) -> list[Path]:
    """A folder that is half moved must not look whole."""
    return sorted(paths, key=lambda path: (path.name in (RECORD, MARK), path.name == "config.json", path.name))


def put_back(old: Path, folder: Path) -> None:
    """Give a folder its old content again that a killed process had moved away and not yet replaced."""
    folder = real(folder)
    if not old.is_dir():
        return
    if not folder.exists():
        old.rename(folder)
    elif stays(folder) and not content(folder):
        for path in _marks_last(list(old.iterdir())):
            path.rename(folder / path.name)
        old.rmdir()


class Journal:
    """The files that are finished in a staging folder, with their hashes. Holds the folder's lock."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, dict(identity)
        self.files: dict[str, dict[str, Any]] = {}

    def finish(self, name: str, sha256: str) -> None:
        """A file is complete under a temporary name and on the disk: give it its own, and write that down."""
        path = self.folder / name
        (self.folder / (name + PART)).rename(path)
        self.files[name] = {"bytes": path.stat().st_size, "sha256": sha256}
        self.save()

    def save(self) -> None:
        path = self.folder / JOURNAL
        temporary = path.with_name(JOURNAL + PART)
        write_json(temporary, {**self.identity, "files": dict(sorted(self.files.items()))})
        sync(temporary)
        temporary.replace(path)

    def close(self) -> None:
        """Everything is written: say so, with the names of all files."""
        write_mark(self.folder, {**self.identity, "files": dict(sorted(self.files.items()))})
        sync(self.folder / JOURNAL)

    def recover(self, found: Mapping[str, Any]) -> None:
        """Keep the files whose bytes are still those that were written down; drop everything else in the folder."""
        listed = found.get("files")
        for name, entry in listed.items() if isinstance(listed, dict) else ():
            if _is_sound(self.folder, name, entry):
                self.files[name] = {"bytes": entry["bytes"], "sha256": entry["sha256"]}
        for path in self.folder.iterdir():
            if path.name not in self.files and path.name != JOURNAL:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_sound(folder: Path, name: object, entry: object) -> bool:
    if not isinstance(name, str) or Path(name).name != name or not isinstance(entry, dict):
        return False
    path = folder / name
    if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.get("bytes"):
        return False
    return sha256_of(path) == entry.get("sha256")


def kept_bytes(folder: Path) -> int:
    """Return what an earlier, unfinished attempt at a folder has on the disk."""
    stage = staging_folder(folder)
    return sum(path.stat().st_size for path in stage.iterdir() if path.is_file()) if stage.is_dir() else 0


@contextlib.contextmanager
def resumable(place: Place, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """A staging folder that takes its place when the block ends well, and is found again when it did not end at all.

    Work of another identity that was left there is removed; work that is going on there now is not. After a full
    disk or Ctrl-C what is finished stays; after a ModelError, which would only come again, nothing does.
    Raises OutputError.
    """
    folder = place.folder
    stage = staging_folder(folder)
    try:
        with contextlib.ExitStack() as stack:
            journal = _open(stage, place, identity, stack)
            try:
                journal.save()
                yield journal
                journal.close()
                sync(stage)
                put_in_place(stage, place)
            except ModelError:
                shutil.rmtree(stage, ignore_errors=True)
                raise
            except BaseException:
                _leave(stage)
                raise
    except OSError as error:
        raise output_error(error, folder) from error


@contextlib.contextmanager
def held(stage: Path, output: Path) -> Iterator[None]:
    """A staging folder for this process alone; made where it is not there. Raises OutputError, LockedError."""
    if stage.is_symlink() or (stage.exists() and not stage.is_dir()):
        raise OutputError("is in the way", where=str(stage), hint="remove it")
    stage.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(stage, output):
        yield


def check_again(stage: Path, place: Place) -> None:
    """Ask once more, with the lock: another process may have put something there while this one planned."""
    try:
        place.check(0)
    except OutputError:
        with contextlib.suppress(OSError):
            stage.rmdir()  # where nothing is in it yet
        raise


def _open(stage: Path, place: Place, identity: Mapping[str, Any], stack: contextlib.ExitStack) -> Journal:
    stack.enter_context(held(stage, place.folder))
    check_again(stage, place)
    journal = Journal(stage, identity)
    found = _read(stage / JOURNAL)
    if found is None and {path.name for path in stage.iterdir()} - {JOURNAL + PART}:
        raise OutputError("is not a folder of ours", where=str(stage), hint="move it away")
    if found is not None:
        then = {key: value for key, value in found.items() if key not in ("files", CONTENTS)}
        same = then == json.loads(json.dumps(identity))
        if not same:
            say(f"an unfinished folder of other work is removed: {stage}")
        journal.recover(found if same else {})
        if journal.files:
            say(f"resuming: {len(journal.files)} files are finished in {stage}")
    return journal


def _leave(stage: Path) -> None:
    """Keep what can be resumed; nothing is worth keeping before the first file is finished."""
    found = _read(stage / JOURNAL) or {}
    if not found.get("files"):
        shutil.rmtree(stage, ignore_errors=True)
        return
    for path in stage.glob(f"*{PART}"):
        path.unlink(missing_ok=True)
    say(f"finished files are kept in {stage}: the same command continues from there; remove it to give up")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_object(path, OutputError, shape={"files": {"*": dict}})
    except OutputError:
        return None
