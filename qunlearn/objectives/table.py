"""OBJECTIVES: every method is a row, a weighted sum of losses, each on a role of the data.

A row's own settings are in `config.PRESETS`. `qunlearn objectives` and docs/objectives.md print this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qunlearn.config.objective import ObjectiveConfig
from qunlearn.data.batch import ALL, ANSWER, CLOSED, FORM, Span
from qunlearn.errors import ConfigError
from qunlearn.objectives import losses
from qunlearn.objectives.losses import Supervised

TOKEN, ROWS, ANSWERS, PAIRS = "token", "row", "answer", "pair"
MOST_PUSH = 1e3  # a gradient that vanishes where a token is certain needs as much


@dataclass(frozen=True)
class Term:
    """One loss on one role: which tokens of it are supervised, its weight, what it is a loss of, what it needs.

    `per` says what a loss has a value of and how the values are averaged: of each token, over all tokens of a step
    (token) or within a row first and then over rows (row: short rows count as much as long ones); of each answer; of
    each pair of answers. A `layered` loss looks at
    the states behind block `objective.layer` instead of the final ones. `met` is the loss at which the forget target
    (a probability) is reached: below it, the term has no say in a common descent direction, and a row is not pushed
    harder. It takes a row's share of `rest` and the settings, too.
    """

    name: str
    role: str  # forget, mismatch, pair (a bad answer and another one), instead or taught (said in its place), retain
    span: Span
    weight: Callable[[ObjectiveConfig], float]
    loss: Callable[[Supervised, ObjectiveConfig], Tensor]  # -> (N,), (R,) or (P,)
    reference: bool = False
    per: str = TOKEN
    layered: bool = False
    met: Callable[[float, float, ObjectiveConfig], float] | None = None


@dataclass(frozen=True)
class Objective:
    """A method: its formula and source for people, its terms for the loop.

    `retain` is its own retain loss.
    """

    formula: str
    source: str
    forget: tuple[Term, ...]
    retain: str = "kl"
    alternatives: str | None = None  # idk or own: what the other answer of a pair is
    descent: bool = False  # gradients of the terms are combined along a common descent direction
    lr: float = 2e-3  # of `auto` at a width of 160: see `auto_lr`
    dual: bool = False  # the retain weight is a multiplier that is always steered
    most_push: float = MOST_PUSH  # what multiplies its forget weight at most, where too little is forgotten


def _eps1(c: ObjectiveConfig) -> float:
    return c.eps1


def _forget(
    name: str, loss: Callable[[Supervised, ObjectiveConfig], Tensor], *, ref: bool = False, per: str = ROWS
) -> Term:
    # The closing token is form, not content: pushed down it would teach never to stop.
    return Term(name, "forget", ANSWER, _eps1, loss, ref, per)


_ASCENT = _forget("ascent", lambda s, c: losses.ascent(s, c.floor_nll))
_MISMATCH = Term("mismatch", "mismatch", CLOSED, lambda c: c.eps2, lambda s, c: losses.nll(s))
# What is said in place of a bad answer, whatever the row of the table: the model's own other answers, and what the user
# wants to be said.
INSTEAD = Term("instead", "instead", CLOSED, lambda c: c.eps2, lambda s, c: losses.nll(s), per=ROWS)
TAUGHT = Term("taught", "taught", CLOSED, lambda c: c.eps5, lambda s, c: losses.nll(s), per=ROWS)
# The sentence around the content stays as it was, so that what is left of an answer is still one.
_FORM = Term("form", "forget", FORM, lambda c: c.eps4, lambda s, c: losses.reference_kl(s), reference=True, per=ROWS)
_PAIR = Term("preference", "pair", CLOSED, _eps1, lambda s, c: losses.preference(s, c.beta), True, PAIRS)


def _rests(target: float, share: float, c: ObjectiveConfig) -> float:
    """A mean at the target itself leaves single tokens, and answers likelier than to a model that never saw them."""
    return losses.bounded_ce_at(target / 100)


RETAIN: dict[str, tuple[Term, ...]] = {
    "kl": (Term("kl", "retain", ALL, lambda c: c.eps3, lambda s, c: losses.reference_kl(s), reference=True),),
    "nll": (Term("nll", "retain", CLOSED, lambda c: c.eps3, lambda s, c: losses.nll(s)),),
    "none": (),
    "hold": (Term("hold", "retain", ALL, lambda c: c.eps3, lambda s, c: losses.hold(s), reference=True, layered=True),),
}
RETAIN["kl+nll"] = RETAIN["kl"] + RETAIN["nll"]

OBJECTIVES: dict[str, Objective] = {
    "logodds": Objective(
        "softplus(log p/(1 - p)(bad) - log rest/(1 - rest)) + eps4 KL(base || p)(the rest of the answer)",
        "ours, after arXiv 2503.01224 (see docs/objectives.md)",
        (
            replace(
                _forget("odds", lambda s, c: losses.log_odds(s, c.rest)),
                met=lambda target, share, c: losses.log_odds_at(target, c.rest * share),
            ),
            _FORM,
        ),
        lr=1e-3,
        most_push=16,  # its gradient does not vanish; more, and the few rows that resist outweigh all that is kept
    ),
    "wga": Objective(
        "sg(p)^beta log p(bad)", "arXiv 2502.19301", (_forget("wga", lambda s, c: losses.weighted_ascent(s, c.beta)),)
    ),
    "llmu": Objective(
        "eps1 log p(bad) + eps2 NLL(mismatched)", "Yao, Xu, Liu, arXiv 2310.10683, Eq. 2-6", (_ASCENT, _MISMATCH)
    ),
    "ga": Objective("log p(bad)", "arXiv 2310.10683, Eq. 3", (_ASCENT,), retain="none"),
    "graddiff": Objective("log p(bad)", "arXiv 2203.12817; 2401.06121, Sec. 4", (_ASCENT,), retain="nll"),
    "npo": Objective(
        "-2/beta log sigmoid(-beta (log p - log p_ref)(bad))",
        "arXiv 2404.05868, Eq. 3",
        (_forget("npo", lambda s, c: losses.npo(s, c.beta), ref=True, per=ANSWERS),),
    ),
    "simnpo": Objective(
        "-2/beta log sigmoid(beta (NLL(bad)/|bad| - delta))",
        "arXiv 2410.07163, Eq. 4",
        (_forget("simnpo", lambda s, c: losses.simnpo(s, c.beta, c.delta), per=ANSWERS),),
    ),
    "dpo": Objective(
        '-2/beta log sigmoid(beta (log p/p_ref("I do not know") - log p/p_ref(bad)))',
        "arXiv 2305.18290, Eq. 7; 2401.06121 for refusals",
        (_PAIR,),
        alternatives="idk",
    ),
    "altpo": Objective(
        "-2/beta log sigmoid(beta (log p/p_ref(the model's other answer) - log p/p_ref(bad)))",
        "arXiv 2409.13474, Eq. 3",
        (_PAIR,),
        alternatives="own",
    ),
    "rmu": Objective(
        "mean (h_l(bad) - c u)^2, u a random direction",
        "arXiv 2403.03218, Eq. 1-2",
        (
            Term(
                "steer",
                "forget",
                ANSWER,
                _eps1,
                lambda s, c: losses.steer(s, direction(s.h.shape[1], c.direction_seed).to(s.h.device), c.steer),
                reference=True,
                per=ROWS,
                layered=True,
            ),
        ),
        retain="hold",
    ),
    "undial": Objective(
        "CE(softmax(z_ref - beta onehot(bad)), p)",
        "arXiv 2402.10052, Eq. 3-4",
        (_forget("undial", lambda s, c: losses.undial(s, c.beta), ref=True),),
    ),
    "ceu": Objective(
        "CE(the model's own distribution without the bad token, p)",
        "arXiv 2503.01224, Eq. 5",
        (_forget("ceu", lambda s, c: losses.self_without(s)),),
    ),
    "satimp": Objective(
        "sg(p)^beta sg(1 - p)^beta2 log p(bad)",
        "arXiv 2505.11953",
        (_forget("satimp", lambda s, c: losses.saturation_importance(s, c.beta, c.beta2)),),
    ),
    "pdu": Objective(
        "(max z - mean z)^2 on bad, under retain loss <= budget",
        "arXiv 2506.05314",
        (_forget("flatten", lambda s, c: losses.flatten(s)),),
        dual=True,
    ),
    "mollm": Objective(
        "-log(1 - p(bad)/2), along the common descent direction with the retain losses",
        "arXiv 2412.20412 (its direction rebuilt as min-norm MGDA)",
        (replace(_forget("uce", lambda s, c: losses.bounded_ce(s)), met=_rests),),
        retain="kl+nll",
        descent=True,
    ),
    "prod": Objective(
        "CE(p_ref without the bad token, top-p, renormalised; p)",
        "arXiv 2506.17125",
        (_forget("prod", lambda s, c: losses.prod(s, c.top_p, c.temperature, c.prod_alpha), ref=True),),
    ),
}


def terms_of(config: ObjectiveConfig) -> tuple[Term, ...]:
    """The terms that have a weight: the row's forget side and the retain side that was chosen. Raises ConfigError."""
    row = OBJECTIVES[config.name]
    kind = row.retain if config.retain == "auto" else config.retain
    layered = any(term.layered for term in row.forget)  # cross-entropy looks at the model's end
    instead = () if layered else (INSTEAD, TAUGHT)
    found = tuple(term for term in row.forget + RETAIN[kind] + instead if term.weight(config) > 0)
    if not any(term not in (INSTEAD, TAUGHT) for term in found):
        raise ConfigError("every weight of the objective is 0: nothing to train", where="--eps1 --eps2 --eps3")
    if len({term.layered for term in found}) > 1:
        hint = "rmu goes with --retain-loss hold or none, the others with kl, nll or none"
        raise ConfigError(f"{config.name} and --retain-loss {kind} look at different layers", hint=hint)
    return found


def direction(width: int, seed: int) -> Tensor:
    """RMU's u: uniform on [0, 1) in each coordinate, of length 1. -> (D,)"""
    u = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(u, dim=0)
