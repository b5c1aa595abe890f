"""The common descent direction of several losses: MOLLM's, rebuilt as min-norm MGDA in the dual space.

The paper's own variant is not public; this solves the standard dual (Desideri 2012) for as many numbers as there are
losses, exactly, over gradients of length 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Total = Callable[[Sequence[float]], float]  # sums a number for each parameter, over all processes with parts of it

_NOTHING = 1e-12  # a gradient's length below which a loss has no say: KL to the base at the very start


def common_descent(
    gradients: Sequence[Sequence[Tensor]], total: Total | None = None
) -> tuple[list[Tensor], list[float]]:
    """(direction to subtract, share of each loss): gradients are scaled to length 1, so that a loss whose gradient
    vanishes where a model is certain (p -> 1) is heard as well as the others; the result has length 1.

    gradients: one list of tensors per loss; with `total` each is the part of it that this process holds.
    -> list of tensors, (losses,)
    """
    lengths = [_length(of_loss, total) for of_loss in gradients]
    heard = [i for i, length in enumerate(lengths) if length > _NOTHING]
    if not heard:
        return [torch.zeros_like(g) for g in gradients[0]], [0.0] * len(gradients)
    gram = torch.tensor(
        [[_dot(gradients[i], gradients[j], total) / (lengths[i] * lengths[j]) for j in heard] for i in heard],
        dtype=torch.float64,
    )
    shares = [0.0] * len(gradients)
    for i, share in zip(heard, min_norm_weights(gram), strict=True):
        shares[i] = share
    scales = [share / length if share else 0.0 for share, length in zip(shares, lengths, strict=True)]
    mixed = [sum((c * g for c, g in zip(scales, of_parameter, strict=True) if c), torch.zeros_like(of_parameter[0]))
             for of_parameter in zip(*gradients, strict=True)]  # fmt: skip
    length = _length(mixed, total)
    return [d / length for d in mixed] if length > 1e-6 else mixed, shares


def min_norm_weights(gram: Tensor) -> list[float]:
    """argmin l^T K l over l >= 0, sum l = 1, exactly: the best of the solutions on every face. K (n, n) float64."""
    best: tuple[float, list[float]] = (float("inf"), [])
    n = gram.shape[0]
    for size in range(1, n + 1):
        for face in itertools.combinations(range(n), size):
            k = gram[list(face)][:, list(face)] + 1e-12 * torch.eye(size, dtype=gram.dtype)
            u = torch.linalg.solve(k, torch.ones(size, dtype=gram.dtype))
            weights = u / u.sum()
            if bool((weights < -1e-12).any()) or not bool(torch.isfinite(weights).all()):
                continue
            full = [0.0] * n
            for i, w in zip(face, weights.tolist(), strict=True):
                full[i] = max(0.0, w)
            value = float(weights @ k @ weights)
            if value < best[0]:
                best = value, full
    return best[1]


def _length(tensors: Sequence[Tensor], total: Total | None) -> float:
    """Of all of them as one vector, on whatever devices they are."""
    norms = torch.stack([t.norm().to(tensors[0].device) for t in tensors])
    return float(norms.norm()) if total is None else math.sqrt(total(norms.double().square().tolist()))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor], total: Total | None) -> float:
    if total is not None:
        return total(torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).tolist())
    return float(sum((x.double() * y.double()).sum().to(a[0].device) for x, y in zip(a, b, strict=True)))
