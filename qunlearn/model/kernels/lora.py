"""Fused LoRA layer: forward and backward in the model's dtype; only the layer's input is saved for backward.

peft casts the input of every layer to the fp32 of its adapter, multiplies there, and casts, scales and adds results as
wide as the layer's. Here the adapter's small matrices are cast instead: their fp32 numbers are the ones that are
trained, and all that is kept for the backward pass is the input, which layers with the same one share.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# In fp16 a gradient times B, which begins at 0 and stays small, would be rounded to nothing: B is multiplied by this
# first, and A divided by it.
_FP16_LIFT = 64.0


def make_lean(layers: Iterable[LoraLayer]) -> None:
    """Let these layers compute their adapters so, all that are plain LoRA on a linear layer; undone by `make_plain`."""
    for layer in layers:
        if _is_plain(layer):
            layer.forward = partial(_forward, layer)


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


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if layer.disable_adapters or layer.merged or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    (name,) = layer.lora_A
    y, seen = layer.base_layer(x), layer.lora_dropout[name](x)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _Adapted.apply(y, seen.to(y.dtype), a, b, layer.scaling[name])  # type: ignore[no-any-return, no-untyped-call]


class _Adapted(torch.autograd.Function):
    """y + scaling * x A^T B^T: y (..., out), x (..., in), A (r, in), B (out, r) -> (..., out), where possible in the
    place of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        down = x.flatten(0, -2) @ a.to(x.dtype).T  # (N, r)
        ctx.save_for_backward(x, down, a, b)
        ctx.scaling = scaling
        flat, up = y.view(-1, y.shape[-1]), b.to(x.dtype).T
        if y._is_view():  # as bitsandbytes returns it with a bias; autograd lets nobody write there
            return torch.addmm(flat, down, up, alpha=scaling).view_as(y)
        ctx.mark_dirty(y)
        flat.addmm_(down, up, alpha=scaling)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, down, a, b = ctx.saved_tensors
        g, lift = gradient.flatten(0, -2), _FP16_LIFT if gradient.dtype == torch.float16 else 1.0
        below = g @ (b * (ctx.scaling * lift)).to(g.dtype)  # (N, r)
        # No view: what comes to x from the layer itself can then be added to it in place.
        dx = below.unflatten(0, x.shape[:-1]) @ (a / lift).to(g.dtype) if ctx.needs_input_grad[1] else None
        da = (below.T @ x.flatten(0, -2)).to(a.dtype).div_(lift)
        db = (g.T @ down).to(b.dtype).mul_(ctx.scaling)
        return gradient, dx, da, db, None
