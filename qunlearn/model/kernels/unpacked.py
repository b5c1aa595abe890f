"""Hold a 4-bit model's weights unpacked while it generates: each is unpacked once, and not again for every token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from torch.nn.functional import linear


def unpacked_bytes(model: Any) -> int:
    """Return the bytes that a model's 4-bit weights come to when they are unpacked."""
    width = torch.finfo(model.dtype).bits // 8
    return sum(width * layer.in_features * layer.out_features for layer in _layers(model))


@contextlib.contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Let a model's 4-bit layers multiply by unpacked weights, the same numbers as they unpack themselves."""
    layers = _layers(model)
    for layer in layers:
        weight = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(model.dtype)
        layer.forward = partial(_forward, layer.bias, weight)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward")


def _layers(model: Any) -> list[Linear4bit]:
    """The 4-bit layers that lie in one piece on one device, and that nobody has put anything before."""
    found = [module for module in model.modules() if type(module) is Linear4bit]
    return [m for m in found if "forward" not in m.__dict__ and getattr(m.weight, "quant_state", None) is not None]


def _forward(bias: Tensor | None, weight: Tensor, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out)"""
    return linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)
