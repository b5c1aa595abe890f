"""Measure a merge: the runs' rows under base, adapter, merged and quantised model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qunlearn.config.settings import Config
from qunlearn.data.batch import ALL, collate
from qunlearn.data.tokenize import Example, Template, choose_template, encode
from qunlearn.errors import DataError
from qunlearn.evaluation.before_after import Scores, score_sets, show_sets
from qunlearn.evaluation.metrics import SetScore, aggregate
from qunlearn.hub.positions import positions_of
from qunlearn.merging.request import MergeRequest, MergeSource
from qunlearn.model.head import token_kl
from qunlearn.model.language_model import LanguageModel
from qunlearn.model.load import Base, LoadSpec, load_base, load_spec
from qunlearn.model.policy import Policy
from qunlearn.parallel.ranks import current
from qunlearn.roles.other_subjects import other_subject
from qunlearn.roles.split import sampled, split_held_back
from qunlearn.utils.console import say, stage, warn

BAD, HELD_BACK = "bad answers", "normal, held back"
# Said again by so much more than under the adapter, or as probable as this: more than rounding explains.
_MATCHES_MORE, _TIMES_AS_PROBABLE = 0.05, 2.0


@dataclass(frozen=True)
class Subject:
    """One run's rows, and its adapter's hidden states (T, D) on the bad ones, by their places.

    Of several processes each has the states of its share.
    """

    name: str
    config: Config
    sets: Mapping[str, Sequence[Example]]
    hidden: Mapping[int, Tensor]

    def titled(self, scores: Scores) -> dict[str, Any]:
        return {f"{name}{self.name}": rows for name, rows in scores.items()}


@dataclass(frozen=True)
class Column:
    """The scores of all sets under one form of the model."""

    name: str
    scores: Scores

    def of(self, title: str) -> SetScore:
        return aggregate(self.scores[title])


@dataclass
class Comparison:
    """What is known of a merge so far: the runs' rows, and a column for each form of the model that was measured."""

    subjects: Sequence[Subject]
    columns: list[Column]
    spec: LoadSpec
    divergence: float | None = None

    def scores(self) -> dict[str, dict[str, SetScore]]:
        """Column -> set -> score."""
        return {column.name: {title: column.of(title) for title in column.scores} for column in self.columns}

    def back(self) -> list[str]:
        """The forms of the merged model in which some run's bad answers are back."""
        return gates_failed(self.columns, self.subjects)

    def show(self) -> None:
        if any(column.scores for column in self.columns):
            show_sets("What the merged model says", [(column.name, column.scores) for column in self.columns])
        if self.divergence is not None:
            say(f"KL(adapter || merged): {self.divergence:.5f} nats/token")


def before(request: MergeRequest, device: str) -> Comparison:
    """Each run's rows under its base and its own adapter, as they were trained. One run at a time is in memory.

    Several processes divide the rows, here and in `after`; each has what all found.
    """
    subjects: list[Subject] = []
    base: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    for called, source in zip(request.names, request.sources, strict=True):
        with stage(f"measuring {source.run.adapter} on its base"):
            spec = load_spec(source.config.model, device=device)
            policy = Policy.load(load_base(request.model.folder, spec), source.run.adapter)
            sets = _sets(source, policy)
            name = f" of {called}" if len(request.sources) > 1 else ""
            limit = source.config.train.pass_tokens
            with policy.reference():
                base_scores = score_sets(policy, sets, limit)
            bad = sets.get(BAD, ())
            hidden = {i: _hidden(policy, bad[i]).cpu() for i in current().share(range(len(bad)))}
            subject = Subject(name, source.config, sets, hidden)
            base |= subject.titled(base_scores)
            adapter |= subject.titled(score_sets(policy, sets, limit))
        subjects.append(subject)
        del policy
    plain = LoadSpec("none", False, device, request.sources[0].config.model.trust_remote_code)
    return Comparison(subjects, [Column("base", base), Column("adapter", adapter)], plain)


