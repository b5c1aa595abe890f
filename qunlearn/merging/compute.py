"""Compute the bytes of a merged tensor a few rows at a time: W + s B A in fp32, then the checkpoint's dtype."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from qunlearn.errors import ModelError
from qunlearn.hub.safetensors_file import Stored
from qunlearn.merging.lora_tensors import Update
from qunlearn.merging.plan import Piece
from qunlearn.merging.read_ahead import advise

if TYPE_CHECKING:
    from qunlearn.merging.dequantize import Rounding

_NUMBERS = 1 << 20  # of a weight at a time: with fp32 copies a few MB, which stay in the processor's cache
_ROWS = 64  # a multiple of what matrix kernels take at a time: products of such blocks have the whole product's bits
_RAW_BYTES = 1 << 21
_AHEAD_BYTES = 1 << 26
RING = 18
_TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
}


class Reader:
    """Reads spans of tensors from their files, and holds the memory that block after block is computed in.

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
        """Memory of that name, with what was last left in it."""
        size = math.prod(shape) * dtype.itemsize
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = self._held[key] = torch.empty(size, dtype=torch.uint8)
        return held[:size].view(dtype).reshape(shape)

    def output(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that is left alone until RING - 1 more of these were asked for."""
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
        """A tensor as it is stored, in memory of its own. Raises ModelError for a type that is not understood."""
        if tensor.dtype not in _TORCH:
            raise ModelError(f"of type {tensor.dtype}, which is not understood", where=tensor.name)
        return self.fill(torch.empty(tensor.shape, dtype=_TORCH[tensor.dtype]), tensor, 0)

    def _advise(self, file: BinaryIO, path: Path, at: int) -> None:
        """Have the system read on while we compute."""
        asked = self._advised.get(path, 0)
        first = asked if at <= asked <= at + _AHEAD_BYTES else at
        self._advised[path] = advise(file.fileno(), first, at + _AHEAD_BYTES)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def blocks(piece: Piece, reader: Reader, rounding: Rounding | None) -> Iterator[memoryview]:
    """The bytes of a piece, in order; a block is the reader's memory, and good until RING - 1 more were taken.

    Raises ModelError when a merged number is not finite.
    """
    if not piece.updates and not piece.rounded:
        for start in range(0, piece.bytes, _RAW_BYTES):
            size = min(piece.bytes - start, _RAW_BYTES)
            yield as_bytes(reader.fill(reader.output((size,), torch.uint8), piece.source, start))
        return
    add = [_adder(update, reader, piece.transposed) for update in piece.updates]
    for i, block in _rows_of(piece, reader, rounding):
        for each in add:
            each(block, i)
        out = reader.output(tuple(block.shape), _TORCH[piece.dtype])
        out.copy_(block)
        if not _finite(out):
            hint = f"the adapter is broken, or {piece.dtype} too narrow for it"
            raise ModelError("the merged weight is not finite", where=piece.name, hint=hint)
        yield as_bytes(out)


def _finite(block: Tensor) -> bool:
    """Return whether every number is: where their sum is, in a third of the time that looking at each takes."""
    return math.isfinite(float(block.sum())) or bool(torch.isfinite(block).all())


def _rows_of(piece: Piece, reader: Reader, rounding: Rounding | None) -> Iterator[tuple[int, Tensor]]:
    """The weight below the updates, block after block with its first row's number, in fp32 and free to be changed."""
    rows, columns = piece.shape
    step = _ROWS * max(1, _NUMBERS // max(1, columns) // _ROWS)
    spans = [(i, min(rows, i + step)) for i in range(0, rows, step)]
    weight = _rounded(piece, reader, rounding) if piece.rounded else None
    dtype = torch.float32 if weight is not None else _TORCH[piece.source.dtype]

    def read(n: int) -> Tensor:
        i, j = spans[n]
        raw = reader.buffer(("raw", n % 2), (j - i, columns), dtype)
        if weight is not None:
            return raw.copy_(weight[i:j])
        return reader.fill(raw, piece.source, i * columns * dtype.itemsize)

    for (i, _), raw in zip(spans, _one_ahead(reader.ahead, read, len(spans)), strict=True):
        yield i, raw if dtype is torch.float32 else reader.buffer("block", tuple(raw.shape), torch.float32).copy_(raw)


def _one_ahead(pool: Executor, work: Callable[[int], Tensor], count: int) -> Iterator[Tensor]:
    """work(0), work(1), …, each begun before the one before it is given out."""
    waiting = deque(pool.submit(work, n) for n in range(min(1, count)))
    for n in range(1, count + 1):
        found = waiting.popleft().result()
        if n < count:
            waiting.append(pool.submit(work, n))
        yield found


def _rounded(piece: Piece, reader: Reader, rounding: Rounding | None) -> Tensor:
    """The whole weight as the training saw it, laid out as the file has it: quantisation has constants of the whole."""
    stored = reader.whole(piece.source)
    if piece.statistics:
        from qunlearn.merging.dequantize import restored

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
        left, right = (b, a[:, i:j]) if transposed else (b[i:j], a)
        product = torch.mm(left, right, out=reader.buffer("product", (left.shape[0], right.shape[1]), torch.float32))
        product.mul_(update.scale)
        block.add_(product.T if transposed else product)

    return add
