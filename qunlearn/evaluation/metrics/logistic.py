"""Fit L2-regularised logistic regressions: convex, so that the same rows always bring the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
_ITERATIONS = 200


def logistic(
    x: Any, labels: Vector, importance: Vector, decay: float, *, nonnegative: bool = False
) -> tuple[Vector, float]:
    """Return weights (D,) and intercept that minimise importance-weighted cross-entropy plus decay / 2 * ||w||^2.

    x: (N, D), dense or scipy-sparse; labels in {0, 1}; importance sums to 1. The intercept is not decayed. With
    `nonnegative` no feature can speak for label 0. Solved by L-BFGS-B in float64 (Byrd et al. 1995).
    """
    from scipy.optimize import minimize

    turned = x.T.tocsr() if hasattr(x, "tocsr") else x.T

    def loss(p: Vector) -> tuple[float, Vector]:
        w, z = p[:-1], x @ p[:-1] + p[-1]
        pull = importance * (0.5 * (1 + np.tanh(z / 2)) - labels)
        value = importance @ (np.logaddexp(0, z) - labels * z) + 0.5 * decay * w @ w
        return float(value), np.append(turned @ pull + decay * w, pull.sum())

    bounds = [(0.0 if nonnegative else None, None)] * x.shape[1] + [(None, None)]
    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", bounds=bounds,
                     options={"maxiter": _ITERATIONS})  # fmt: skip
    return found.x[:-1], float(found.x[-1])


def balanced(labels: Vector) -> Vector:
    """Return an importance for each row so that both labels weigh one half."""
    ones = labels.sum()
    return np.asarray(np.where(labels > 0, 0.5 / max(ones, 1), 0.5 / max(len(labels) - ones, 1)), np.float64)
