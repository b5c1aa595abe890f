"""Pad a batch without padding to one of few shapes, so that what was recorded for a shape can be used again."""

from __future__ import annotations

from dataclasses import replace

import torch

from qunlearn.data.batch import Batch, Layout

_SMALLEST_TOKENS, _SMALLEST_WIDTH = 64, 16


def bucketed(batch: Batch, pad_id: int) -> Batch:
    """Return a batch with a layout in the shape of its bucket, which follows from the batch alone.

    Tokens to a multiple of an eighth of their power of two (at most 12.5 % more, and at least 64), rows and their width
    to a power of two or one and a half times one. The tokens that are added have places of their own, which no token of
    the batch sees; nothing supervises them, so that they add nothing to any gradient. `batch` is on the CPU.
    """
    layout = batch.layout
    if layout is None:
        raise ValueError("only a batch with a layout has a bucket")
    count, (rows, width) = batch.input_ids.shape[1], layout.tokens.shape
    n, t = rounded_tokens(count), _rounded(max(width, _SMALLEST_WIDTH))
    b = _rounded(max(rows, -(-n // t)))
    more = n - count
    tokens = torch.zeros(b, t, dtype=torch.long)
    tokens[:rows, :width] = layout.tokens
    places = (layout.places // width) * t + layout.places % width
    free = torch.ones(b * t, dtype=torch.bool)
    free[places] = False
    spare = free.nonzero().squeeze(1)[:more]
    tokens.view(-1)[spare] = torch.arange(count, n)
    mask = None
    if layout.mask is not None:
        mask = torch.ones(t, t, dtype=torch.bool).tril().repeat(b, 1, 1, 1)
        mask[:rows, :, :width, :width] = layout.mask
    zeros = torch.zeros(1, more, dtype=torch.long)
    position = batch.position_ids if batch.position_ids is not None else torch.arange(count).unsqueeze(0)
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, zeros + pad_id], dim=1),
        position_ids=torch.cat([position, zeros], dim=1),
        layout=Layout(tokens, torch.cat([places, spare]), mask),
    )


def rounded_tokens(count: int) -> int:
    """Return the tokens of the bucket of so many."""
    count = max(count, _SMALLEST_TOKENS)
    part = max(1, (1 << (count.bit_length() - 1)) // 8)
    return -(-count // part) * part


def _rounded(count: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... that is not below `count`."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= count else power
