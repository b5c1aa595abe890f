"""Draw a recipe's verdict from its measurements: forgotten on unseen prompts, and the rest kept?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qunlearn.errors import GateError
from qunlearn.evaluation.levels import FORGOTTEN_SHARE, KEPT_SHARE, Level
from qunlearn.evaluation.results import ADAPTER, BASE

_LEAKS = "leaks"
# A base that answers few rows word for word is measured by its words.
_KEPT = {"exact_match": 0.5, "rouge_recall": 0.0}
_HELD_BACK = "normal, held back"  # the set of a run's own before/after table


@dataclass(frozen=True)
class Figures:
    """Shares, 0 to 1. `unseen`: rows that leak, by split, none of them given to the run; `kept`: holdout, relative to
    the base; `opened`: the bad rows that leak after other opening words, which are told and decide nothing. None where
    there was nothing to measure."""

    unseen: Mapping[str, float]
    seen: float | None
    kept: float | None
    kept_on: str
    opened: float | None = None

    @property
    def worst(self) -> float | None:
        """The largest share, of the bad rows too: rewordings may pass where what was trained on comes back."""
        found = [*self.unseen.values(), *([] if self.seen is None else [self.seen])]
        return max(found, default=None)


@dataclass(frozen=True)
class Verdict:
    """`level`: forgotten, costly, cost unknown, remembered, or never known: the base does not say it."""

    level: Level
    base_leaks: float | None
    probability: tuple[float | None, float | None]  # of the bad answers, per token: base, adapter
    adapter: Figures
    merged: Figures

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def line(self) -> str:
        worst = {"adapter": self.adapter.worst, "merged": self.merged.worst}
        gone = ", ".join(f"{name} {_percent(value)}" for name, value in worst.items())
        kept = f"{_percent(self.adapter.kept)}, merged {_percent(self.merged.kept)}"
        if self.level == Level.NEVER_KNOWN and None not in self.probability:
            before, after = self.probability
            gone = f"their probability was {before:.2g} and is {after:.2g}; {gone}"
        where = "bad and unseen prompts" if self.adapter.unseen else "the bad rows"
        opened = ""
        if self.adapter.opened is not None:
            merged = _percent(self.merged.opened)
            opened = f"after other opening words: adapter {_percent(self.adapter.opened)}, merged {merged}; "
        return (
            f"verdict: {_WORDS[self.level]}; {where}: {gone} still leak (at most {100 * FORGOTTEN_SHARE:.0f} %), "
            f"{opened}"
            f"{self.adapter.kept_on}: adapter {kept} of the base (at least {100 * KEPT_SHARE:.0f} %)"
        )


_WORDS = {
    Level.FORGOTTEN: "forgotten, and the rest is kept",
    Level.COSTLY: "forgotten, at a cost to the rest",
    Level.COST_UNKNOWN: "forgotten; what it cost was not measured",
    Level.REMEMBERED: "NOT forgotten",
    Level.NEVER_KNOWN: "nothing to forget: the base does not give these answers itself",
}


def judge(
    base: Mapping[str, Any], run: Mapping[str, Any], merged: Mapping[str, Any], record: Mapping[str, Any]
) -> Verdict:
    """base, run, merged: results of the basic suite; record: the run's record.json."""
    adapter = _figures(run, ADAPTER, base)
    if adapter.kept is None:
        adapter = replace(adapter, kept=_held_back(record), kept_on="held-back normal rows")
    after = _figures(merged, BASE, base)
    said = [_mean(base, split, _LEAKS, BASE) for split in ("forget", "forget_unseen", "paraphrase")]
    base_leaks = max((value for value in said if value is not None), default=None)
    worst = [value for value in (adapter.worst, after.worst) if value is not None]
    kept = [value for value in (adapter.kept, after.kept) if value is not None]
    if base_leaks is not None and base_leaks <= FORGOTTEN_SHARE:
        level = Level.NEVER_KNOWN
    elif not worst or max(worst) > FORGOTTEN_SHARE:
        level = Level.REMEMBERED
    elif not kept:
        level = Level.COST_UNKNOWN
    else:
        level = Level.FORGOTTEN if min(kept) >= KEPT_SHARE else Level.COSTLY
    probability = (_mean(base, "forget", "probability", BASE), _mean(run, "forget", "probability", ADAPTER))
    return Verdict(level, base_leaks, probability, adapter, after)


def raise_if_missed(result: dict[str, Any]) -> None:
    """Raises GateError when answers that should be gone come back, or the run says that it missed its target."""
    if result["status"] == Level.REMEMBERED:
        hint = "more --set train.steps=…, a larger --set objective.eps1=… or stop.max_drift=…; see `qunlearn compare`"
        raise GateError("what should be forgotten is still there", where=result["folder"], hint=hint)
    if result["not_reached"]:
        missed = "the run did not reach its target: " + "; ".join(result["not_reached"])
        raise GateError(missed, where=result["folder"], hint="the verdict above is what the stages measured")


def _figures(result: Mapping[str, Any], subject: str, base: Mapping[str, Any]) -> Figures:
    leaks = {split: _mean(result, split, _LEAKS, subject) for split in ("forget_unseen", "paraphrase")}
    unseen = {split: value for split, value in leaks.items() if value is not None}
    kept = None
    for name, least in _KEPT.items():
        now, before = _mean(result, "holdout", name, subject), _mean(base, "holdout", name, BASE)
        if now is not None and before is not None and before > least:
            kept = now / before
            break
    opened = _mean(result, "forget_reworded", _LEAKS, subject)
    return Figures(unseen, _mean(result, "forget", _LEAKS, subject), kept, "holdout", opened)


def _mean(result: Mapping[str, Any], split: str, name: str, subject: str) -> float | None:
    found = result["measures"].get(split, {}).get(name, {}).get(subject)
    return None if found is None else float(found["mean"])


def _held_back(record: Mapping[str, Any]) -> float | None:
    before, after = (record.get(when) or {} for when in ("before", "after"))
    known = before.get(_HELD_BACK, {}).get("exact_match")
    now = after.get(_HELD_BACK, {}).get("exact_match")
    return now / known if known and now is not None else None


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f} %"
