"""Rotary position embeddings in fewer kernels: three a tensor, where transformers launches five and twelve back."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "apply_rotary_pos_emb"  # of transformers' modelling files


def fuse_rotary(model: nn.Module) -> bool:
    """Let a model's attention rotate queries and keys so; returns whether it does.

    The function stands in the model's own file. It is tried on numbers, and left alone where it computes anything else.
    Other models of the same family get it as well: it is the same function.
    """
    files = {sys.modules[type(m).__module__] for m in model.modules() if type(m).__name__.endswith("Attention")}
    found = [file for file in files if hasattr(file, _NAME)]
    for file in found:
        theirs = getattr(file, _NAME)
        if theirs is not rotated and _is_same(theirs):
            setattr(file, _NAME, rotated)
    return bool(found) and all(getattr(file, _NAME) is rotated for file in found)


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries (B, H, T, d) and keys (B, H', T, d) turned by the angles of their positions, cos and sin (B, T, d)."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)  # type: ignore[no-untyped-call]


class _Rotated(torch.autograd.Function):
    """x cos + (-x2, x1) sin, for halves x1 and x2 of the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = sin.shape[-1] // 2
        return _turned(x, cos, sin[..., :half], sin[..., half:], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = sin.shape[-1] // 2
        return _turned(gradient, cos, sin[..., half:], sin[..., :half], 1), None, None


def _turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int) -> Tensor:
    """x cos + sign (x2 first, -x1 second)."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], first, value=sign)
    out[..., half:].addcmul_(x[..., :half], second, value=-sign)
    return out


@torch.no_grad()
def _is_same(theirs: Any) -> bool:
    """Compare on numbers in fp32."""
    x = torch.linspace(-2, 2, 2 * 3 * 5 * 8).view(2, 3, 5, 8)
    angles = torch.linspace(0, 3, 2 * 5 * 4).view(2, 5, 4).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    try:
        wanted = theirs(x, x[:, :1], cos, sin)
    except (RuntimeError, TypeError, ValueError):
        return False
    ours = rotated(x, x[:, :1], cos, sin)
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, wanted, strict=True))
