"""Read and write headers of the safetensors format: where each tensor of a file lies.

The library maps whole files into memory and writes from whole tensors; a merge that must not hold a model reads and
writes spans of bytes. Format: 8 bytes of header length, a JSON header, the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qunlearn.errors import ModelError
from qunlearn.utils.json_files import CLOSED

# The format admits 100 MB, which takes gigabytes to read; a hundred thousand tensors take a tenth of that.
MAX_HEADER_BYTES = 16 << 20
_DAMAGED = "copy or download the file again"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `dtype` in the format's words (F32, BF16, …), and its bytes from `start` to `end`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def read_tensors(path: Path) -> list[Stored]:
    """Every tensor of a file, in the order of its bytes, once the library finds the file sound. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    try:
        length = _header_bytes(path)
        with safe_open(path, framework="numpy"):  # types, shapes, offsets, gaps, overlaps, the file's length
            pass
        with path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(length))
    except PermissionError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path), hint=CLOSED) from error
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ModelError(f"damaged: {error}", where=str(path), hint=_DAMAGED) from error
    data = 8 + length
    found = [
        Stored(name, entry["dtype"], tuple(entry["shape"]), path, *(data + i for i in entry["data_offsets"]))
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    return sorted(found, key=lambda tensor: (tensor.start, tensor.end))


def _header_bytes(path: Path) -> int:
    """Return how long a file's header says it is. Raises ModelError for no such file, or a header that is too long."""
    if not path.is_file():
        raise ModelError("is a device or a pipe, not a file", where=str(path), hint=_DAMAGED)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        message = f"a header of {length} bytes, more than {MAX_HEADER_BYTES >> 20} MiB: damaged, or made to take long"
        raise ModelError(message, where=str(path), hint=_DAMAGED)
    return length


def header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The beginning of a file whose tensors (name, dtype, shape, bytes) follow in this order, without gaps.

    Padded with spaces to 8 bytes, as the format's own writer does, so that the tensors are aligned.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, size in tensors:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
