"""Compute the bytes of a merged tensor a few rows at a time: W + s B A in fp32, then the checkpoint's dtype."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qunlearn.errors import ModelError
from qunlearn.merging.lora_tensors import Update
from qunlearn.merging.plan import Piece
from qunlearn.merging.tensor_reader import DTYPES, Reader, as_bytes

if TYPE_CHECKING:
    from qunlearn.merging.dequantize import Rounding

_NUMBERS = 1 << 20  # of a weight at a time: with fp32 copies a few MB, which stay in the processor's cache
_ROWS = 64  # a multiple of what matrix kernels take at a time: products of such blocks have the whole product's bits
_RAW_BYTES = 1 << 21


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
        out = reader.output(tuple(block.shape), DTYPES[piece.dtype])
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
    dtype = torch.float32 if weight is not None else DTYPES[piece.source.dtype]

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
