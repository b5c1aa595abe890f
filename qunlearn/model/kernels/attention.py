"""Padding-free attention: sequences are concatenated for every layer but attention, which pads and un-pads.

A pass of ragged rows is one long row of tokens to every linear layer, norm and embedding. Only attention needs the
rows apart; it lays its queries, keys and values out with padding, and closes the result up again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qunlearn.data.batch import Batch, Layout

# Under this name transformers' registries know it. Where no layout is given it is their own `sdpa`.
NAME = "qunlearn_rows"


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    layout: Layout | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """Scaled dot product attention: query (1, H, N, d), key and value (1, H_kv, N, d) -> (1, N, H, d), the mask being
    the layout's. Without a layout transformers' own, (B, H, T, d) -> (B, T, H, d)."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, mask, **how)  # type: ignore[no-any-return]
    query, key, value = (_spread(x, layout) for x in (query, key, value))
    out, _ = sdpa_attention_forward(module, query, key, value, layout.bias(query.dtype), **how)
    return _Closed.apply(out.flatten(0, 1), layout.places).unsqueeze(0), None  # type: ignore[no-untyped-call]


def layout_arguments(batch: Batch) -> dict[str, Any]:
    """Return what a model's forward is given besides the tokens of a batch with a layout."""
    # A mask of four dimensions goes through as it is; with none the model would make one, of all tokens by all.
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    return {"attention_mask": unused, "position_ids": batch.position_ids, "layout": batch.layout}


def use_layouts(model: Any) -> None:
    """Let a transformers model take layouts, where it computes attention by `sdpa` and through their interface."""
    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def _spread(x: Tensor, layout: Layout) -> Tensor:
    """(1, H, N, d) -> (B, H, T, d)."""
    spread = _Spread.apply(x.squeeze(0).transpose(0, 1), layout.tokens.flatten(), layout.places)  # type: ignore[no-untyped-call]
    return spread.unflatten(0, layout.tokens.shape).transpose(1, 2)  # type: ignore[no-any-return]


class _Spread(torch.autograd.Function):
    """(N, ...) -> (B * T, ...). What padding repeats has no gradient: nothing that counts sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


class _Closed(torch.autograd.Function):
    """(B * T, ...) -> (N, ...): padding left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.length = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        spread = gradient.new_zeros(ctx.length, *gradient.shape[1:])
        return spread.index_copy_(0, places, gradient), None
