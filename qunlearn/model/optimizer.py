"""The optimizer of the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from qunlearn.config import TrainConfig


def make_optimizer(parameters: Sequence[Tensor], c: TrainConfig, lr: float) -> Any:
    """AdamW as `c.optimizer` says: 32-bit state in one fused kernel, or 8-bit state, paged or not."""
    if c.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=c.weight_decay, fused=True)
    paged = c.optimizer == "paged_adamw8bit" and parameters[0].is_cuda  # on a CPU there is nothing to page from
    kind = bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit
    return kind(parameters, lr=lr, weight_decay=c.weight_decay)
