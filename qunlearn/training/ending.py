"""Decide and say how a run ended: in words, in the record, and by the exit code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.config.training import StopConfig
from qunlearn.data.tokenize import PASSAGE
from qunlearn.errors import TrainingError
from qunlearn.evaluation.before_after import Scores
from qunlearn.evaluation.metrics import LEAKS, RowScore, aggregate, texts
from qunlearn.evaluation.metrics.manner import Phrase, has_phrase
from qunlearn.runs.folder import FINISHED, status_of_run
from qunlearn.training.outcome import Outcome
from qunlearn.training.request import ForgetRequest
from qunlearn.training.stopping import OTHERWISE_LEFT, is_within
from qunlearn.utils.console import say, warn
from qunlearn.utils.text import command_line

DONE, NOT_REACHED, INTERRUPTED, FAILED = "done", "target not reached", "interrupted", "failed"
_SENTENCES = 0.02  # share of answers that may stop being sentences
_KEPT = 0.9  # likeness (ROUGE-L F1) of what is said on other prompts before and after, at least
_SURE = 0.8  # probability per token from which the base is sure of an answer
_CHANGED = 0.04  # share of such answers about others that may change
_CERTAIN, _ENOUGH = 0.5, 8  # probability per token of an answer whose wording means something; rows that can be judged


def status_of(outcome: Outcome, why: Sequence[str]) -> str:
    """Return one word for a run: `why` lists what was not reached."""
    if outcome.interrupted:
        return INTERRUPTED
    if outcome.failed:
        return FAILED
    return NOT_REACHED if why else DONE


@dataclass(frozen=True)
class Judged:
    """What is judged by what: `forget` names the set that should be gone, `otherwise` the same in other words; all else
    should be as it was: of `others`, who are asked about as bad prompts ask, each answer that the base is sure of.
    `phrases` are what a behaviour says, whichever of its answers it gives."""

    forget: str
    otherwise: str = ""
    others: str = ""
    phrases: frozenset[Phrase] = frozenset()


def shortfalls(before: Scores, after: Scores, judged: Judged, outcome: Outcome, config: Config) -> list[str]:
    """Return what a finished run did not reach, a sentence each; empty where it did all it was for."""
    stop, best = config.stop, outcome.best
    why = []
    if best.step == 0:
        why.append("no step forgot anything within the drift budget: the adapter is the untouched one")
    elif not best.met(stop):
        share = f"{100 * best.left:.0f} % of the bad rows are" if best.left is not None else "the bad rows are"
        why.append(f"{share} still likelier than {stop.target:g} per token")
    if not is_within(best.drift, config):
        why.append(f"drift is {best.drift:.3g} nats/token, above the budget of {config.objective.retain_budget:g}")
    why += _coming_back(after, judged, stop)
    sure = [(old, new) for old, new in _pairs(before, after, judged.others) if _is_sure(old)]
    changed = sum(new.output.strip() != old.output.strip() for old, new in sure)
    if changed > 1 and changed > _CHANGED * len(sure):
        why.append(f"{changed} of {len(sure)} answers about others have changed, where the same is asked")
    for name in after:
        gone = name in (judged.forget, judged.otherwise)
        certain = [(old, new) for old, new in _pairs(before, after, name) if old.probability >= _CERTAIN]
        told = [*_pairs(before, after, name)] if gone or len(certain) < _ENOUGH else certain
        old, new = (aggregate(scores).sentences for scores in zip(*told, strict=True)) if told else (1.0, 1.0)
        lost = round((old - new) * len(told))
        by_chance = 0 if gone and len(told) < _ENOUGH else 1  # of a few bad rows each one counts
        if new < old - _SENTENCES and lost > by_chance:
            why.append(
                f"{100 * (1 - new):.0f} % of the answers to {name} are no sentences (before: {100 * (1 - old):.0f} %)"
            )
        likeness = 1.0 if gone else _likeness(certain, judged.phrases)
        if likeness < _KEPT:
            why.append(f"the answers to {name} have changed: they are {100 * likeness:.0f} % like those before")
    return why


def _coming_back(after: Scores, judged: Judged, stop: StopConfig) -> list[str]:
    """Return what is still said of what should be gone."""
    asked, again = after[judged.forget], after.get(judged.otherwise, ())
    why = []
    leaking = sum(row.verdict == LEAKS for row in asked)
    if leaking > stop.rows_left * len(asked):
        why.append(f"{leaking} of {len(asked)} bad answers still come back")
    leaking = sum(row.verdict == LEAKS for row in again)
    most = max(OTHERWISE_LEFT, stop.rows_left)
    if leaking > most * len(again) and not _is_chance(leaking, again):
        why.append(f"{leaking} of {len(again)} prompts in other words still get a bad answer")
    for name, rows in ((judged.forget, asked), (judged.otherwise, again)):
        alike = sum(has_phrase(row.output, judged.phrases) for row in rows)
        if alike > most * len(rows) and not _is_chance(alike, rows):
            why.append(f"{alike} of {len(rows)} answers to {name} still have phrases of the bad ones")
    return why


def _is_chance(found: int, rows: Sequence[RowScore]) -> bool:
    """Return whether it is a single row of a dozen."""
    return found == 1 and len(rows) >= _ENOUGH


def _pairs(before: Scores, after: Scores, name: str) -> Iterator[tuple[RowScore, RowScore]]:
    return zip(before.get(name, ()), after.get(name, ()), strict=True)


def _is_sure(row: RowScore) -> bool:
    return row.exact and row.probability >= _SURE


def _likeness(certain: Sequence[tuple[RowScore, RowScore]], phrases: frozenset[Phrase]) -> float:
    """Return the mean likeness of what was said and what is said, where the base was certain of its answer: elsewhere
    the least change of a model makes another sentence. Of long answers the half is taken that it was most certain of,
    eight at least: one token more or less decides of the others. What it said in the bad manner should change. 1 where
    there are too few such rows."""
    pairs = [(old, new) for old, new in certain if not has_phrase(old.output, phrases)]
    long = sorted((old.probability for old, _ in pairs if old.stats.tokens >= PASSAGE), reverse=True)
    least = long[: max(_ENOUGH, (len(long) + 1) // 2)][-1] if long else 0.0
    pairs = [(old, new) for old, new in pairs if old.stats.tokens < PASSAGE or old.probability >= least]
    if len(pairs) < _ENOUGH:
        return 1.0
    return sum(texts.similarity_to(new.output, old.output) for old, new in pairs) / len(pairs)


def say_farewell(request: ForgetRequest, record: Mapping[str, Any], outcome: Outcome) -> None:
    """Say how the run ended and what to type next. Raises TrainingError where training failed."""
    t = record["training"]
    kept = f"the adapter of step {outcome.best.step} was kept"
    say(f"stopped after {t['steps']} steps, {t['seconds']:.0f} s: {outcome.reason}; {kept}")
    if outcome.interrupted:
        stays = status_of_run(request.output) in FINISHED
        say(f"the finished run in {request.output} stays" if stays else f"run folder so far: {request.output}")
        return
    if outcome.skipped:
        warn(f"{outcome.skipped} steps were skipped for non-finite numbers")
    if outcome.failed:
        hint = "lower --lr, or try --quant none; the adapter is in the run folder"
        raise TrainingError(f"{outcome.reason}; {kept}", where=str(request.output), hint=hint)
    m = outcome.multipliers
    if m and any(value != 1 for name, value in m.items() if name in ("forget", "retain", "push", "hold")):
        say(f"multipliers at the end: forget {m['forget'] * m['push']:.3g}, retain {m['retain'] * m['hold']:.3g}")
    if outcome.best.again:
        back = f"{outcome.best.again} of the prompts in other words got the bad answer while training"
        say(f"{back}, and were trained on from there on")
    if record["not_reached"]:
        warn("the target was not reached: " + "; ".join(record["not_reached"]))
        say(f"the adapter is kept in {request.output} all the same; it is no result")
        say(_advice(request.config, outcome), style="bold")
        return
    say(f"run folder: {request.output}")
    trusted = ["--trust-remote-code"] if request.config.model.trust_remote_code else []
    following = command_line("qunlearn", "merge", request.output, "-o", f"{request.output}-merged", *trusted)
    say(f"next: {following}", style="bold")


def _advice(config: Config, outcome: Outcome) -> str:
    """Return what to try next, by what went wrong."""
    if config.objective.name != "logodds" and outcome.still:
        return f"try: the default objective; {config.objective.name} has no gradient where a model is certain"
    if outcome.returns:
        return "try: --normal with rows like those that changed, a smaller --lr, or a larger --max-drift"
    if not outcome.best.met(config.stop):
        return "try: more --steps, or a larger --eps1"
    return "try: a smaller --lr, a larger --eps3, or --normal with rows like those that changed"
