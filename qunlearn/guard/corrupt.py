"""Corrupt the embeddings of prompt tokens: the functions of ECO (arXiv 2406.07933) as rows of a table.

Each takes embeddings e (N, D) in float32, a strength, how many dimensions k it touches, and a seeded generator; it
returns (N, D) and leaves its input as it is. N are the corrupted tokens of one prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from qunlearn.errors import GuardError

Function = Callable[[Tensor, float, int, Generator], Tensor]


def noise_first(e: Tensor, sigma: float, k: int, rng: Generator) -> Tensor:
    """Add N(0, sigma^2) to the first k dimensions: the published main setting, with k = 1."""
    return _put(e, _first(e, k), lambda x: x + sigma * _normal(x, rng))


def noise_random(e: Tensor, sigma: float, k: int, rng: Generator) -> Tensor:
    """Add N(0, sigma^2) to k dimensions drawn once for the prompt."""
    drawn = torch.randperm(e.shape[-1], generator=rng)[:k]
    return _put(e, drawn.expand(len(e), -1), lambda x: x + sigma * _normal(x, rng))


def noise_top(e: Tensor, sigma: float, k: int, rng: Generator) -> Tensor:
    """Add N(0, sigma^2) to the k dimensions of each token that are largest in size."""
    return _put(e, _top(e, k), lambda x: x + sigma * _normal(x, rng))


def set_noise_first(e: Tensor, sigma: float, k: int, rng: Generator) -> Tensor:
    """Put N(0, sigma^2) in place of the first k dimensions."""
    return _put(e, _first(e, k), lambda x: sigma * _normal(x, rng))


def add_first(e: Tensor, sigma: float, k: int, rng: Generator) -> Tensor:
    """Add the strength itself to the first k dimensions."""
    return _put(e, _first(e, k), lambda x: x + sigma)


def zero_first(e: Tensor, sigma: float, k: int, rng: Generator) -> Tensor:
    """Set the first k dimensions to 0."""
    return _put(e, _first(e, k), torch.zeros_like)


def zero_top(e: Tensor, sigma: float, k: int, rng: Generator) -> Tensor:
    """Set the k dimensions of each token that are largest in size to 0."""
    return _put(e, _top(e, k), torch.zeros_like)


def flip_first(e: Tensor, sigma: float, k: int, rng: Generator) -> Tensor:
    """Change the sign of the first k dimensions."""
    return _put(e, _first(e, k), torch.neg)


def flip_top(e: Tensor, sigma: float, k: int, rng: Generator) -> Tensor:
    """Change the sign of the k dimensions of each token that are largest in size."""
    return _put(e, _top(e, k), torch.neg)


def reverse_order(e: Tensor, sigma: float, k: int, rng: Generator) -> Tensor:
    """Put the tokens' embeddings in the opposite order."""
    return e.flip(0)


def shuffle(e: Tensor, sigma: float, k: int, rng: Generator) -> Tensor:
    """Put the tokens' embeddings in a drawn order, which is never the old one."""
    order = torch.randperm(len(e), generator=rng)
    if torch.equal(order, torch.arange(len(e))):
        order = order.roll(1)
    return e[order.to(e.device)]


@dataclass(frozen=True)
class Row:
    """A function of the table; `strength` is whether it has one, `dims` whether it touches k dimensions."""

    function: Function
    strength: bool
    dims: bool = True

    @property
    def about(self) -> str:
        return (self.function.__doc__ or "").split("\n")[0].rstrip(".")


CORRUPTIONS: Mapping[str, Row] = {
    "noise-first": Row(noise_first, True),
    "noise-random": Row(noise_random, True),
    "noise-top": Row(noise_top, True),
    "set-noise-first": Row(set_noise_first, True),
    "add-first": Row(add_first, True),
    "zero-first": Row(zero_first, False),
    "zero-top": Row(zero_top, False),
    "flip-first": Row(flip_first, False),
    "flip-top": Row(flip_top, False),
    "reverse-order": Row(reverse_order, False, False),
    "shuffle": Row(shuffle, False, False),
}


@dataclass(frozen=True)
class Corruption:
    """What is done to the tokens of a flagged prompt: a row of the table, with its strength, dimensions and seed."""

    name: str = "noise-first"
    strength: float = 1.0
    dims: int = 1
    seed: int = 0

    def apply(self, embeddings: Tensor, places: Sequence[int], ids: Sequence[int]) -> Tensor:
        """Return a prompt's embeddings (T, D) with those at `places` corrupted.

        `ids` are the prompt's tokens: with the seed they decide the noise, so that asking again brings the same and
        averages nothing away. Raises GuardError where the embeddings' dtype cannot hold the result.
        """
        where = torch.tensor(list(places), device=embeddings.device)
        drawn = noise_seed(self.seed, ids)
        row = CORRUPTIONS[self.name]
        made = row.function(embeddings[where].float(), self.strength, self.dims, Generator().manual_seed(drawn))
        if float(made.detach().abs().max()) > torch.finfo(embeddings.dtype).max:
            raise overflow(self.strength, embeddings.dtype)
        out = embeddings.clone()
        out[where] = made.to(embeddings.dtype)
        return out


def overflow(strength: float, dtype: torch.dtype) -> GuardError:
    """Return the error for a strength that a dtype cannot hold: fp16 ends at 65,504."""
    message = f"a strength of {strength:.3g} overflows {str(dtype).removeprefix('torch.')}"
    return GuardError(message, where="corruption", hint="fit again with a smaller --strength, or load in bf16 or fp32")


def noise_seed(seed: int, ids: Sequence[int]) -> int:
    """Return the seed of a prompt's noise, from its token ids and the guard's seed."""
    text = f"{seed}:" + ",".join(map(str, ids))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _first(e: Tensor, k: int) -> Tensor:
    return torch.arange(min(k, e.shape[-1])).expand(len(e), -1)


def _top(e: Tensor, k: int) -> Tensor:
    return e.abs().topk(min(k, e.shape[-1]), dim=-1).indices


def _normal(x: Tensor, rng: Generator) -> Tensor:
    """Draw on the CPU, so that every device gets the same."""
    return torch.randn(x.shape, generator=rng).to(x.device)


def _put(e: Tensor, dims: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the given dimensions (N, k) of each token."""
    dims = dims.to(e.device)
    return e.scatter(-1, dims, change(e.gather(-1, dims)))
