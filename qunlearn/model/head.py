"""The output head, and the primitives that stand between hidden states and every loss.

Nothing else in the package touches logits. They exist for one tile of tokens at a time, on supervised positions only:
each primitive's gradient with respect to the hidden states is formed while its tile's logits are there, in their place,
so that the backward pass scales (N, D) numbers and N x V numbers are never kept, nor computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from qunlearn.memory.tiles import HEAD_BLOCK, block_tokens, restored_rows, tile_tokens

# Of an fp32 head on a CPU: a product of so many columns at a time takes 0.6 to 1 of what all at once take (docs/log.md,
# 2026-11-26).
_ROWS_AT_ONCE = 512

# Of a block's logits (n, V) and the reference's, both of which it may overwrite, and its tokens: the values (n,) and,
# where wanted, d value / d z.
_OfBlock = Callable[[Tensor, Tensor, slice, bool], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Scales:
    """What bitsandbytes' 8-bit codes mean: an absmax for each HEAD_BLOCK of them, and the value of each code."""

    absmax: Tensor  # (V D / HEAD_BLOCK,) fp32
    code: Tensor  # (256,) fp32
    dtype: torch.dtype  # of the weights they stand for

    def restore(self, codes: Tensor, rows: slice) -> Tensor:
        """Some rows of W from codes (V, D) -> (n, D); the first of them begins a block."""
        first, end = rows.start * codes.shape[1] // HEAD_BLOCK, -(-rows.stop * codes.shape[1] // HEAD_BLOCK)
        state = bnb.QuantState(self.absmax[first:end], code=self.code, blocksize=HEAD_BLOCK, dtype=self.dtype)
        weight: Tensor = bnb.dequantize_blockwise(codes[rows], state)
        return weight


