"""Fused LoRA layer: forward and backward in the model's dtype; only the layer's input is saved for backward.

peft casts the input of every layer to the fp32 of its adapter, multiplies there, and casts, scales and adds results as
wide as the layer's. Here the adapter's small matrices are cast instead: their fp32 numbers are the ones that are
trained, and all that is kept for the backward pass is the input, which layers with the same one share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# In fp16 a gradient times B, which begins at 0 and stays small, would be rounded to nothing: B is multiplied by this
# first, and what comes of it divided by it.
_FP16_LIFT = 64.0
# Where a layer finds its matrices in the model's dtype during a step, and where it keeps them between steps.
_CAST, _KEPT = "_qunlearn_cast", "_qunlearn_kept"


def make_lean(layers: Iterable[LoraLayer], *, whole: bool = False) -> None:
    """Let these layers compute their adapters so, all that are plain LoRA on a linear layer; undone by `make_plain`.

    `whole`: layer and adapter in one where the layer is in 4 bits, which saves kernels; on a CPU there is nothing to
    save, and its bits stay.
    """
    for layer in layers:
        if _is_plain(layer):
            layer.forward = partial(_forward, layer, whole)


def make_plain(layers: Iterable[LoraLayer]) -> None:
    """Let these layers compute their adapters as peft has it."""
    for layer in layers:
        layer.__dict__.pop("forward", None)


def _is_plain(layer: Any) -> bool:
    """One adapter, of two matrices and nothing else, on a linear layer, bitsandbytes' among them."""
    modules = (*layer.lora_A.values(), *layer.lora_B.values())
    matrices = all(isinstance(m, nn.Linear) and m.bias is None for m in modules)
    return (
        matrices and len(modules) == 2 and not layer.lora_variant and isinstance(layer.base_layer, (nn.Linear, Conv1D))
    )


