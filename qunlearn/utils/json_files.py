"""Read JSON files that others may have made: regular, of a bounded size, and of the expected shape."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError, QunlearnError

SMALL_BYTES = 8 << 20  # a configuration, a record
LARGE_BYTES = 128 << 20  # what holds a text or numbers of every row
_MOST_VALUES = 8_000_000  # each takes some 60 bytes, even an empty list of two characters
_MOST_NUMBER = 1 << 63
EDITED = "was it edited or cut off?"
CLOSED = "check its permissions"


def read_bytes(path: Path, most_bytes: int = SMALL_BYTES, *, pipes: bool = False) -> bytes:
    """Return the content of a regular file. Raises OSError for a device, or more than `most_bytes`.

    pipes: for a file that a person named: `<(...)` of a shell is one. One that a folder holds waits for ever.
    """
    wait = 0 if pipes else getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, os.O_RDONLY | wait | getattr(os, "O_BINARY", 0))
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(kind):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(kind) and not (pipes and stat.S_ISFIFO(kind)):
            raise OSError(errno.EINVAL, "is a device or a pipe, not a file", str(path))
        size = os.fstat(descriptor).st_size
        if size <= most_bytes:
            content = file.read((size if stat.S_ISREG(kind) else most_bytes) + 1)
            if len(content) <= most_bytes:
                return content
    raise OSError(errno.EFBIG, f"is larger than {most_bytes >> 20} MiB, more than such a file has", str(path))


def read_text(path: Path, most_bytes: int = SMALL_BYTES, *, errors: str = "strict", pipes: bool = False) -> str:
    """Return `read_bytes` as text. Raises OSError, UnicodeDecodeError."""
    return read_bytes(path, most_bytes, pipes=pipes).decode("utf-8-sig", errors)


def parse(text: str) -> Any:
    """Return what a JSON text holds. Raises ValueError, for one that would fill the memory too."""
    if text.count(",") + text.count("[") + text.count("{") > _MOST_VALUES:
        raise ValueError("it holds too many values")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(
    path: Path,
    error: type[QunlearnError] = AdapterError,
    *,
    hint: str = EDITED,
    most_bytes: int = SMALL_BYTES,
    shape: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the JSON object of a file. Raises `error` for what is none, or not of the `shape` (see `misfit`)."""
    where = str(path)
    try:
        value = parse(read_text(path, most_bytes))
    except OSError as fault:
        hint = CLOSED if isinstance(fault, PermissionError) else hint
        raise error(f"cannot be read: {fault.strerror or fault}", where=where, hint=hint) from fault
    except ValueError as fault:
        raise error(f"cannot be read: not valid JSON: {fault}", where=where, hint=hint) from fault
    if not isinstance(value, dict):
        raise error("not a JSON object", where=where, hint=hint)
    if shape is not None and (wrong := misfit(value, shape)) is not None:
        raise error(f"not what it should hold: {wrong}", where=where, hint=hint)
    return value


def misfit(value: object, shape: Any, at: str = "") -> str | None:
    """Return where a value of a JSON file is not as its shape says, in words; None where all is well.

    A shape is a type or a tuple of types, `[shape]` for a list of such, or a dict: by key, "key?" for one that may be
    missing, "*" for every other key.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{at or 'it'} is not an object"
        named = {key.rstrip("?"): (inner, key.endswith("?")) for key, inner in shape.items() if key != "*"}
        missing = next((key for key, (_, optional) in named.items() if not optional and key not in value), None)
        if missing is not None:
            return f"{at}.{missing}".lstrip(".") + " is missing"
        pairs = [(key, inner, named[key][0] if key in named else shape.get("*")) for key, inner in value.items()]
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return f"{at or 'it'} is not a list"
        pairs = [(str(i), inner, shape[0]) for i, inner in enumerate(value)]
    else:
        return None if _is(value, shape) else f"{at or 'it'} is not as it was written"
    found = (misfit(inner, of, f"{at}.{str(key)[:40]}".lstrip(".")) for key, inner, of in pairs if of is not None)
    return next((wrong for wrong in found if wrong is not None), None)


def _is(value: object, kinds: Any) -> bool:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if isinstance(value, bool):  # Python's True is an int
        return bool in kinds
    return isinstance(value, kinds) and not (isinstance(value, int) and abs(value) > _MOST_NUMBER)
