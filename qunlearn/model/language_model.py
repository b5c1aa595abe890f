"""The protocol that generation, evaluation and `ask` speak: a model, its tokenizer, its hidden states."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from qunlearn.data.batch import Batch
from qunlearn.model.head import Head


class LanguageModel(Protocol):
    """What scoring and generation need: a bare base offers it, and so does a policy."""

    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def head(self) -> Head: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def cache_bytes(self) -> int: ...
    def hidden(self, batch: Batch) -> Tensor: ...
