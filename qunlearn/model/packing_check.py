"""Find out by trying whether a model can compute several packed sequences in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qunlearn.data.batch import ALL, PrefixGroup, collate
from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example
from qunlearn.model.load import Base

_NOTHING = Record((), "", 0, {})


@dataclass(frozen=True)
class Packing:
    """The longest example (tokens) that may share a row with others, 0 where the model cannot keep them apart; and
    whether rows may lie end to end."""

    longest: int
    layouts: bool


def packing_of(base: Base) -> Packing:
    """Return what a model can do, by trial.

    It packs when it takes a 4-D mask and explicit position ids and then gives each example the hidden states it has in
    a row of its own, and it takes layouts when it does so with one of those. Behind a sliding window only examples
    shorter than the window are the same.
    """
    layouts = _keeps_apart(base, close_up=True)
    if not layouts and not _keeps_apart(base, close_up=False):
        return Packing(0, False)
    config = base.model.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return Packing(int(window) if window else 1 << 30, layouts)


@torch.no_grad()
def _keeps_apart(base: Base, *, close_up: bool) -> bool:
    """Compare packed rows with their examples alone, and with what the rows give when nothing keeps them apart."""
    examples = [_example(base, 1, branch) for branch in (5, 9)] + [_example(base, 3, 7)]
    rows = (
        [[PrefixGroup((0, 1), 6, 10)], [PrefixGroup((2,), 8, 8)]]
        if close_up
        else [[PrefixGroup((0, 1), 6, 10), PrefixGroup((2,), 8, 8)]]
    )
    pad = base.tokenizer.pad_token_id
    packed = collate(examples, ALL, pad, rows, close_up=close_up).to(base.device)
    alone = collate(examples, ALL, pad).to(base.device)
    training = base.model.training
    base.model.eval()
    try:
        ours, theirs = packed.pick(base.hidden(packed)).float(), alone.pick(base.hidden(alone)).float()
        mixed = packed.pick(base.hidden(replace(packed, mask=None, layout=None, position_ids=None))).float()
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    finally:
        base.model.train(training)
    return _distance(ours, theirs) <= 0.1 * _distance(mixed, theirs)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm())


def _example(base: Base, prompt: int, branch: int) -> Example:
    """Six tokens from `prompt` on and two from `branch` on, whatever they mean."""
    n = base.model.get_input_embeddings().weight.shape[0]
    ids: Sequence[int] = [(prompt * 17 + t) % n for t in range(6)] + [(branch * 23 + t) % n for t in range(2)]
    return Example(tuple(ids), 1, len(ids), 1, _NOTHING)
