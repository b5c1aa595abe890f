"""The settings of the objective, and what each row of the table changes of their defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qunlearn.config.fields import MOST_SEED, setting
from qunlearn.errors import ConfigError

OBJECTIVE_NAMES = (
    "logodds", "wga", "llmu", "ga", "graddiff", "npo", "simnpo", "dpo", "altpo", "rmu", "undial", "ceu",
    "satimp", "pdu", "mollm", "prod",
)  # fmt: skip

INSTEAD = ("nothing", "other", "refuse")  # what may be said in place of a bad answer, besides a file


@dataclass(frozen=True)
class ObjectiveConfig:
    """The unlearning objective: a row of the table `qunlearn objectives` prints, and its settings.

    The defaults are those of the first row; what another row changes of them is in `PRESETS`.
    """

    name: str = setting("logodds", "The objective.", flag="--objective", choices=OBJECTIVE_NAMES)
    eps1: float = setting(
        0.03,
        "Weight of the forget side (LLMU: of gradient ascent); it rises where nothing is forgotten.",
        flag="--eps1",
        low=0,
        high=1e6,
    )
    eps2: float = setting(
        0.3,
        "Weight of cross-entropy on the model's own other answers (--instead other); llmu: on random mismatched "
        "answers, too.",
        flag="--eps2",
        low=0,
        high=1e6,
    )
    eps3: float = setting(10.0, "Weight of the retain side.", flag="--eps3", low=0, high=1e6)
    eps4: float = setting(
        1.0, "logodds: weight of KL to the base on those tokens of a bad answer that are not pushed.", low=0, high=1e6
    )
    eps5: float = setting(
        1.0,
        "Weight of cross-entropy on what the user wants said (--instead refuse or a file, and normal rows that answer "
        "a bad prompt).",
        low=0,
        high=1e6,
    )
    rest: float = setting(
        0.03,
        "logodds: probability below which a token is left in peace: so much times the square of what the base leaves "
        "open of an answer, down to a thousandth where it is certain, and no normal row is answered so.",
        low=1e-9,
        high=0.5,
    )
    instead: str = setting(
        "other",
        "What is said in place of a bad answer: other: the model's own most probable other answers; refuse: a refusal; "
        "nothing in particular; or a file of answers (text), or of prompts with answers.",
        flag="--instead",
    )
    retain: str = setting(
        "auto",
        "The loss on the retain set: KL to the base, cross-entropy, both, a block's states held, or none; auto: the "
        "objective's own.",
        flag="--retain-loss",
        choices=("auto", "kl", "nll", "kl+nll", "hold", "none"),
    )
    tokens: str = setting(
        "content",
        "Which tokens of a bad answer are unlearned: all; specific: those of rare words, or where a script sets no "
        "spaces, of what is said of the subject alone; context: those that the model cannot guess from the last six; "
        "content: context where an answer is a passage, else specific; auto: context there too, else all.",
        flag="--forget-tokens",
        choices=("auto", "content", "specific", "context", "all"),
    )
    mismatch_k: int = setting(1, "llmu: mismatched answers for each bad prompt.", flag="--mismatch-k", low=1, high=64)
    floor_nll: float = setting(
        3.0,
        "llmu, ga, graddiff: gradient ascent on a token ends at this NLL (3 nats: p = 0.05); inf: never.",
        flag="--floor-nll",
        low=0.1,
        high=math.inf,
    )
    beta: float = setting(
        0.5,
        "wga, satimp: exponent of p; npo, dpo, altpo, simnpo: inverse temperature; undial: what the label's logit is "
        "lowered by.",
        flag="--beta",
        low=1e-6,
        high=1e6,
    )
    beta2: float = setting(1.0, "satimp: exponent of 1 - p.", low=0.0)
    delta: float = setting(0.0, "simnpo: NLL per token that is asked for at least.")
    top_p: float = setting(0.8, "prod: mass of the reference's other tokens that is kept.", low=0.01, high=1.0)
    temperature: float = setting(1.0, "prod: temperature of that distribution.", low=0.01)
    prod_alpha: float = setting(0.0, "prod: the label's target is -alpha p_ref; negative leaves it some mass.")
    layer: int | None = setting(None, "rmu: the block whose output is steered, from 0; auto: a quarter up.", low=0)
    steer: float = setting(2.0, "rmu: length of the target, in lengths of the reference's state.", low=0.0)
    direction_seed: int = setting(0, "rmu: seed of the random direction.", low=0, high=MOST_SEED)
    retain_budget: float | None = setting(
        None,
        "Budgeted forgetting: steer the weights so that drift stays below this, in nats per token of normal data.",
        flag="--retain-budget",
        low=1e-6,
    )
    dual_rate: float = setting(0.1, "Step size of the multipliers, per step of training.", low=0.0, high=10.0)

    @property
    def answers(self) -> int:
        """Answers that a bad prompt is trained with: its own, and what its row draws beside it."""
        drawn = {"llmu": self.mismatch_k if self.eps2 > 0 else 0, "dpo": 1, "altpo": 1}.get(self.name, 0)
        return 1 + drawn + (self.instead != "nothing")

    def __post_init__(self) -> None:
        if not (self.eps1 or self.eps2 or self.eps3):
            raise ConfigError("every weight of the objective is 0: nothing to train", where="--eps1 --eps2 --eps3")


# What the rows that are published have otherwise than the first, and two groups of them have in common.
_PUBLISHED = {"objective.eps1": 1.0, "objective.instead": "nothing"}

_ALL = _PUBLISHED | {"objective.tokens": "auto"}

_USUAL = _ALL | {"objective.eps3": 2.0}

# Losses of a row of the table whose gradients are kept apart, each in memory, beside what is said instead.
KEPT_APART = {"mollm": 3}

# What an objective's row sets otherwise than the defaults, which are the first row's; recipes, --set and flags win.
PRESETS: dict[str, dict[str, Any]] = {
    "logodds": {},
    "wga": _ALL,
    "llmu": _ALL | {"objective.eps1": 0.5, "objective.eps2": 0.1, "objective.eps3": 6.0, "objective.floor_nll": 4.0},
    "ga": _USUAL | {"objective.floor_nll": float("inf")},
    "graddiff": _USUAL | {"objective.eps1": 0.5},
    "npo": _PUBLISHED | {"objective.beta": 0.3},
    "simnpo": _PUBLISHED | {"objective.eps3": 8.0, "objective.beta": 4.5, "objective.delta": 4.0},
    "dpo": _USUAL | {"objective.beta": 0.1},
    "altpo": _ALL | {"objective.beta": 0.1},
    "rmu": _ALL | {"objective.eps3": 30.0},
    "undial": _ALL | {"objective.eps3": 5.0, "objective.beta": 10.0},
    "ceu": _ALL,
    "satimp": _ALL | {"objective.eps3": 0.5, "objective.beta": 1.0},
    "pdu": _ALL | {"objective.eps1": 0.03, "objective.eps3": 1.0, "objective.retain_budget": 0.05},
    "mollm": _ALL | {"objective.eps3": 1.0},
    "prod": _ALL | {"objective.prod_alpha": 0.1},
}

WEIGHS_ITSELF = ("mollm",)  # along a common descent direction, whose parts have unit length
