"""Read the base's first gigabytes ahead, while the libraries that merge them are imported. No torch here."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

_STEP_BYTES = 1 << 20  # of a larger span the system takes only the beginning
_MOST_BYTES = 4 << 30


def advise(descriptor: int, start: int, end: int) -> int:
    """Have the system read a span into its cache, in the background; returns where it was asked to stop.

    Advice only: where there is no such call, or a file system takes none, nothing happens.
    """
    while hasattr(os, "posix_fadvise") and start + _STEP_BYTES <= end:
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, start, _STEP_BYTES, os.POSIX_FADV_WILLNEED)
        start += _STEP_BYTES
    return start


def read_ahead(folder: Path) -> None:
    """Begin to read a model's weight files in the order of their names, as much as a quarter of the free memory."""
    threading.Thread(target=_read, args=(folder, min(_MOST_BYTES, _free_bytes() // 4)), daemon=True).start()


def _read(folder: Path, left: int) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(OSError), path.open("rb") as file:
            size = min(left, path.stat().st_size)
            advise(file.fileno(), 0, size)
            left -= size


def _free_bytes() -> int:
    """Memory that nothing is in; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
