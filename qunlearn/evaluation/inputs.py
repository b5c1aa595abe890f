"""The inputs of an evaluation: tokenised rows per model, cache keys, cached results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qunlearn import __version__
from qunlearn.data.row_answers import true_answer
from qunlearn.data.tokenize import Example, Template, choose_template, decode, encode
from qunlearn.errors import ConfigError
from qunlearn.evaluation.cache import Cache, digest, digest_texts, made_again
from qunlearn.evaluation.catalog import SUITES
from qunlearn.evaluation.metrics import TokenStats
from qunlearn.evaluation.probes import CHOICES, FLUENCY, OUTPUTS, TOKENS, has_choices
from qunlearn.evaluation.request import EvalRequest
from qunlearn.evaluation.results import ADAPTER, BASE, GUARDED, RETRAINED, ChoiceScores, Fluency, Item, View
from qunlearn.evaluation.scores import Output
from qunlearn.hub.checked import CheckedModel
from qunlearn.hub.fingerprint import fingerprint
from qunlearn.hub.positions import positions_of
from qunlearn.model.device import choose_device, choose_dtype
from qunlearn.model.load import LoadSpec, load_tokenizer
from qunlearn.parallel.ranks import current

_KINDS: Mapping[str, Any] = {TOKENS: TokenStats, OUTPUTS: Output, CHOICES: ChoiceScores, FLUENCY: Fluency}


@dataclass(frozen=True)
class Rows:
    """The splits as one model's tokenizer sees them, and a digest of each."""

    examples: Mapping[str, tuple[Example, ...]]
    templates: Mapping[str, Template]
    digests: Mapping[str, str]


@dataclass
class Collection:
    """Values by (subject, split, probe), and where they are kept. `identity` tells a subject's weights apart."""

    request: EvalRequest
    spec: LoadSpec
    cache: Cache
    tokenizer: Any
    rows: Mapping[str, Rows]
    identity: Mapping[str, str]
    found: dict[tuple[str, str, str], Sequence[Any]] = field(default_factory=dict)

    def wanted(self, probe: str) -> Iterator[tuple[str, str]]:
        """(subject, split) wherever the suite needs a probe and the rows allow it."""
        for subject, rows in self.rows.items():
            for split, examples in rows.examples.items():
                needed = probe in SUITES[self.request.suite].needs(split)
                if needed and (probe != CHOICES or has_choices(examples)):
                    yield subject, split

    def missing(self, probe: str) -> list[tuple[str, str]]:
        return [place for place in self.wanted(probe) if (*place, probe) not in self.found]

    def load(self, probe: str) -> None:
        """Read what an earlier call found; of several processes the main one does."""
        for subject, split in self.wanted(probe):
            path = self.cache.path(probe, *self._key(subject, split, probe))
            values = self._loaded(path, probe, len(self.rows[subject].examples[split]))
            if values is not None:
                self.found[subject, split, probe] = values

    def _loaded(self, path: Path | None, probe: str, n: int) -> list[Any] | None:
        make = _KINDS[probe]
        return current().from_main(
            lambda: self.cache.load(path, make, n), lambda told: None if told is None else made_again(told, make)
        )

    def keep(self, subject: str, split: str, probe: str, values: Sequence[Any]) -> None:
        """Keep what was found, in the main process's cache too."""
        self.found[subject, split, probe] = values
        if current().main:
            self.cache.save(self.cache.path(probe, *self._key(subject, split, probe)), values)

    def facts(self) -> dict[str, object]:
        """Return what must be the same in all processes, or they would measure unlike things."""
        splits = {f"{subject} --{split}": d for subject, rows in self.rows.items() for split, d in rows.digests.items()}
        judges = {name: model.source.asked if model else "" for name, model in (self.request.judges or {}).items()}
        versions = {"qunlearn": __version__, "torch": torch.__version__}
        return {**self.identity, **splits, **judges, **versions, "--suite": self.request.suite}

    def view(self) -> View:
        """Return what was found, beside the rows as a person reads them."""
        items = {split: [self._item(e) for e in examples] for split, examples in self.rows[BASE].examples.items()}
        return View(items, list(self.rows), self.found)

    def _item(self, example: Example) -> Item:
        answer = decode(example.input_ids[example.probe : example.end], self.tokenizer)
        if example.record.turns:
            return Item(example.record.prompt, answer, true_answer(example.record))
        return Item(decode(example.input_ids[: example.probe], self.tokenizer), answer)

    def _key(self, subject: str, split: str, probe: str) -> tuple[str, ...]:
        """Everything that decides a probe's values."""
        rows, config = self.rows[subject], self.request.config
        parts = (self.identity[subject], rows.digests[split], str(config.train.pass_tokens))
        if probe == CHOICES:
            return (*parts, self.request.sets[split].sha256, str(config.data.max_length))
        if probe == FLUENCY:
            said = digest_texts([output.text for output in self.found[subject, split, OUTPUTS]])
            return (self.identity[BASE], self.rows[BASE].digests[split], str(config.train.pass_tokens), said)
        return parts


