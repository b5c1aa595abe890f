"""The output head, and the primitives that stand between hidden states and every loss.

Nothing else in the package touches logits. They exist for one tile of tokens at a time, on supervised positions only:
each primitive's gradient with respect to the hidden states is formed while its tile's logits are there, so that the
backward pass scales (N, D) numbers and N x V numbers are never kept, nor computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Numbers of fp32 logits per tile: 16 MiB, whatever the vocabulary. A primitive holds two or three such tiles.
_TILE_LOGITS = 1 << 22

# Of a tile's logits (n, V), which it may overwrite, and its tokens: the values (n,) and, where wanted, d value / d z.
_OfTile = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]


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
        """(N, D) -> (N, V) in fp32; the product itself in the weight's precision."""
        z = torch.nn.functional.linear(h.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            z = z * self.scale
        if self.soft_cap is not None:
            z = self.soft_cap * torch.tanh(z / self.soft_cap)
        return z

    def slope(self, z: Tensor) -> Tensor | None:
        """d logits / d (h W^T) at logits z (n, V): None where it is 1."""
        if self.soft_cap is not None:
            return (1 - (z / self.soft_cap) ** 2) * self.scale
        return None if self.scale == 1.0 else torch.full((), self.scale, device=z.device)


def token_logps(h: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Log-probability of each label. h (N, D), labels (N,) -> (N,) fp32."""

    def of_tile(z: Tensor, tokens: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        y = labels[tokens].unsqueeze(1)
        lse = z.logsumexp(dim=1, keepdim=True)
        value = (z.gather(1, y) - lse).squeeze(1)
        if not wanted:
            return value, None
        dz = z.sub_(lse).exp_().neg_()  # onehot(y) - softmax(z)
        return value, dz.scatter_add_(1, y, torch.ones_like(y, dtype=dz.dtype))

    return _per_token(h, head, of_tile)


def token_kl(h: Tensor, h_ref: Tensor, head: Head) -> Tensor:
    """Forward KL(reference || policy) at each position. h, h_ref (N, D) -> (N,) fp32, no gradient to h_ref."""

    def of_tile(z: Tensor, tokens: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        log_q = z.sub_(z.logsumexp(dim=1, keepdim=True))
        log_p = head.logits(h_ref[tokens])
        log_p.sub_(log_p.logsumexp(dim=1, keepdim=True))
        p = log_p.exp()
        value = torch.linalg.vecdot(p, log_p.sub_(log_q))
        return value, log_q.exp_().sub_(p) if wanted else None  # q - p

    return _per_token(h, head, of_tile)


def token_soft_ce(
    h: Tensor, h_ref: Tensor, labels: Tensor, head: Head, target: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Cross-entropy -sum_v t_v log q_v against a target made of the reference's logits.

    `target(z_ref (n, V), labels (n,)) -> t (n, V)`, weights that need not sum to 1. h, h_ref (N, D) -> (N,) fp32.
    """

    def of_tile(z: Tensor, tokens: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        log_q = z.sub_(z.logsumexp(dim=1, keepdim=True))
        t = target(head.logits(h_ref[tokens]), labels[tokens])
        value = -torch.linalg.vecdot(t, log_q)
        if not wanted:
            return value, None
        return value, log_q.exp_().mul_(t.sum(dim=1, keepdim=True)).sub_(t)  # q sum(t) - t

    return _per_token(h, head, of_tile)


def token_range(h: Tensor, head: Head) -> Tensor:
    """(max_v z_v - mean_v z_v)^2 of each position's logits. h (N, D) -> (N,) fp32."""

    def of_tile(z: Tensor, tokens: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        top, first = z.max(dim=1, keepdim=True)
        gap = top - z.mean(dim=1, keepdim=True)
        if not wanted:
            return gap.square().squeeze(1), None
        dz = (-2 * gap / z.shape[1]).expand_as(z).contiguous()
        return gap.square().squeeze(1), dz.scatter_add_(1, first, 2 * gap)

    return _per_token(h, head, of_tile)


def _per_token(h: Tensor, head: Head, of_tile: _OfTile) -> Tensor:
    return _PerToken.apply(h, head, of_tile)  # type: ignore[no-any-return, no-untyped-call]


class _PerToken(torch.autograd.Function):
    """(N, D) -> (N,): a function of each token's logits whose gradient is ready when its value is."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, head: Head, of_tile: _OfTile) -> Tensor:
        wanted = bool(ctx.needs_input_grad[0])
        values = h.new_empty(h.shape[0], dtype=torch.float32)
        gradient = torch.empty_like(h) if wanted else None
        size = max(1, _TILE_LOGITS // head.vocabulary)
        for start in range(0, h.shape[0], size):
            tokens = slice(start, start + size)
            z = head.logits(h[tokens])
            slope = head.slope(z) if wanted else None  # before z is overwritten
            values[tokens], dz = of_tile(z, tokens, wanted)
            if gradient is not None and dz is not None:
                if slope is not None:
                    dz.mul_(slope)
                gradient[tokens] = (dz.to(head.weight.dtype) @ head.weight).to(h.dtype)
            del z, dz, slope  # before the next tile is made: else both are there at once
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.unsqueeze(1).to(gradient.dtype), None, None