@dataclass(frozen=True)
class _Matrices:
    """A layer's adapter in the dtype that the model computes in: a (r, in) times its scaling, b (out, r) times scaling
    and lift. So no gradient is left to be scaled; products of both are multiplied by `factor`."""

    a: Tensor
    b: Tensor
    scaling: float
    lift: float

    @classmethod
    def of(cls, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> _Matrices:
        """Cast a (r, in) and b (out, r)."""
        lift = _lift(dtype)
        return cls((a.detach() * scaling).to(dtype), (b.detach() * (scaling * lift)).to(dtype), scaling, lift)

    @property
    def factor(self) -> float:
        """Return what is left of a product with a and b."""
        return 1 / (self.scaling * self.lift) if self.scaling else 0.0


def _adapter(layer: Any) -> tuple[Tensor, Tensor, float]:
    """A layer's A, B and scaling."""
    (name,) = layer.lora_A
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


@contextlib.contextmanager
def cast_once(layers: Sequence[Any], dtype: torch.dtype) -> Iterator[None]:
    """Let the adapters of a step be cast to the model's dtype once, not in each of its passes.

    They keep their memory from step to step, for passes that were recorded read it. What changes the adapter inside is
    not seen.
    """
    lean = [layer for layer in layers if "forward" in layer.__dict__]
    found = [_adapter(layer) for layer in lean]
    kept = [_kept(layer, *adapter, dtype) for layer, adapter in zip(lean, found, strict=True)]
    _refresh(kept, [a.detach() for a, _, _ in found], [b.detach() for _, b, _ in found])
    for layer, matrices in zip(lean, kept, strict=True):
        layer.__dict__[_CAST] = matrices
    try:
        yield
    finally:
        for layer in lean:
            layer.__dict__.pop(_CAST)


def _kept(layer: Any, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> _Matrices:
    """The memory in which a layer's matrices lie from step to step."""
    kept: _Matrices | None = layer.__dict__.get(_KEPT)
    if kept is None or kept.a.dtype != dtype or kept.a.device != a.device:
        made = [torch.empty_like(t, dtype=dtype, requires_grad=False) for t in (a, b)]
        kept = _Matrices(made[0], made[1], scaling, _lift(dtype))
        layer.__dict__[_KEPT] = kept
    return kept


def _refresh(kept: Sequence[_Matrices], a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Cast the adapters anew, in few kernels on a GPU."""
    groups: dict[tuple[float, float], list[int]] = {}
    for i, m in enumerate(kept):
        groups.setdefault((m.scaling, m.lift), []).append(i)
    for (scaling, lift), members in groups.items():
        torch._foreach_copy_([kept[i].a for i in members], torch._foreach_mul([a[i] for i in members], scaling))
        torch._foreach_copy_([kept[i].b for i in members], torch._foreach_mul([b[i] for i in members], scaling * lift))


def _lift(dtype: torch.dtype) -> float:
    return _FP16_LIFT if dtype == torch.float16 else 1.0


def _forward(layer: Any, whole: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if layer.disable_adapters or layer.merged or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    a, b, _ = _adapter(layer)
    (dropout,), base = layer.lora_dropout.values(), layer.base_layer
    seen = dropout(x)
    if whole and torch.is_grad_enabled() and seen is x and type(base) is Linear4bit and base.bias is None:
        return _AdaptedLinear4bit.apply(x, a, b, _cast(layer, x.dtype), base)  # type: ignore[no-any-return, no-untyped-call]
    y = base(x)
    return _Adapted.apply(y, seen.to(y.dtype), a, b, _cast(layer, y.dtype))  # type: ignore[no-any-return, no-untyped-call]


def _cast(layer: Any, dtype: torch.dtype) -> _Matrices:
    """A layer's matrices in a dtype: those of the step where there are any."""
    found: _Matrices | None = layer.__dict__.get(_CAST)
    return found if found is not None and found.a.dtype == dtype else _Matrices.of(*_adapter(layer), dtype)


class _Adapted(torch.autograd.Function):
    """y + scaling * x A^T B^T: y (..., out), x (..., in), A (r, in), B (out, r) -> (..., out), where possible in the
    place of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, cast: _Matrices) -> Tensor:
        down = x.flatten(0, -2) @ cast.a.T  # (N, r)
        ctx.save_for_backward(x, down)
        ctx.cast, ctx.dtype = cast, a.dtype
        flat, up = y.view(-1, y.shape[-1]), cast.b.T
        if y._is_view():  # as bitsandbytes returns it with a bias; autograd lets nobody write there
            return torch.addmm(flat, down, up, alpha=cast.factor).view_as(y)
        ctx.mark_dirty(y)
        flat.addmm_(down, up, alpha=cast.factor)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, down = ctx.saved_tensors
        cast: _Matrices = ctx.cast
        g = gradient.flatten(0, -2)
        below: Any = g @ cast.b  # (N, r)
        # No view: what comes to x from the layer itself can then be added to it in place.
        dx = below.unflatten(0, x.shape[:-1]) @ (cast.a * cast.factor) if ctx.needs_input_grad[1] else None
        return gradient, dx, *_of_adapter(g, x, down, below, cast, ctx.dtype), None


class _AdaptedLinear4bit(torch.autograd.Function):
    """x W^T + scaling * x A^T B^T with W in 4 bits, as `_Adapted` on bitsandbytes' layer, in fewer kernels: what comes
    to x from both sides is added while it is multiplied. x (..., in) -> (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, cast: _Matrices, base: Linear4bit) -> Tensor:
        y: Tensor = base(x)
        down = x.flatten(0, -2) @ cast.a.T  # (N, r)
        y.view(-1, y.shape[-1]).addmm_(down, cast.b.T, alpha=cast.factor)
        ctx.save_for_backward(x, down)
        ctx.cast, ctx.dtype, ctx.base = cast, a.dtype, base
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, down = ctx.saved_tensors
        cast: _Matrices = ctx.cast
        g = gradient.flatten(0, -2)
        below, dx = g @ cast.b, None
        if ctx.needs_input_grad[0]:
            weight = ctx.base.weight
            state = getattr(weight, "quant_state", None) or ctx.base.quant_state  # gathered from shards it has none
            dx = g @ bnb.dequantize_4bit(weight.data, state).to(g.dtype)
            dx = dx.addmm_(below, cast.a, alpha=cast.factor).view_as(x)
        return dx, *_of_adapter(g, x, down, below, cast, ctx.dtype), None, None


def _of_adapter(
    g: Tensor, x: Tensor, down: Tensor, below: Tensor, cast: _Matrices, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of A and B, from that of the layer's output (N, out) and what it is below B (N, r)."""
    da = _product(below.T, x.flatten(0, -2), dtype)
    return da if cast.lift == 1 else da.div_(cast.lift), _product(g.T, down, dtype)


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x y in another precision than theirs: at once where a kernel can, else cast afterwards."""
    if x.is_cuda and x.dtype != dtype:
        return torch.mm(x, y, out_dtype=dtype)
    return (x @ y).to(dtype)
