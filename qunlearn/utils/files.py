"""Write files that only their owner can read, whole, with errors that name the path."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qunlearn.errors import OutputError


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


PART = ".part"


def sha256_of(path: Path) -> str:
    """The hash of a whole file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have a file or folder on the disk before what comes next."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