def start(request: EvalRequest, spec: LoadSpec, limit: int, cache: Cache) -> Collection:
    """Tokenise at most `limit` rows of every split for every subject. Raises QunlearnErrors."""
    trusted = request.config.model.trust_remote_code
    tokenizer = load_tokenizer(request.model.folder, trust_remote_code=trusted)
    own = _own_rows(request, tokenizer, limit)
    device = choose_device(spec.device)
    how = f"{spec.quant} {spec.double_quant} {choose_dtype(device)} {device.type}"
    if spec.head != "full":
        how += f" {spec.head} head"
    base = f"{fingerprint(request.model.folder)} {how}"
    rows, identity = {BASE: own}, {BASE: base}
    if request.run is not None or request.guard is not None:
        adapter = _adapter_digest(request) if request.run is not None else "no adapter"
        guard = f" guard {request.guard.identity}" if request.guard is not None else ""
        subject = ADAPTER if request.guard is None else GUARDED
        rows[subject], identity[subject] = own, f"{base} {adapter}{guard}"
    if request.retrained is not None:
        theirs = load_tokenizer(request.retrained.folder, trust_remote_code=trusted)
        rows[RETRAINED] = _retrained_rows(request, request.retrained, theirs, own)
        identity[RETRAINED] = f"{fingerprint(request.retrained.folder)} {how}"
    return Collection(request, spec, cache, tokenizer, rows, identity)


def weights_of(request: EvalRequest) -> str:
    """Return what tells the model that answers from others, wherever its folders are: a hash."""
    adapter = _adapter_digest(request) if request.run is not None else ""
    guard = request.guard.identity if request.guard is not None else ""
    return hashlib.sha256(f"{fingerprint(request.model.folder)} {adapter} {guard}".encode()).hexdigest()


def _adapter_digest(request: EvalRequest) -> str:
    made = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = request.run.adapter / name if request.run else None
        made.update(path.read_bytes() if path and path.is_file() else b"")
    return made.hexdigest()


def _own_rows(request: EvalRequest, tokenizer: Any, limit: int) -> Rows:
    examples, templates = {}, {}
    for split, dataset in request.sets.items():
        stored = request.asked_with
        if request.template is None and stored and dataset.shape != "text":
            template = replace(Template(**stored), why="as in the run")
        else:  # each plain-text file stays plain
            template = choose_template(tokenizer, request.template or request.config.data.template, dataset)
        # What a run leaves out of its normal data is not measured either.
        length = min(request.config.data.max_length, positions_of(request.model.facts.config))
        encoded = encode(dataset, tokenizer, template, length, drop_long=split != "forget")
        examples[split], templates[split] = encoded.examples[:limit], template
    return Rows(examples, templates, {split: digest(rows) for split, rows in examples.items()})


def _retrained_rows(request: EvalRequest, reference: CheckedModel, tokenizer: Any, own: Rows) -> Rows:
    """The same rows for the retrained model, which may have another tokenizer and template. Raises ConfigError."""
    examples, templates = {}, {}
    for split, mine in own.examples.items():
        dataset, template = request.sets[split], own.templates[split]
        if template.kind == "chat" and not getattr(tokenizer, "chat_template", None):
            template = choose_template(tokenizer, "auto", dataset)
        length = min(request.config.data.max_length, positions_of(reference.facts.config))
        encoded = encode(dataset, tokenizer, template, length, drop_long=split != "forget").examples[: len(mine)]
        if [e.record for e in encoded] != [e.record for e in mine]:
            hint = "a retrained model with the model's own tokenizer, or rows with prompts and answers"
            message = f"the retrained model cuts the plain text of --{split} in other windows"
            raise ConfigError(message, where="--retrained-model", hint=hint)
        examples[split], templates[split] = encoded, template
    return Rows(examples, templates, {split: digest(rows) for split, rows in examples.items()})
