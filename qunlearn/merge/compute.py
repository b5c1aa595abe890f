"""The bytes of a tensor that is being merged, a few rows at a time: W + s B A in fp32, then the checkpoint's dtype."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from qunlearn.errors import ModelError
from qunlearn.merge.adapter import Update
from qunlearn.merge.plan import Piece
from qunlearn.merge.rounding import Rounding, restored
from qunlearn.model.tensorfile import Stored

_NUMBERS = 1 << 20  # of a weight at a time: with fp32 copies a few MB, which stay in the processor's cache
_ROWS = 64  # a multiple of what matrix kernels take at a time: products of such blocks have the whole product's bits
_RAW_BYTES = 1 << 22
_AHEAD_BYTES = 1 << 26
_TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
}


class Reader:
    """Reads spans of tensors from their files, without mapping these: mapped pages would count as memory in use."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def bytes(self, tensor: Stored, start: int, end: int) -> bytearray:
        """The bytes of a tensor from `start` to `end`. Raises ModelError when the file has become shorter."""
        file = self._files.get(tensor.file)
        if file is None:
            file = self._files[tensor.file] = tensor.file.open("rb", buffering=0)
        buffer = bytearray(end - start)
        view, done = memoryview(buffer), 0
        file.seek(tensor.start + start)
        _advise(file, tensor.start + end)
        while done < len(buffer):
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise ModelError("became shorter while it was read", where=str(tensor.file), hint="copy it again")
            done += count
        return buffer

    def whole(self, tensor: Stored) -> Tensor:
        """A tensor as it is stored. Raises ModelError for a type that is not understood."""
        if tensor.dtype not in _TORCH:
            raise ModelError(f"of type {tensor.dtype}, which is not understood", where=tensor.name)
        if tensor.bytes == 0:
            return torch.empty(tensor.shape, dtype=_TORCH[tensor.dtype])
        flat = torch.frombuffer(self.bytes(tensor, 0, tensor.bytes), dtype=_TORCH[tensor.dtype])
        return flat.reshape(tensor.shape)


def _advise(file: BinaryIO, at: int) -> None:
    """Let the system read ahead while we compute."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # advice only: some file systems take none
            os.posix_fadvise(file.fileno(), at, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def blocks(piece: Piece, reader: Reader, rounding: Rounding | None) -> Iterator[memoryview]:
    """The bytes of a piece, in order. Raises ModelError when a merged number is not finite."""
    if not piece.updates and not piece.rounded:
        for start in range(0, piece.bytes, _RAW_BYTES):
            yield memoryview(reader.bytes(piece.source, start, min(piece.bytes, start + _RAW_BYTES)))
        return
    rows, columns = piece.shape
    take = _rows_of(piece, reader, rounding)
    add = [_adder(update, reader, piece.transposed) for update in piece.updates]
    step = _ROWS * max(1, _NUMBERS // max(1, columns) // _ROWS)
    for i in range(0, rows, step):
        block = take(i, min(rows, i + step))
        for each in add:
            each(block, i)
        out = block.to(_TORCH[piece.dtype])
        if not torch.isfinite(out.sum(dtype=torch.float32)) and not torch.isfinite(out).all():
            hint = f"the adapter is broken, or {piece.dtype} too narrow for it"
            raise ModelError("the merged weight is not finite", where=piece.name, hint=hint)
        yield out.contiguous().view(torch.uint8).numpy().data.cast("B")


def _rows_of(piece: Piece, reader: Reader, rounding: Rounding | None) -> Callable[[int, int], Tensor]:
    """Rows i to j of the weight below the updates, in fp32 and free to be changed."""
    if piece.rounded:
        weight = _rounded(piece, reader, rounding)
        return lambda i, j: weight[i:j].to(torch.float32, copy=True)
    columns, dtype = piece.shape[1], _TORCH[piece.source.dtype]
    size = dtype.itemsize

    def take(i: int, j: int) -> Tensor:
        raw = reader.bytes(piece.source, i * columns * size, j * columns * size)
        return torch.frombuffer(raw, dtype=dtype).reshape(j - i, columns).float()

    return take


def _rounded(piece: Piece, reader: Reader, rounding: Rounding | None) -> Tensor:
    """The whole weight as the training saw it, laid out as the file has it: quantisation has constants of the whole."""
    stored = reader.whole(piece.source)
    if piece.statistics:
        statistics = {t.name.removeprefix(f"{piece.name}."): reader.whole(t) for t in piece.statistics}
        weight = restored(piece.name, stored, statistics)
        return weight.T if piece.transposed else weight
    if rounding is None:
        raise ValueError("a weight to be rounded, and no rounding")
    return rounding(stored.T).T if piece.transposed else rounding(stored)


def _adder(update: Update, reader: Reader, transposed: bool) -> Callable[[Tensor, int], None]:
    """Adds rows of scale * B A (of its transpose where the weight is) to a block that begins at row i, in place.

    As peft multiplies: the product first, then the scale, so that an fp32 merge has the same bits.
    """
    a, b = reader.whole(update.a).float(), reader.whole(update.b).float()

    def add(block: Tensor, i: int) -> None:
        j = i + block.shape[0]
        product = (b @ a[:, i:j]).T if transposed else b[i:j] @ a
        block += product.mul_(update.scale)

    return add
