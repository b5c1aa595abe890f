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

_REPACKED = "packing_format_for_cpu"  # of a weight that bitsandbytes has laid out anew for a kernel of its own


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
    """The 4-bit layers in bitsandbytes' own format, in one piece on one device, that nobody has put anything before."""

    def is_plain(layer: Any) -> bool:
        state = getattr(layer.weight, "quant_state", None)
        return "forward" not in layer.__dict__ and state is not None and not getattr(state, _REPACKED, False)

    return [module for module in model.modules() if type(module) is Linear4bit and is_plain(module)]


def _forward(bias: Tensor | None, weight: Tensor, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out)"""
    return linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)
