"""Find the names in a prompt by a model that tags tokens (named-entity recognition): which of its tokens to corrupt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qunlearn.guard.encoder import Encoder
from qunlearn.guard.lexicon import Span

_OUTSIDE = "O"  # the label of what is in no name


@dataclass(frozen=True)
class Tagger:
    """A token classifier whose labels are `O` and the kinds of names."""

    encoder: Encoder

    @torch.no_grad()
    def names(self, text: str, device: torch.device) -> list[Span]:
        """Return the characters of every token that is tagged as part of a name."""
        self.encoder.model.to(device)
        windows = self.encoder.windows([text])
        labels = self.encoder.model.config.id2label
        found: set[Span] = set()
        for places, batch in self.encoder.batches(windows):
            tags = self.encoder.model(**batch).logits.argmax(-1).tolist()
            for at, row in zip(places, tags, strict=True):
                found |= {span for span, tag in _tagged(windows, at, row) if labels[tag] != _OUTSIDE}
        return sorted(found)


def _tagged(windows: dict[str, Any], at: int, tags: list[int]) -> Iterator[tuple[Span, int]]:
    """Yield the characters and tag of each token of a window, without those that the tokenizer has added."""
    spans, special = windows["offset_mapping"][at], windows["special_tokens_mask"][at]
    for span, added, tag in zip(spans, special, tags[: len(special)], strict=True):
        if not added and span[1] > span[0]:
            yield (span[0], span[1]), tag
