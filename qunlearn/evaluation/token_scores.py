"""Compute per token what evaluation needs of the distribution over the vocabulary, without storing it.

Tiles over tokens: at no time are there more than a few tiles' logits (32 MiB each), whatever the data and vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qunlearn.model.head import Head

# Numbers of fp32 logits per tile: 32 MiB.
_TILE_LOGITS = 1 << 23


@dataclass(frozen=True)
class TokenScores:
    """Per token, all (N,), on the CPU.

    `logps`: log-probability of the true token. `hits`: it is the model's first choice. `means`, `stds`: mean and
    standard deviation of log p(v) over the vocabulary, v drawn from the model itself (Min-K++).
    """

    logps: Tensor  # float64
    hits: Tensor  # bool
    means: Tensor  # float64
    stds: Tensor  # float64


@torch.no_grad()
def token_scores(h: Tensor, labels: Tensor, head: Head) -> TokenScores:
    """Scores of each label under its position's distribution. h (N, D), labels (N,)."""
    size = max(1, _TILE_LOGITS // head.weight.shape[0])
    parts = [_tile(a, b, head) for a, b in zip(torch.split(h, size), torch.split(labels, size), strict=True)]
    return TokenScores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _tile(h: Tensor, labels: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_p = head.logits(h).float().log_softmax(dim=1)  # (n, V)
    p = log_p.exp()
    # 0 * -inf for a token that a head rules out altogether.
    means = torch.nan_to_num(p * log_p).sum(dim=1)
    stds = torch.nan_to_num(p * (log_p - means.unsqueeze(1)).square()).sum(dim=1).sqrt()
    logps = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    # Equal first choices all count, so that the answer does not hang on the order of the vocabulary.
    hits = logps >= log_p.max(dim=1).values
    return logps.double().cpu(), hits.cpu(), means.double().cpu(), stds.double().cpu()
