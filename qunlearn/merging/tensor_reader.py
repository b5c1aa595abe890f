"""Read a checkpoint's tensors block by block, into memory that is used again."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from qunlearn.errors import ModelError
from qunlearn.hub.safetensors_file import Stored
from qunlearn.merging.read_ahead import advise

RING = 18  # outputs that are in use at a time
_AHEAD_BYTES = 1 << 26
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I8": torch.int8}


class Reader:
    """Read spans of tensors from their files, and hold the memory that block after block is computed in.

    Files are not mapped: mapped pages would count as memory in use. Buffers are used again: fresh ones cost a page
    fault for every 4 KB, as much time as the arithmetic. `ahead` is for one read while something else is computed.
    """

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._advised: dict[Path, int] = {}
        self._held: dict[object, Tensor] = {}
        self._turn = 0
        self.ahead = ThreadPoolExecutor(1)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.ahead.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            file.close()

    def buffer(self, key: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the memory of that name, with what was last left in it."""
        size = math.prod(shape) * dtype.itemsize
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = self._held[key] = torch.empty(size, dtype=torch.uint8)
        return held[:size].view(dtype).reshape(shape)

    def output(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory that is left alone until RING - 1 more of these were asked for."""
        self._turn = (self._turn + 1) % RING
        return self.buffer(self._turn, shape, dtype)

    def fill(self, out: Tensor, tensor: Stored, start: int) -> Tensor:
        """Read a tensor's bytes from `start` into contiguous memory. Raises ModelError when the file was cut."""
        file = self._files.get(tensor.file)
        if file is None:
            file = self._files[tensor.file] = tensor.file.open("rb", buffering=0)
        view, done = as_bytes(out), 0
        file.seek(tensor.start + start)
        self._advise(file, tensor.file, tensor.start + start + len(view))
        while done < len(view):
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise ModelError("became shorter while it was read", where=str(tensor.file), hint="copy it again")
            done += count
        return out

    def whole(self, tensor: Stored) -> Tensor:
        """Return a tensor as it is stored, in its own memory. Raises ModelError for a type that is not understood."""
        if tensor.dtype not in DTYPES:
            raise ModelError(f"of type {tensor.dtype}, which is not understood", where=tensor.name)
        return self.fill(torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype]), tensor, 0)

    def _advise(self, file: BinaryIO, path: Path, at: int) -> None:
        """Have the system read on while we compute."""
        asked = self._advised.get(path, 0)
        first = asked if at <= asked <= at + _AHEAD_BYTES else at
        self._advised[path] = advise(file.fileno(), first, at + _AHEAD_BYTES)


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
