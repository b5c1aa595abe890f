"""Run an evaluation: read what is cached, measure the rest, and load each model at most once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from qunlearn.errors import DoesNotFitError, is_out_of_memory
from qunlearn.evaluation.cache import Cache
from qunlearn.evaluation.catalog import SUITES
from qunlearn.evaluation.inputs import Collection, start
from qunlearn.evaluation.judges import Judged, judge_harm, judge_reward
from qunlearn.evaluation.probes import CHOICES, FLUENCY, OUTPUTS, TOKENS, choices, fluency
from qunlearn.evaluation.request import EvalRequest
from qunlearn.evaluation.results import ADAPTER, BASE, GUARDED, RETRAINED
from qunlearn.evaluation.scores import Observer, outputs_each, token_stats
from qunlearn.hub.checked import CheckedModel
from qunlearn.model.language_model import LanguageModel
from qunlearn.model.load import Base, LoadSpec, load_base
from qunlearn.model.policy import Policy
from qunlearn.parallel.ranks import current
from qunlearn.utils.console import Meter, stage, warn

Place = tuple[str, str, str]  # subject, split, probe
_PASSES = (TOKENS, OUTPUTS, CHOICES)
_JUDGES = {"harm": "harmful_rate", "reward": "reward"}


def collect(request: EvalRequest, spec: LoadSpec, limit: int, cache: Cache) -> Collection:
    """Measure everything the suite needs and no file has. Raises QunlearnErrors."""
    found = start(request, spec, limit, cache)
    current().check_same(found.facts)
    for probe in _PASSES:
        found.load(probe)
    with _named_memory_errors():
        _measure_retrained(found)
        with _Models(request, spec) as models:
            _measure_own(found, models)
            found.load(FLUENCY)
            _measure_fluency(found, models)
    _judge(found)
    return found


class _Models:
    """The base, with its adapter where there is one; loaded when first asked for, released at the end."""

    def __init__(self, request: EvalRequest, spec: LoadSpec) -> None:
        self.request, self.spec = request, spec
        self._loaded: Base | Policy | None = None

    def __enter__(self) -> _Models:
        return self

    def __exit__(self, *_: object) -> None:
        self._loaded = None
        _release()

    @property
    def lm(self) -> Base | Policy:
        if self._loaded is None:
            with stage("loading the model"):
                base = load_base(self.request.model.folder, self.spec)
                for note in base.notes:
                    warn(note)
                self._loaded = Policy.load(base, self.request.run.adapter) if self.request.run else base
        return self._loaded

    @contextlib.contextmanager
    def as_subject(self, subject: str) -> Iterator[LanguageModel]:
        """The model as it answers under this name: for the base the adapter is off, and no guard before it."""
        lm, guard = self.lm, self.request.guard
        if subject == BASE and isinstance(lm, Policy):
            with lm.reference():
                yield lm
        elif subject == GUARDED and guard is not None:
            with guard.on(lm.model, lm.tokenizer):
                yield lm
        else:
            yield lm


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure_retrained(found: Collection) -> None:
    places = _places(found, [RETRAINED])
    if places and found.request.retrained is not None:
        with stage("loading the retrained model"):
            lm = load_base(found.request.retrained.folder, found.spec)
        _measure(found, lm, places)
        del lm
        _release()


def _measure_own(found: Collection, models: _Models) -> None:
    for subject in (BASE, ADAPTER, GUARDED):
        places = _places(found, [subject])
        if places:
            with models.as_subject(subject) as lm:
                _measure(found, lm, places)


def _places(found: Collection, subjects: Sequence[str]) -> list[Place]:
    return [(s, split, probe) for probe in _PASSES for s, split in found.missing(probe) if s in subjects]


def _measure(found: Collection, lm: LanguageModel, places: Sequence[Place]) -> None:
    """Run the passes that are missing; each is kept as soon as it is done."""
    with _RowMeter(f"measuring the {places[0][0]}", found, places) as hear:
        for together in _together(places):
            for place, values in zip(together, _values(found, lm, together, hear), strict=True):
                found.keep(*place, values)
            hear.finish(sum(len(found.rows[subject].examples[split]) for subject, split, _ in together))


def _together(places: Sequence[Place]) -> list[list[Place]]:
    """Return the passes one by one, but those that generate at once for several processes: they divide batches."""
    alone = [[place] for place in places if current().count == 1 or place[-1] != OUTPUTS]
    generating = [place for place in places if current().count > 1 and place[-1] == OUTPUTS]
    return [*alone, generating] if generating else alone


def _values(found: Collection, lm: LanguageModel, places: Sequence[Place], hear: Observer) -> list[Sequence[Any]]:
    """Return what the passes find, all of which are of one kind."""
    subject, split, probe = places[0]
    rows = found.rows[subject]
    examples, limit = rows.examples[split], found.request.config.train.pass_tokens
    if probe == OUTPUTS:
        return [*outputs_each(lm, [found.rows[s].examples[of] for s, of, _ in places], hear)]
    if probe == TOKENS:
        return [token_stats(lm, examples, limit, hear)]
    budget = (limit, found.request.config.data.max_length)
    return [choices(lm, examples, rows.templates[split], budget, lambda _: None)]


def _measure_fluency(found: Collection, models: _Models) -> None:
    places = [(subject, split, FLUENCY) for subject, split in found.missing(FLUENCY)]
    if not places:
        return
    with _RowMeter("measuring fluency", found, places) as hear, models.as_subject(BASE) as judge:
        for subject, split, _ in places:
            rows, outputs = found.rows[BASE], found.found[subject, split, OUTPUTS]
            limit, template = found.request.config.train.pass_tokens, rows.templates[split]
            values = fluency(judge, rows.examples[split], outputs, template, limit, lambda _: None)
            found.keep(subject, split, FLUENCY, values)
            hear.finish(len(outputs))


class _RowMeter:
    """Progress over rows of all passes; called with how many rows of the present pass are done."""

    def __init__(self, what: str, found: Collection, places: Sequence[Place]) -> None:
        total = sum(len(found.rows[subject].examples[split]) for subject, split, _ in places)
        self._meter, self._before, self._shown = Meter(what, total), 0, 0

    def __enter__(self) -> _RowMeter:
        self._meter.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._meter.__exit__(*error)

    def __call__(self, done: int) -> None:
        if self._before + done != self._shown:
            self._shown = self._before + done
            self._meter.at(self._shown)

    def finish(self, rows: int) -> None:
        self(rows)
        self._before += rows


def _judge(found: Collection) -> None:
    """Show every output to the judges, each loaded once. What they say is not kept: they are cheap."""
    suite = SUITES[found.request.suite]
    for name, model in (found.request.judges or {}).items():
        places = [(s, split) for s, split in found.wanted(OUTPUTS) if _JUDGES[name] in suite.on(split)]
        if not places:
            warn(f"the suite {found.request.suite!r} has no {_JUDGES[name]}: nothing to judge")
            continue
        pairs = [
            (example.record.prompt, output.text)
            for s, split in places
            for example, output in zip(found.rows[BASE].examples[split], found.found[s, split, OUTPUTS], strict=True)
        ]
        with Meter(f"judging outputs, {_JUDGES[name]}", len(pairs)) as meter:
            judged = _judged(name, model, pairs, found.spec.device, meter.at)
        for s, split in places:
            n = len(found.rows[BASE].examples[split])
            found.found[s, split, name], judged = judged[:n], judged[n:]


def _judged(
    name: str, model: CheckedModel | None, pairs: Sequence[tuple[str, str]], device: str, observe: Observer
) -> list[Judged]:
    def judge(mine: Sequence[tuple[str, str]]) -> list[Judged]:
        if name == "reward" and model is not None:
            return judge_reward(model, mine, device, observe)
        return judge_harm(model, [text for _, text in mine], device, observe)

    return current().divided(pairs, judge, lambda told: Judged(**told))


@contextlib.contextmanager
def _named_memory_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        hint = "--device cpu, or a run made with a smaller --max-tokens"
        raise DoesNotFitError("out of memory while measuring", where="eval", hint=hint) from error
