"""What a merge did to what should be forgotten: scores of the runs' rows under base, adapter, merged and quantised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qunlearn.carry import MergeRequest, MergeSource
from qunlearn.config import Config
from qunlearn.console import say, stage, warn
from qunlearn.data.batch import ALL, collate
from qunlearn.data.roles import split_held_back
from qunlearn.data.tokenize import Example, Template, choose_template, encode
from qunlearn.errors import DataError
from qunlearn.evaluate.metrics import SetScore, aggregate
from qunlearn.evaluate.suite import Scores, score_sets
from qunlearn.model.head import token_kl
from qunlearn.model.load import Base, LanguageModel, LoadSpec, load_base
from qunlearn.model.policy import Policy

BAD, HELD_BACK = "bad answers", "normal, held back"
# Said again by so much more than under the adapter, or as probable as this: more than rounding explains.
_MATCHES_MORE, _TIMES_AS_PROBABLE = 0.05, 2.0


@dataclass(frozen=True)
class Subject:
    """One run's rows, and its adapter's hidden states (T, D) on the bad ones."""

    name: str
    config: Config
    sets: Mapping[str, Sequence[Example]]
    hidden: Sequence[Tensor]

    def titled(self, scores: Scores) -> dict[str, Any]:
        return {f"{name}{self.name}": rows for name, rows in scores.items()}


@dataclass(frozen=True)
class Column:
    """The scores of all sets under one form of the model."""

    name: str
    scores: Scores

    def of(self, title: str) -> SetScore:
        return aggregate(self.scores[title])


def before(request: MergeRequest, spec: LoadSpec) -> tuple[list[Subject], list[Column]]:
    """Each run's rows under its base and its own adapter, as they were trained. One run at a time is in memory."""
    subjects: list[Subject] = []
    base: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    for source in request.sources:
        with stage(f"measuring {source.run.adapter} on its base"):
            policy = Policy.load(load_base(request.model.folder, spec), source.run.adapter)
            sets = _sets(source, policy)
            name = f" of {source.name}" if len(request.sources) > 1 else ""
            limit = source.config.train.max_tokens
            with policy.reference():
                base_scores = score_sets(policy, sets, limit)
            subject = Subject(name, source.config, sets, [_hidden(policy, row).cpu() for row in sets.get(BAD, ())])
            base |= subject.titled(base_scores)
            adapter |= subject.titled(score_sets(policy, sets, limit))
        subjects.append(subject)
        del policy
    return subjects, [Column("base", base), Column("adapter", adapter)]


def after(name: str, lm: LanguageModel, subjects: Sequence[Subject]) -> Column:
    """The same rows under a model that was written."""
    scores: dict[str, Any] = {}
    for subject in subjects:
        scores |= subject.titled(score_sets(lm, subject.sets, subject.config.train.max_tokens))
    return Column(name, scores)


def gate(folder: Path, quant: str, spec: LoadSpec, subjects: Sequence[Subject]) -> Column:
    """The written model quantised as it is loaded, and measured: what a user of the smaller form will see."""
    with stage(f"measuring what was written, as {quant}"):
        return after(quant, load_base(folder, LoadSpec(quant, True, spec.device, spec.trust_remote_code)), subjects)


def divergence(written: Base, subject: Subject) -> float | None:
    """KL(adapter on its base || merged) on the bad rows, nats per token; the head is the same in both."""
    kls = [
        token_kl(_hidden(written, row), h.to(written.device), written.head).double()
        for row, h in zip(subject.sets.get(BAD, ()), subject.hidden, strict=True)
    ]
    return float(torch.cat(kls).mean()) if kls else None


def came_back(adapter: SetScore, now: SetScore, target: float) -> bool:
    """Said again word for word, or probable again: by more than rounding explains."""
    probable = now.probability > max(target, _TIMES_AS_PROBABLE * adapter.probability)
    return now.exact_match > adapter.exact_match + _MATCHES_MORE or probable


def gates_failed(columns: Sequence[Column], subjects: Sequence[Subject]) -> list[str]:
    """The forms of the merged model in which some run's bad answers are back. columns: base, adapter, then those."""
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
    if source.bad is None:
        warn(f"the bad file of {source.name} is not where the run found it: nothing is measured (give --bad)")
        return {}
    data, rows = source.config.data, source.config.stop.table_rows
    longest = _positions(policy)
    stored = source.run.record.get("data", {}).get("template")
    template = Template(**stored) if stored else choose_template(policy.tokenizer, data.template, source.bad)
    encoded = encode(source.bad, policy.tokenizer, template, min(data.max_length, longest))
    sets: dict[str, Sequence[Example]] = {BAD: encoded.examples[:rows]}
    if source.normal is None:
        say(f"the normal data of {source.name} is not there as the run had it: what it held back is not measured")
    else:
        length = min(data.max_length, longest) if data.normal else 2 * data.max_length  # as the run encoded them
        normal = encode(source.normal, policy.tokenizer, template, length)
        try:
            _, held_back = split_held_back(normal.examples, data.held_back, source.config.train.seed)
        except DataError:  # a single row: the run's file was another one
            held_back = []
        if len(held_back) == source.run.record.get("data", {}).get("normal", {}).get("held_back"):
            sets[HELD_BACK] = held_back[:rows]
        else:
            say(f"the normal data of {source.name} has changed: what it held back is not measured")
    return sets


def _positions(policy: Policy) -> int:
    """The most tokens the model's position embeddings admit."""
    config = policy.base.model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 30)
