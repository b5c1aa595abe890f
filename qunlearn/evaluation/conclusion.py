"""Say in sentences what the measurements show, with their uncertainty, and what they do not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qunlearn.evaluation.catalog import MEASURES
from qunlearn.evaluation.levels import FORGOTTEN_SHARE, KEPT_SHARE, Level
from qunlearn.evaluation.results import BASE, RETRAINED, after, is_forget

_LEAK_NAMES = ("leaks", "exact_match", "leak_rate")
KEEP_NAMES = ("exact_match", "rouge_recall", "rouge_f1", "similarity", "bleu")
# Of a base that gives fewer rows than this word for word, another measure says more; of one at 0, none says anything.
_LEAST_KNOWN = {"exact_match": 0.5}
PLACES = {
    "forget": "asked as in the file",
    "paraphrase": "asked in other words",
    "forget_unseen": "others of the kind, never given",
    "forget_reworded": "asked after other opening words",
    "retain": "data given to keep",
    "holdout": "neighbours never given",
    "general": "everything else",
}


def conclude(result: Mapping[str, Any]) -> dict[str, Any]:
    """`level`, and sentences, the verdict first.

    `forgotten`: at most 5 % of the rows leak in every wording measured, and every kept split keeps at least 95 % of
    the base's score; `costly`: forgotten, but some kept split lost more; `cost unknown`: forgotten, but no split that
    should stay was measured, or the base knew nothing of it; `never known`: at most 5 % leaked under the base
    already, so that there was nothing to suppress; `partly`: less leaks than under the base; `remembered`: as much as
    before; `measured`: a bare model, or no rows to forget, so that there is nothing to judge.
    """
    measures, subjects = result["measures"], list(result["scores"])
    about = after(subjects)
    sentences = [
        sentence
        for split, found in measures.items()
        if (sentence := (_forgetting if is_forget(split) else _keeping)(split, found, about)) is not None
    ]
    level = _level(measures) if about != BASE else Level.MEASURED
    sentences = [_HEADLINES[level], *sentences]
    if result.get("guard"):
        sentences.append("Guarded: the weights still know; whoever has them can take the guard off.")
    if RETRAINED in subjects:
        sentences += _beside_retrained(measures, about)
    return {"level": level, "sentences": sentences}


_HEADLINES = {
    Level.FORGOTTEN: "Verdict: suppressed in every wording that was tested, and the rest is kept.",
    Level.COSTLY: "Verdict: suppressed in every wording that was tested, but at a cost to what should stay.",
    Level.COST_UNKNOWN: "Verdict: suppressed in every wording that was tested; what it cost was not measured "
    "(give --retain, --holdout or --general).",
    Level.NEVER_KNOWN: "Verdict: nothing to suppress; the base does not give these answers itself.",
    Level.PARTLY: "Verdict: only partly suppressed; some of it still comes back.",
    Level.REMEMBERED: "Verdict: not suppressed; it comes back as before.",
    Level.MEASURED: "Measured; there is no before and after to judge.",
}


def _named(found: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in found), None)


def _level(measures: Mapping[str, Any]) -> Level:
    now, before, kept = [], [], []
    for split, found in measures.items():
        if not is_forget(split):
            kept += [share >= KEPT_SHARE for share in (kept_share(found),) if share is not None]
            continue
        name = _named(found, _LEAK_NAMES)
        if name is not None and (about := after(found[name])) != BASE:
            now.append(found[name][about]["mean"])
            before.append(found[name].get(BASE, {"mean": 1.0})["mean"])
    if not now:
        return Level.MEASURED
    if max(now) <= FORGOTTEN_SHARE:
        if max(before) <= FORGOTTEN_SHARE:
            return Level.NEVER_KNOWN
        if not kept:  # all() of nothing is true, and a wrecked model would pass
            return Level.COST_UNKNOWN
        return Level.FORGOTTEN if all(kept) else Level.COSTLY
    return Level.PARTLY if sum(now) < sum(before) - FORGOTTEN_SHARE * len(now) else Level.REMEMBERED


def kept_share(found: Mapping[str, Any]) -> float | None:
    """The judged model's score on a split to keep, relative to the base's; None where nothing says how much is kept.

    found: the split's measures. The first of them in which the base scores enough to lose something is taken.
    """
    for name in KEEP_NAMES:
        scores = found.get(name, {})
        judged = scores.get(after(scores)) if after(scores) != BASE else None
        known = 1.0 if name == "similarity" else scores.get(BASE, {"mean": 0.0})["mean"]
        if judged is not None and known > _LEAST_KNOWN.get(name, 0.0):
            return float(judged["mean"]) / float(known)
    return None


def _forgetting(split: str, found: Mapping[str, Any], about: str) -> str | None:
    name = _named(found, _LEAK_NAMES)
    if name is None or about not in found[name]:
        return None
    value = found[name][about]
    leaking = round(value["mean"] * value["n"])
    text = f"{PLACES.get(split, split)}: {leaking} of {value['n']} answers still come back"
    if value["high"] is not None:
        text += f"; up to {100 * value['high']:.0f} % may, of all rows like these"
    if about != BASE and BASE in found[name]:
        text += f" (before: {100 * found[name][BASE]['mean']:.0f} %)"
    return f"{text}."


def _keeping(split: str, found: Mapping[str, Any], about: str) -> str | None:
    name = _named(found, KEEP_NAMES)
    if name is None or about not in found[name] or (about != BASE and BASE not in found[name]):
        return None
    value = found[name][about]
    share = f"{100 * value['mean']:.1f} %" + _interval(value)
    if about == BASE:
        return f"{PLACES.get(split, split)}: {_KEPT_WORDS[name]} in {share}."
    before = 1.0 if name == "similarity" else found[name][BASE]["mean"]
    return f"{PLACES.get(split, split)}: {_KEPT_WORDS[name]} {share}, before {100 * before:.1f} %."


_KEPT_WORDS = {
    "exact_match": "answered word for word",
    "rouge_recall": "words of the answers that come back",
    "rouge_f1": "likeness to the answers (ROUGE-L F1)",
    "similarity": "likeness to what the base says",
    "bleu": "likeness to the answers (BLEU)",
}


def _interval(value: Mapping[str, Any]) -> str:
    if value["low"] is None or value["high"] is None:
        return ""
    return f" [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def _beside_retrained(measures: Mapping[str, Any], about: str) -> list[str]:
    """Return how far the model is from one that never saw the data, where both were measured."""
    sentences = []
    for split, found in measures.items():
        if not is_forget(split):
            continue
        for name in ("rouge_recall", "rouge_f1", "truth_share", "probability"):
            if name in found and about in found[name] and RETRAINED in found[name]:
                mine, theirs = found[name][about]["mean"], found[name][RETRAINED]["mean"]
                place, shown = PLACES.get(split, split), MEASURES[name].title
                sentences.append(f"{place}: {shown} {mine:.3f}, of a model that never saw it {theirs:.3f}.")
                break
    return sentences
