"""Hold a 4-bit model's weights unpacked while it generates: each is unpacked once, and not again for every token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from copy import copy
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
    return sum(_dtype(layer, model).itemsize * layer.in_features * layer.out_features for layer in _layers(model))


@contextlib.contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Let a model's 4-bit layers multiply by unpacked weights, the same numbers as they unpack themselves."""
    with contextlib.ExitStack() as stack:
        for layer in _layers(model):
            layer.forward = partial(_forward, layer.bias, _weight(layer, _dtype(layer, model)))
            stack.callback(layer.__dict__.pop, "forward")
        yield


def _layers(model: Any) -> list[Linear4bit]:
    """The 4-bit layers in bitsandbytes' own format, in one piece on one device, that nobody has put anything before."""

    def is_plain(layer: Any) -> bool:
        state = getattr(layer.weight, "quant_state", None)
        whole = state is not None and tuple(state.shape) == (layer.out_features, layer.in_features)
        return whole and "forward" not in layer.__dict__ and not getattr(state, _REPACKED, False)

    return [module for module in model.modules() if type(module) is Linear4bit and is_plain(module)]


def _dtype(layer: Linear4bit, model: Any) -> torch.dtype:
    """What a layer computes in, which a checkpoint that came in 4 bits may say."""
    dtype: torch.dtype = layer.compute_dtype or model.dtype
    return dtype


def _weight(layer: Linear4bit, dtype: torch.dtype) -> Tensor:
    """A layer's weight (out, in): unpacked to what it computes in at once, whatever it was packed from."""
    state = copy(layer.weight.quant_state)
    state.dtype = dtype
    return bnb.dequantize_4bit(layer.weight.data, state)  # type: ignore[no-any-return]


def _forward(bias: Tensor | None, weight: Tensor, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out)"""
    return linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).to(x.dtype)
