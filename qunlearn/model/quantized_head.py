"""Quantise the output head to 8 bits: half of the largest matrix, for a rounding of 1 % a weight."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn

from qunlearn.memory.tiles import HEAD_BLOCK, restored_rows
from qunlearn.model.head import Head, Scales


class EightBitHead(nn.Module):
    """Stands in for a model's output layer: (..., D) -> (..., V)."""

    def __init__(self, layer: Any, device: torch.device) -> None:
        super().__init__()
        weight: Tensor = layer.weight.detach()
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=device)
        scales: list[Tensor] = []
        step = restored_rows(weight.shape[1], weight.itemsize)
        for start in range(0, len(weight), step):  # whatever the weight's own device, never all of it on the other one
            rows = slice(start, start + step)
            codes[rows], state = bnb.quantize_blockwise(weight[rows].to(device), blocksize=HEAD_BLOCK)
            scales.append(state.absmax)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias: Tensor | None = getattr(layer, "bias", None)
        self.scales = Scales(torch.cat(scales), state.code, weight.dtype)

    def forward(self, h: Tensor) -> Tensor:
        z = Head(self.weight, self.bias, scales=self.scales).product(h.flatten(0, -2))
        return z.view(*h.shape[:-1], len(self.weight))


def keep_head_in_8_bits(model: Any, device: torch.device) -> str:
    """Quantise the output head; a table it shared with the embeddings stays theirs. Returns what was done."""
    layer = model.get_output_embeddings()
    if not layer.weight.is_floating_point():
        return "the output head is quantised already: left as it is"
    model.set_output_embeddings(EightBitHead(layer, device))
    return "the output head is in 8 bits"
