"""Lock a folder for one process at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from qunlearn.errors import LockedError

_FILE = "lock"  # only where folders themselves cannot be locked


@contextlib.contextmanager
def locked(stage: Path, output: Path) -> Iterator[None]:
    """Hold a staging folder for this process; the system lets go of it when the process ends, however that is.

    `output` is what the user called it. Raises LockedError.
    """
    descriptor = _take(stage, output)
    try:
        # Who held it before may have removed the folder meanwhile: what is locked then has no name any more.
        if os.name != "nt" and not (stage.is_dir() and os.path.samestat(os.fstat(descriptor), stage.stat())):
            raise _taken(output)
        yield
    finally:
        os.close(descriptor)


def _take(stage: Path, output: Path) -> int:
    try:
        import fcntl
    except ImportError:
        return _take_on_windows(stage, output)
    descriptor = os.open(stage, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise _taken(output) from error
    return descriptor


def _take_on_windows(stage: Path, output: Path) -> int:
    import importlib

    msvcrt = importlib.import_module("msvcrt")
    descriptor = os.open(stage.with_name(stage.name + "." + _FILE), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        os.close(descriptor)
        raise _taken(output) from error
    return descriptor


def _taken(output: Path) -> LockedError:
    return LockedError("another process is writing it", where=str(output), hint="wait, or choose another --output")