@dataclass(frozen=True)
class Head:
    """A frozen output projection: `logits = soft_cap(scale * (h W^T + b))`.

    `scale` covers Cohere's `logit_scale` and Granite's `logits_scaling`; `soft_cap` Gemma-2's tanh. With `scales` the
    weight is in 8 bits, and is restored some rows at a time.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float = 1.0
    soft_cap: float | None = None
    scales: Scales | None = None

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
            getattr(layer, "scales", None),
        )

    @property
    def vocabulary(self) -> int:
        return int(self.weight.shape[0])

    def logits(self, h: Tensor) -> Tensor:
        """(N, D) -> (N, V) in fp32; the product itself in the weight's precision."""
        return self.of_product(self.product(h))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its products."""
        return self.weight.dtype if self.scales is None else self.scales.dtype

    def product(self, h: Tensor, *, biased: bool = True) -> Tensor:
        """h W^T + b: (N, D) -> (N, V) in the weight's precision."""
        h, bias = h.to(self.dtype), self.bias if biased else None
        trained = torch.is_grad_enabled() and h.requires_grad  # never here; a model's own loss may want it
        if trained or (self.scales is None and self._rows_at_once >= self.vocabulary):
            w = self.weight if self.scales is None else self.scales.restore(self.weight, slice(0, self.vocabulary))
            return torch.nn.functional.linear(h, w, bias)
        z = h.new_empty(len(h), self.vocabulary)
        for rows, w in self._parts():
            torch.mm(h, w.T, out=z[:, rows])
            del w  # before the next rows are restored
        return z if bias is None else z.add_(bias)

    def product_back(self, dz: Tensor) -> Tensor:
        """dz W, what a product's gradient is to h: (N, V) -> (N, D), in the weight's precision or in fp32."""
        if self.scales is None:
            return dz @ self.weight
        dh = dz.new_zeros(len(dz), self.weight.shape[1], dtype=torch.float32)
        for rows, w in self._parts():
            dh += dz[:, rows] @ w
            del w
        return dh

    @property
    def _rows_at_once(self) -> int:
        """Rows of the weight that are multiplied at once."""
        if self.scales is not None:
            return restored_rows(self.weight.shape[1], self.dtype.itemsize)
        in_pieces = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        return _ROWS_AT_ONCE if in_pieces else self.vocabulary

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight by rows (n, D), in the precision that multiplies."""
        for rows in _slices(self.vocabulary, self._rows_at_once):
            yield rows, self.weight[rows] if self.scales is None else self.scales.restore(self.weight, rows)

    def of_product(self, z: Tensor) -> Tensor:
        """The logits of a product, (n, V) -> (n, V) in fp32: the same memory where there is nothing to do."""
        z = z.float()
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

    def of_block(z: Tensor, z_ref: Tensor, tokens: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        y = labels[tokens].unsqueeze(1)
        lse = z.logsumexp(dim=1, keepdim=True)
        value = (z.gather(1, y) - lse).squeeze(1)
        if not wanted:
            return value, None
        dz = z.sub_(lse).exp_().neg_()  # onehot(y) - softmax(z)
        return value, dz.scatter_add_(1, y, torch.ones_like(y, dtype=dz.dtype))

    return _per_token(h, None, head, of_block)


def token_log_odds(h: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Log odds of each label, log p - log(1 - p) = z_y - logsumexp of the others. h (N, D), labels (N,) -> (N,) fp32.

    Its gradient to the logits does not vanish where p is 1: onehot(y) - softmax over the others.
    """

    def of_block(z: Tensor, z_ref: Tensor, tokens: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        y = labels[tokens].unsqueeze(1)
        own = z.gather(1, y)
        rest = z.scatter_(1, y, -torch.inf)
        lse = rest.logsumexp(dim=1, keepdim=True)
        value = (own - lse).squeeze(1)
        if not wanted:
            return value, None
        dz = rest.sub_(lse).exp_().neg_()
        return value, dz.scatter_(1, y, torch.ones_like(y, dtype=dz.dtype))

    return _per_token(h, None, head, of_block)


def token_kl(h: Tensor, h_ref: Tensor, head: Head) -> Tensor:
    """Forward KL(reference || policy) at each position. h, h_ref (N, D) -> (N,) fp32, no gradient to h_ref.

    In half precision the policy's logits are the reference's plus (h - h_ref) W^T: rounded apart from each other they
    differ by more than a small drift does, and the gradient would be noise.
    """

    def of_block(z: Tensor, z_ref: Tensor, tokens: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        log_q = z.sub_(z.logsumexp(dim=1, keepdim=True))
        log_p = z_ref.sub_(z_ref.logsumexp(dim=1, keepdim=True))
        p = log_p.exp()
        value = torch.linalg.vecdot(p, log_p.sub_(log_q))
        return value, log_q.exp_().sub_(p) if wanted else None  # q - p

    return _per_token(h, h_ref, head, of_block, as_difference=head.dtype != torch.float32)


def token_soft_ce(
    h: Tensor, h_ref: Tensor, labels: Tensor, head: Head, target: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Cross-entropy -sum_v t_v log q_v against a target made of the reference's logits.

    `target(z_ref (n, V), labels (n,)) -> t (n, V)`, weights that need not sum to 1. h, h_ref (N, D) -> (N,) fp32.
    """

    def of_block(z: Tensor, z_ref: Tensor, tokens: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        log_q = z.sub_(z.logsumexp(dim=1, keepdim=True))
        t = target(z_ref, labels[tokens])
        value = -torch.linalg.vecdot(t, log_q)
        if not wanted:
            return value, None
        return value, log_q.exp_().mul_(t.sum(dim=1, keepdim=True)).sub_(t)  # q sum(t) - t

    return _per_token(h, h_ref, head, of_block)


def token_range(h: Tensor, head: Head) -> Tensor:
    """(max_v z_v - mean_v z_v)^2 of each position's logits. h (N, D) -> (N,) fp32."""

    def of_block(z: Tensor, z_ref: Tensor, tokens: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        top, first = z.max(dim=1, keepdim=True)
        gap = top - z.mean(dim=1, keepdim=True)
        if not wanted:
            return gap.square().squeeze(1), None
        dz = (-2 * gap / z.shape[1]).expand_as(z).contiguous()
        return gap.square().squeeze(1), dz.scatter_add_(1, first, 2 * gap)

    return _per_token(h, None, head, of_block)


def _per_token(
    h: Tensor, h_ref: Tensor | None, head: Head, of_block: _OfBlock, *, as_difference: bool = False
) -> Tensor:
    return _PerToken.apply(h, h_ref, head, of_block, as_difference)  # type: ignore[no-any-return, no-untyped-call]


class _PerToken(torch.autograd.Function):
    """(N, D) -> (N,): a function of each token's logits whose gradient is ready when its value is.

    With `as_difference` the product of h is that of h_ref plus that of their difference, added in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, h_ref: Tensor | None, head: Head, of_block: _OfBlock, as_difference: bool
    ) -> Tensor:
        wanted = bool(ctx.needs_input_grad[0])
        values = h.new_empty(h.shape[0], dtype=torch.float32)
        gradient = torch.empty_like(h) if wanted else None
        gpu = head.weight.device.type == "cuda"
        for tokens in _slices(h.shape[0], tile_tokens(head.vocabulary, head.dtype.itemsize, on_gpu=gpu)):
            reference = None if h_ref is None else head.product(h_ref[tokens])
            if h_ref is not None and as_difference:
                product = head.product(h[tokens] - h_ref[tokens], biased=False)
            else:
                product = head.product(h[tokens])
            for part in _slices(len(product), block_tokens(head.vocabulary, on_gpu=gpu)):
                where = slice(tokens.start + part.start, tokens.start + part.stop)
                theirs = None if reference is None else reference[part]
                values[where] = _replace(product[part], theirs, as_difference, where, head, of_block, wanted)
            if gradient is not None:
                gradient[tokens] = head.product_back(product).to(h.dtype)
            del product, reference, theirs  # before the next tile is made: else both are there at once
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.unsqueeze(1).to(gradient.dtype), None, None, None, None


def _replace(
    product: Tensor, reference: Tensor | None, apart: bool, tokens: slice, head: Head, of_block: _OfBlock, wanted: bool
) -> Tensor:
    """The values (n,) of a block; where wanted, their gradient takes the place of the product (n, V).

    `apart`: the product is what comes to the reference's.
    """
    z = head.of_product(product.float().add_(reference) if apart and reference is not None else product)
    z_ref = z if reference is None else head.of_product(reference)
    slope = head.slope(z) if wanted else None  # before z is overwritten
    values, dz = of_block(z, z_ref, tokens, wanted)
    if dz is not None:
        dz = dz if slope is None else dz.mul_(slope)
        if dz.data_ptr() != product.data_ptr():
            product.copy_(dz)
    return values


def _slices(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`."""
    for start in range(0, length, size):
        yield slice(start, min(length, start + size))
