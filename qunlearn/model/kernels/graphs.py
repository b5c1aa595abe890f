"""CUDA graphs of the decoder: the kernels of a forward pass, and of its backward pass, launched all at once.

A small GPU step is bound by launches: hundreds a decoder block, each some microseconds of Python. A pass whose shape
was seen before is recorded once and then replayed: the same kernels on the same memory, with other tokens in it. Losses
stand outside, between the two halves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qunlearn.data.batch import Batch, Layout

# Shapes of which passes are kept: each holds its kernels' arguments, about 10 KB a kernel, on the GPU.
MOST_SHAPES = 16
TRAINED, REFERENCE = "trained", "reference"


class Recorded(Protocol):
    """A pass that can be run again on other tokens of the same shape."""

    def forward(self, batch: Batch) -> Tensor:
        """The hidden states (1, N, D), good until the next pass."""
        ...

    def backward(self, gradient: Tensor) -> None:
        """Add to the parameters' gradients what follows from that of the hidden states (1, N, D)."""
        ...


# Of a function of a batch, the batch, and the parameters that it trains (none: no backward pass).
Record = Callable[[Callable[[Batch], Tensor], Batch, Sequence[Tensor]], Recorded]


@dataclass(frozen=True)
class _Shape:
    kind: str
    tokens: int
    rows: int
    width: int
    masked: bool


class Graphs:
    """The recorded passes of a policy. What is seen once is computed as ever; what comes again is recorded.

    `give_up` hears why when recording fails, after which nothing is recorded any more.
    """

    def __init__(self, parameters: Sequence[Tensor], record: Record, give_up: Callable[[str], None]) -> None:
        self.parameters, self._record, self._give_up = list(parameters), record, give_up
        self._anchor = torch.zeros((), requires_grad=True)  # what autograd follows to the backward pass
        self._seen: Counter[_Shape] = Counter()
        self._recorded: dict[_Shape, Recorded] = {}
        self.off = False

    @property
    def shapes(self) -> int:
        """Return how many passes were recorded."""
        return len(self._recorded)

    def hidden(self, run: Callable[[Batch], Tensor], batch: Batch, kind: str) -> Tensor:
        """Final hidden states (1, N, D) of a batch with a layout, by `run` or by what was recorded of it."""
        recorded = None if self.off else self._find(run, batch, kind)
        if recorded is None:
            return run(batch)
        if kind == REFERENCE:
            return recorded.forward(batch)
        return _Replayed.apply(self._anchor, recorded, batch)  # type: ignore[no-any-return, no-untyped-call]

    def drop(self) -> bool:
        """Give up what was recorded, and recording; return whether there was anything."""
        had = bool(self._recorded)
        self._recorded.clear()
        self.off = True
        return had

    def _find(self, run: Callable[[Batch], Tensor], batch: Batch, kind: str) -> Recorded | None:
        shape = _shape(batch, kind)
        self._seen[shape] += 1
        if shape in self._recorded:
            return self._recorded[shape]
        if self._seen[shape] == 1 or len(self._recorded) >= MOST_SHAPES:
            return None
        try:
            self._recorded[shape] = self._record(run, batch, self.parameters if kind == TRAINED else ())
        except (RuntimeError, torch.OutOfMemoryError) as error:  # what a model does may not be recordable
            self.drop()
            self._give_up((str(error).strip().splitlines() or [type(error).__name__])[0][:200])
            return None
        return self._recorded[shape]


def _shape(batch: Batch, kind: str) -> _Shape:
    if batch.layout is None:
        raise ValueError("only a batch with a layout can be recorded")
    rows, width = batch.layout.tokens.shape
    return _Shape(kind, batch.input_ids.shape[1], rows, width, batch.layout.mask is not None)


class _Replayed(torch.autograd.Function):
    """A recorded forward pass, whose backward pass is the recorded one."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, recorded: Recorded, batch: Batch) -> Tensor:
        ctx.recorded = recorded
        return recorded.forward(batch).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.recorded.backward(gradient)
        return None, None, None


class CudaGraphs:
    """Records passes as CUDA graphs, all in one pool of memory: no two of them are ever under way at once."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[Batch], Tensor], batch: Batch, parameters: Sequence[Tensor]) -> Recorded:
        found = _CudaGraph(run, batch, parameters, self._pool)
        self._pool = found.pool
        return found


class _CudaGraph:
    """A forward pass, and where there are parameters its backward pass, as CUDA graphs."""

    def __init__(self, run: Callable[[Batch], Tensor], batch: Batch, parameters: Sequence[Tensor], pool: Any) -> None:
        self.batch = _copy(batch)
        self._forward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, pool=pool):
            h = run(self.batch)
        self.pool = self._forward.pool()
        self.hidden = h.detach()
        self._backward: torch.cuda.CUDAGraph | None = None
        if parameters:
            self._gradient = torch.zeros_like(self.hidden)
            for p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            self._backward = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._backward, pool=self.pool):
                found = torch.autograd.grad(h, list(parameters), self._gradient)
                gradients: list[Any] = [p.grad for p in parameters]
                torch._foreach_add_(gradients, list[Any](found))
                del found

    def forward(self, batch: Batch) -> Tensor:
        _fill(self.batch, batch)
        self._forward.replay()
        return self.hidden

    def backward(self, gradient: Tensor) -> None:
        if self._backward is None:
            raise RuntimeError("recorded without a backward pass")
        self._gradient.copy_(gradient)
        self._backward.replay()


def _tensors(batch: Batch) -> list[Tensor]:
    layout = batch.layout
    if layout is None:
        return []
    found = [batch.input_ids, batch.position_ids, layout.tokens, layout.places, layout.mask]
    return [t for t in found if t is not None]


def _copy(batch: Batch) -> Batch:
    layout = batch.layout
    if layout is None or batch.position_ids is None:
        raise ValueError("only a batch with a layout can be recorded")
    mask = None if layout.mask is None else layout.mask.clone()
    return replace(
        batch,
        input_ids=batch.input_ids.clone(),
        position_ids=batch.position_ids.clone(),
        layout=Layout(layout.tokens.clone(), layout.places.clone(), mask),
    )


def _fill(into: Batch, batch: Batch) -> None:
    for mine, theirs in zip(_tensors(into), _tensors(batch), strict=True):
        mine.copy_(theirs)
