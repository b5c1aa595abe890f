"""OBJECTIVES: every method is a row, a weighted sum of per-token losses, each on a role of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qunlearn.config import ObjectiveConfig
from qunlearn.data.batch import ALL, ANSWER, CLOSED, Span
from qunlearn.objectives.losses import Supervised, ascent, nll, reference_kl


@dataclass(frozen=True)
class Term:
    """One loss on one role: which tokens of it are supervised, its weight, and whether it needs the reference."""

    name: str
    role: str  # forget, mismatch or retain
    span: Span
    weight: Callable[[ObjectiveConfig], float]
    loss: Callable[[Supervised, ObjectiveConfig], Tensor]  # -> (N,)
    reference: bool = False


@dataclass(frozen=True)
class Objective:
    """A method: its formula and source for people, its terms for the loop."""

    formula: str
    source: str
    terms: tuple[Term, ...]


OBJECTIVES: dict[str, Objective] = {
    "llmu": Objective(
        formula="eps1 * log p(bad) + eps2 * NLL(mismatched) + eps3 * KL(base || model) on normal data",
        source="Yao, Xu, Liu, arXiv 2310.10683, Eq. 2-6",
        terms=(
            # The closing token is form, not content: ascent on it would teach never to stop.
            Term("ascent", "forget", ANSWER, lambda c: c.eps1, lambda s, c: ascent(s, c.floor_nll)),
            Term("mismatch", "mismatch", CLOSED, lambda c: c.eps2, lambda s, c: nll(s)),
            Term("kl", "retain", ALL, lambda c: c.eps3, lambda s, c: reference_kl(s), reference=True),
        ),
    ),
}
