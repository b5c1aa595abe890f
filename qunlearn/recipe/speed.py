"""Measure how fast this machine multiplies, at best."""

from __future__ import annotations

import time

import torch

from qunlearn.model.device import choose_device, choose_dtype

_SECONDS = 0.2


def measured_flops(asked: str) -> float:
    """Floating-point operations a second of a large matrix product, in the type that a run computes in here."""
    device = choose_device(asked)
    n = 4096 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=choose_dtype(device))

    def spent(rounds: int) -> float:
        started = time.perf_counter()
        for _ in range(rounds):
            product = a @ a
        float(product[0, 0])  # waits for a GPU to finish
        return time.perf_counter() - started

    spent(1)
    rounds = max(1, round(_SECONDS / spent(1)))
    return 2.0 * n**3 * rounds / spent(rounds)
