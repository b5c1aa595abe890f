"""The output head, and the primitives that stand between hidden states and every loss.

Nothing else in the package touches logits. Supervised positions only, in tiles over tokens whose logits are
recomputed in the backward pass, so that N x V numbers are never kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Numbers of fp32 logits per tile: 32 MiB, whatever the vocabulary.
_TILE_LOGITS = 1 << 23


@dataclass(frozen=True)
class Head:
    """A frozen output projection: `logits = soft_cap(scale * (h W^T + b))`.

    `scale` covers Cohere's `logit_scale` and Granite's `logits_scaling`; `soft_cap` Gemma-2's tanh.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a transformers causal language model, with what its config does to the logits."""
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(
            layer.weight,
            getattr(layer, "bias", None),
            scale,
            getattr(config, "final_logit_softcapping", None),
        )

    @property
    def vocabulary(self) -> int:
        return int(self.weight.shape[0])

    def logits(self, h: Tensor) -> Tensor:
        """(N, D) -> (N, V) in fp32."""
        z = torch.nn.functional.linear(h.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            z = z * self.scale
        if self.soft_cap is not None:
            z = self.soft_cap * torch.tanh(z / self.soft_cap)
        return z


def token_logps(h: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Log-probability of each label. h (N, D), labels (N,) -> (N,) fp32."""

    def tile(h: Tensor, y: Tensor) -> Tensor:
        z = head.logits(h)
        return z.gather(1, y.unsqueeze(1)).squeeze(1) - z.logsumexp(dim=1)

    return _tiled(tile, head, h, labels)


def token_kl(h: Tensor, h_ref: Tensor, head: Head) -> Tensor:
    """Forward KL(reference || policy) at each position. h, h_ref (N, D) -> (N,) fp32, no gradient to h_ref."""

    def tile(h: Tensor, h_ref: Tensor) -> Tensor:
        log_q = head.logits(h).log_softmax(dim=1)
        with torch.no_grad():
            log_p = head.logits(h_ref).log_softmax(dim=1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1)

    return _tiled(tile, head, h, h_ref.detach())


def _tiled(tile: Callable[[Tensor, Tensor], Tensor], head: Head, h: Tensor, other: Tensor) -> Tensor:
    size = max(1, _TILE_LOGITS // head.weight.shape[0])
    if h.shape[0] == 0:
        return h.sum(dim=1).float()
    parts = zip(torch.split(h, size), torch.split(other, size), strict=True)
    if torch.is_grad_enabled() and h.requires_grad:
        return torch.cat([checkpoint(tile, a, b, use_reentrant=False) for a, b in parts])
    return torch.cat([tile(a, b) for a, b in parts])
