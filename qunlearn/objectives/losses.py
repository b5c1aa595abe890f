"""A page of equations: what is minimised on each role of the data, per supervised token and unreduced.

LLMU is Yao, Xu, Liu, "Large Language Model Unlearning", arXiv 2310.10683.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qunlearn.model.head import Head, token_kl, token_logps


@dataclass(frozen=True)
class Supervised:
    """What a loss sees of one role: the supervised positions and nothing else."""

    h: Tensor  # (N, D) policy
    h_ref: Tensor | None  # (N, D) reference, where the loss needs it
    labels: Tensor  # (N,)
    head: Head


def ascent(s: Supervised, floor_nll: float) -> Tensor:
    """Gradient ascent on the bad answer: log p, minimised (LLMU Eq. 2-3, L_fgt).

    Unbounded below, so a token whose NLL has passed `floor_nll` is no longer pushed: its gradient is zero.
    `inf` is the paper's own, unguarded form. -> (N,)
    """
    return token_logps(s.h, s.labels, s.head).clamp(min=-floor_nll)


def nll(s: Supervised) -> Tensor:
    """Cross-entropy -log p (LLMU Eq. 4, L_rdn, on random mismatched answers). -> (N,)"""
    return -token_logps(s.h, s.labels, s.head)


def reference_kl(s: Supervised) -> Tensor:
    """Forward KL(reference || policy) over the whole vocabulary (LLMU Eq. 6, L_nor). -> (N,)"""
    if s.h_ref is None:
        raise ValueError("reference_kl needs the reference's hidden states")
    return token_kl(s.h, s.h_ref, s.head)
