"""Padding and the one place where labels are shifted and masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qunlearn.data.tokenize import Example


@dataclass(frozen=True)
class Batch:
    """Right-padded rows and the positions that are supervised.

    `predict[b, t]` says that the token after position t of row b is supervised; `labels` are those next
    tokens and `rows` their rows, both in row-major order of `predict`.
    """

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    predict: Tensor  # (B, T) bool
    labels: Tensor  # (N,)
    rows: Tensor  # (N,)

    @property
    def supervised_tokens(self) -> int:
        return int(self.labels.numel())

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Span:
    """Which tokens of an example are supervised: `answer`, `closed` (answer and closing), or `all` of them."""

    name: str

    def of(self, example: Example) -> tuple[int, int]:
        if self.name == "all":
            return 1, len(example.input_ids)
        return example.start, example.end if self.name == "answer" else len(example.input_ids)


ANSWER, CLOSED, ALL = Span("answer"), Span("closed"), Span("all")


def collate(examples: Sequence[Example], span: Span | Sequence[Span], pad_id: int) -> Batch:
    """Pad to the longest row and mark what is supervised: one span for all, or one for each. Shapes as in `Batch`."""
    spans = [span] * len(examples) if isinstance(span, Span) else span
    width = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    predict = torch.zeros_like(ids, dtype=torch.bool)
    for i, example in enumerate(examples):
        n = len(example.input_ids)
        ids[i, :n] = torch.tensor(example.input_ids)
        mask[i, :n] = 1
        first, last = spans[i].of(example)
        predict[i, max(first, 1) - 1 : last - 1] = True
    following = torch.roll(ids, shifts=-1, dims=1)
    rows = torch.arange(len(examples)).unsqueeze(1).expand_as(ids)
    return Batch(ids, mask, predict, following[predict], rows[predict])


def micro_batches(examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Indices of `examples` in groups of similar length, each at most `max_tokens` with its padding.

    A row longer than `max_tokens` makes a group of its own. The longest group comes first, so that running
    out of memory shows at once.
    """
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].input_ids), i))
    groups: list[list[int]] = []
    for i in order:
        if groups and len(examples[groups[-1][0]].input_ids) * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
