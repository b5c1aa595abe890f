"""Hold prompts out of a gate's fit, and set its threshold on them: the same for every kind of gate. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qunlearn.errors import DataError, GateError
from qunlearn.guard.prompts import Prompts, Sample

FOLDS = 4
_UNSEEN = 8  # every how many-th bad row is in no wording learnt from, in a fold
_MISSES = 0.02  # share of bad prompts that the threshold may miss where both kinds lie apart
_UP = 1 / 3  # of the way from the one kind to the other
LEAST_AUC = 0.9
_MOST_MISSED, _MANY_MISSED = 0.25, 0.05  # share of held-out bad prompts at which a gate is refused, or warned of


@dataclass(frozen=True)
class Threshold:
    """How the threshold is set: by a target rate of false alarms on held-out normal prompts, or `conformal`."""

    false_alarms: float = 0.01
    conformal: bool = False


@dataclass(frozen=True)
class Fold:
    """Places of samples: to learn from, and held out as known rows, unseen rows, and rows to pass."""

    bad: tuple[int, ...]
    normal: tuple[int, ...]
    held: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def fold_of(prompts: Prompts, n: int) -> Fold:
    """Return the n-th of FOLDS folds. The last wording of a row is never the only one that is left."""
    unseen = {i for i, s in enumerate(prompts.bad) if s.row % _UNSEEN == n}
    known = {i for i, s in enumerate(prompts.bad) if s.wording % FOLDS == n} - unseen
    normal = [i for i, s in enumerate(prompts.normal) if s.measured and s.row % FOLDS == n]
    out = unseen | known
    bad = tuple(i for i in range(len(prompts.bad)) if i not in out)
    passing = tuple(i for i, s in enumerate(prompts.normal) if not s.measured or s.row % FOLDS != n)
    return Fold(bad, passing, (tuple(sorted(known)), tuple(sorted(unseen)), tuple(normal)))


def spared(prompts: Prompts, rule: Threshold) -> tuple[Prompts, tuple[Sample, ...]]:
    """Return the prompts to learn from, and those that a conformal threshold rests on: every second row to pass, as it
    is, of which nothing is learnt. Raises DataError where there are too few prompts."""
    calibration: tuple[Sample, ...] = ()
    if rule.conformal:
        apart = [s for s in prompts.normal if s.measured and s.row % 2]
        calibration = tuple({s.row: s for s in reversed(apart)}.values())  # the text as it is, which comes first
        prompts = replace(prompts, normal=tuple(s for s in prompts.normal if not (s.measured and s.row % 2)))
    if len({s.row for s in prompts.bad}) < 2 or len({s.row for s in prompts.normal if s.measured}) < 2:
        raise DataError("a gate needs at least two rows of each kind", where="gate", hint="more --bad or --normal rows")
    return prompts, calibration


def check_separation(separation: float) -> None:
    """Refuse a gate whose AUC on held-out prompts is too low. Raises GateError with the figure."""
    if separation < LEAST_AUC:
        message = f"held-out prompts to forget and others are not told apart: AUC {separation:.3f}"
        hint = f"at least {LEAST_AUC} is needed; are there rows about the same in both files?"
        raise GateError(message, where="gate", hint=hint)


def check_missed(missed: int, bad: int) -> str | None:
    """Return what to warn of where a gate misses many held-out bad prompts. Raises GateError where a guard would let
    more than a quarter of them pass."""
    said = f"the gate misses {missed} of {bad} held-out prompts to forget"
    hint = "do rows of --normal name what bad rows name? A higher --false-alarms misses fewer"
    if missed > _MOST_MISSED * bad:
        raise GateError(said, where="gate", hint=hint)
    return f"{said}: {hint}" if missed > _MANY_MISSED * bad else None


def choose_threshold(bad: Sequence[float], normal: Sequence[float], rule: Threshold) -> float:
    """Return the probability from which a prompt is flagged, from held-out ones.

    By rate: the least that lets at most the wanted share of normal prompts through as false alarms; where the bad ones
    lie above it, a third of the way up to the 2 % lowest of them (in log-odds): the normal ones at the edge are dressed
    to look bad, more than what people ask, and bad ones that people put in other words are not among those held out.
    Conformal (split): just above the ceil((n + 1)(1 - a))-th smallest of n normal probabilities; of prompts
    exchangeable with those, at most a share a is flagged, on average over the held-out sets.
    Raises DataError for fewer than 1/a - 1 of them.
    """
    n, a = len(normal), rule.false_alarms
    ordered = sorted(normal)
    if rule.conformal:
        rank = math.ceil((n + 1) * (1 - a))
        if rank > n:
            needed = math.ceil(1 / a) - 1
            message = f"{n} held-out normal prompts promise no rate of {100 * a:g} %: {needed} are needed"
            raise DataError(message, where="--conformal", hint="more --normal rows, or a higher --false-alarms")
        return math.nextafter(ordered[rank - 1], 2.0)
    edge = math.nextafter(ordered[max(0, n - 1 - math.floor(a * n))], 2.0)
    low = sorted(bad)[math.floor(_MISSES * len(bad))]
    if low <= edge:
        return edge
    between = _logit(edge) + _UP * (_logit(low) - _logit(edge))
    return max(edge, 1 / (1 + math.exp(-between)))


def _logit(p: float) -> float:
    p = min(max(p, 1e-9), 1 - 1e-9)
    return math.log(p / (1 - p))