def after(comparison: Comparison, folder: Path, gates: Sequence[str]) -> None:
    """The same rows under the model that was written, and under what it becomes quantised: it adds their columns."""
    if not any(subject.sets for subject in comparison.subjects):
        return
    with stage("measuring what was written"):
        written = load_base(folder, comparison.spec)
        comparison.columns.append(_column("merged", written, comparison.subjects))
        kls = [kl for subject in comparison.subjects if (kl := _divergence(written, subject)) is not None]
        comparison.divergence = max(kls, default=None)
    del written
    for quant in gates:
        with stage(f"measuring what was written, as {quant}"):
            written = load_base(folder, replace(comparison.spec, quant=quant, double_quant=True))
            comparison.columns.append(_column(quant, written, comparison.subjects))


def after_quantized(comparison: Comparison, folder: Path, name: str) -> None:
    """The same rows under a model that was written quantised: it adds its column."""
    if any(subject.sets for subject in comparison.subjects):
        with stage("measuring what was written"):
            comparison.columns.append(_column(name, load_base(folder, comparison.spec), comparison.subjects))


def _column(name: str, lm: LanguageModel, subjects: Sequence[Subject]) -> Column:
    scores: dict[str, Any] = {}
    for subject in subjects:
        scores |= subject.titled(score_sets(lm, subject.sets, subject.config.train.pass_tokens))
    return Column(name, scores)


def _divergence(written: Base, subject: Subject) -> float | None:
    """KL(adapter on its base || merged) on the bad rows, nats per token; the head is the same in both."""
    rows = subject.sets.get(BAD, ())

    def of_tokens(places: Sequence[int]) -> list[list[float]]:
        pairs = ((_hidden(written, rows[i]), subject.hidden[i].to(written.device)) for i in places)
        return [token_kl(now, then, written.head).double().tolist() for now, then in pairs]

    kls = [kl for row in current().divided(range(len(rows)), of_tokens) for kl in row]
    return float(torch.tensor(kls, dtype=torch.float64).mean()) if kls else None


def came_back(adapter: SetScore, now: SetScore, target: float) -> bool:
    """Said again word for word, or probable again: by more than rounding explains."""
    probable = now.probability > max(target, _TIMES_AS_PROBABLE * adapter.probability)
    return now.exact_match > adapter.exact_match + _MATCHES_MORE or probable


def gates_failed(columns: Sequence[Column], subjects: Sequence[Subject]) -> list[str]:
    """The names of the columns behind base and adapter in which some run's bad answers are back."""
    adapter, failed = columns[1], []
    for column in columns[2:]:
        for subject in subjects:
            title, target = f"{BAD}{subject.name}", subject.config.stop.target
            if title in column.scores and came_back(adapter.of(title), column.of(title), target):
                failed.append(column.name)
                break
    return failed


@torch.no_grad()
def _hidden(lm: LanguageModel, row: Example) -> Tensor:
    batch = collate([row], ALL, lm.tokenizer.pad_token_id).to(lm.device)
    return batch.pick(lm.hidden(batch))


def _sets(source: MergeSource, policy: Policy) -> dict[str, Sequence[Example]]:
    """The run's bad rows and what it held back of its normal data, where they are still to be found."""
    if source.forget_rows is None:
        warn(f"the bad file of {source.name} {source.no_bad}: nothing is measured (give --bad)")
        return {}
    data, rows, seed = source.config.data, source.config.stop.table_rows, source.config.train.seed
    longest = positions_of(policy.base.model.config)
    stored = source.run.record.get("data", {}).get("template")
    files = (source.forget_rows, source.retain_rows)
    template = Template(**stored) if stored else choose_template(policy.tokenizer, data.template, *files)
    encoded = encode(source.forget_rows, policy.tokenizer, template, min(data.max_length, longest))
    sets: dict[str, Sequence[Example]] = {BAD: sampled(encoded.examples, rows, seed)}  # as in the run's table
    if source.retain_rows is None:
        say(f"the normal data of {source.name} is not there as the run had it: what it held back is not measured")
    else:
        length = min(data.max_length if data.normal else 2 * data.max_length, longest)  # as the run encoded them
        retain_rows = encode(source.retain_rows, policy.tokenizer, template, length, drop_long=True)
        try:
            subject = other_subject(source.forget_rows.records)
            _, held_back = split_held_back(retain_rows.examples, data.held_back, seed, subject)
        except DataError:  # a single row: the run's file was another one
            held_back = []
        if len(held_back) == source.run.record.get("data", {}).get("normal", {}).get("held_back"):
            sets[HELD_BACK] = sampled(held_back, rows, seed)
        else:
            say(f"the normal data of {source.name} has changed: what it held back is not measured")
    return sets
