"""Tell the library's `generate` when to break a batch off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

_FEWEST_ROWS = 16  # of a batch that is broken off for the sake of those that go on: fewer are no faster either


class HalfDone(StoppingCriteria):  # type: ignore[misc]
    """Whether at least half of many rows, or all of a few, have ended: with a token, or with a text in their last ones.

    `width` tokens of each row are its prompt.
    """

    def __init__(self, tokenizer: Any, stop: Iterable[int], text: str, width: int, device: torch.device) -> None:
        self.stop = torch.tensor(sorted(stop), device=device)
        self.tokenizer, self.text, self.width = tokenizer, text, width
        self.tail = len(text.encode()) + 1  # no token of it is less than a byte
        self._said: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[:, self.width :]
        is_large = len(new) > _FEWEST_ROWS
        ended = torch.isin(new, self.stop).any(-1)
        if self.text:
            ended |= self._have_said(new)
        elif not is_large:  # the library itself ends it with the last token
            return torch.zeros_like(ended)
        return torch.full_like(ended, (1 + is_large) * int(ended.sum()) >= len(ended))

    def _have_said(self, new: Tensor) -> Tensor:
        """Return of which rows the text was at the end of what they said at some time, (R, T) -> (R,)."""
        last = self.tokenizer.batch_decode(new[:, -self.tail :])
        now = torch.tensor([self.text in said for said in last], device=new.device)
        self._said = now if self._said is None else self._said | now
        return self._said
