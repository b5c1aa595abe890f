"""`qunlearn guard fit`: train the gate, find the strength of the corruption, and write the guard's folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from qunlearn.config.resolve import resolve
from qunlearn.data.records import Record
from qunlearn.data.shared_text import shared_text
from qunlearn.data.tokenize import Example, Template, choose_template, encode
from qunlearn.guard.calibrate import Threshold, check_missed
from qunlearn.guard.classifier import ClassifierGate, Training, train_classifier
from qunlearn.guard.corrupt import CORRUPTIONS, Corruption
from qunlearn.guard.encoder import Encoder
from qunlearn.guard.entities import Tagger
from qunlearn.guard.gate import Gate, StateReader
from qunlearn.guard.guard import BaseFacts, Guard
from qunlearn.guard.learn import train_gate
from qunlearn.guard.prompts import Prompts, make_prompts
from qunlearn.guard.request import AGNOSTIC, AUTO, ZEROTH, FitRequest, fixed_strength
from qunlearn.guard.strength import AGNOSTIC as AGNOSTIC_TIMES
from qunlearn.guard.strength import Found, bracket, encoded, placebos, row_scores, zeroth_order
from qunlearn.guard.turns import find_frame
from qunlearn.hub.fingerprint import fingerprint
from qunlearn.hub.positions import positions_of
from qunlearn.model.load import Base, LoadSpec, load_base
from qunlearn.roles.self_made import Wanted, self_made_rows
from qunlearn.utils.console import say, stage, warn
from qunlearn.utils.staging import staged

_WINDOW = 256  # tokens of a plain text that a row is held against
_LENGTH, _NEAR, _AT_ONCE = 64, 0.5, 256  # of self-made rows: tokens, share near the bad ones, drawn together
_FEW_BAD, _FEW_NORMAL = 8, 64
_MOST_SCORED = 64  # rows that the strength is searched on
_SAFE = 8.0  # times below what a dtype holds


def fit(request: FitRequest, quant: str, device: str) -> dict[str, Any]:
    """Fit a guard and write it; returns its report, which holds no text of any row. Raises QunlearnErrors."""
    wish, began = request.wish, time.monotonic()
    with stage("loading the model"):
        spec = LoadSpec(quant, device=device, trust_remote_code=wish.trust)
        base = load_base(request.model.folder, spec)
    for note in base.notes:
        warn(note)
    template = choose_template(base.tokenizer, wish.template, request.bad, request.normal)
    normal, made = _normal(request, base, template)
    assumed = _assumed(len(request.bad.records), len(normal), made=made)
    assumed += [f"{found.line}: the gate learns to pass them" for found in shared_text(request.bad, request.normal)]
    for text in assumed:
        warn(text)
    reader = StateReader(base.model, base.tokenizer)
    given = request.normal.records if request.normal is not None else ()
    with stage("training the gate"):
        prompts = make_prompts(request.bad.records, normal, given, wish.seed)
        gate, held = _gate(request, reader, prompts)
    frame = find_frame(template, base.tokenizer)
    facts = BaseFacts.of(base.model, base.tokenizer, fingerprint(request.model.folder))
    tagger = Tagger(Encoder.load(request.ner.folder, labels=None)) if request.ner is not None else None
    guard = Guard(facts, frame, gate, Corruption(wish.corruption, 1.0, wish.dims, wish.seed), wish.tokens, {}, tagger)
    with stage("finding the strength"):
        found, how = _strength(request, base, template, guard, normal, spec)
    report = {
        "rows": {"bad": len(request.bad.records), "normal": len(normal), "self_made": made},
        "prompts": {"bad": len(prompts.bad), "normal": len(prompts.normal)},
        "assumed": assumed,
        "template": template.name,
        "quantization": base.quantization,
        "threshold": {"rule": "conformal" if wish.conformal else "rate", "false_alarms": wish.false_alarms},
        "held_out": held,
        "strength": {**how, "score": found.score, "curve": [list(point) for point in found.curve]},
        "seconds": round(time.monotonic() - began, 1),
    }
    guard = replace(guard, corruption=replace(guard.corruption, strength=found.strength), report=report)
    with staged(request.output) as folder:
        guard.save(folder)
    say(f"the guard is in {request.output.folder}: {report['seconds']} s")
    return {"status": "done", "guard": str(request.output.folder), **report}


def _gate(request: FitRequest, reader: StateReader, prompts: Prompts) -> tuple[Gate | ClassifierGate, dict[str, Any]]:
    """The gate of the wanted kind, and how it did on what was held out. Raises GateError where that is too bad."""
    wish = request.wish
    rule = Threshold(wish.false_alarms, wish.conformal)
    gate: Gate | ClassifierGate
    if request.classifier is None:
        gate, found = train_gate(reader, prompts, rule)
        held = found.as_dict()
    else:
        training = Training(lr=wish.classifier_lr, epochs=wish.classifier_epochs)
        gate, held = train_classifier(request.classifier.folder, prompts, rule, training, reader.device, wish.seed)
    if said := check_missed(held["missed"], held["bad"]):
        warn(said)
    return gate, held


def _normal(request: FitRequest, base: Base, template: Template) -> tuple[list[Record], int]:
    """Rows to pass: those given, and with fewer than are wanted what the base generates; and how many it generated."""
    wish = request.wish
    given = list(request.normal.records) if request.normal is not None else []
    wanted = wish.rows - len(given)
    if wanted < 8:
        return given, 0
    positions = positions_of(base.model.config)
    with stage("generating normal rows"):
        bad = request.bad
        if bad.shape == "text":  # a long text window by window: as one it is like anything that is said
            windows = encode(bad, base.tokenizer, template, min(_WINDOW, positions)).examples
            bad = replace(bad, records=tuple(window.record for window in windows))
        drawn = self_made_rows(base, bad, template, Wanted(wanted, _NEAR, _LENGTH, wish.seed, _AT_ONCE, positions))
    return [*given, *drawn.records], len(drawn.records)


def _assumed(bad: int, normal: int, *, made: int) -> list[str]:
    """Say what had to be assumed where rows are few, or none were given."""
    out = []
    if bad < _FEW_BAD:
        out.append(f"{bad} bad rows: that other wordings are like those made from them is assumed, not measured")
    if normal < _FEW_NORMAL:
        out.append(f"{normal} normal rows: the rate of false alarms is known only roughly")
    if made == normal:
        out.append("no normal rows were given: what should pass is taken to be what the base generates")
    return out


def _strength(
    request: FitRequest, base: Base, template: Template, guard: Guard, normal: Sequence[Record], spec: LoadSpec
) -> tuple[Found, dict[str, Any]]:
    """The strength by the wanted rule, and what it was led by."""
    wish, table = request.wish, base.model.get_input_embeddings().weight
    norm = float(table.detach().float().norm(dim=-1).mean())
    most = torch.finfo(table.dtype).max / _SAFE
    rule, surrogate, source = wish.strength, None, "none"
    examples = encode(request.bad, base.tokenizer, template, _limit(base)).examples[:_MOST_SCORED]
    framed = bool(guard.frame.opening and guard.frame.between)
    if rule in (AUTO, ZEROTH):
        surrogate, source = _surrogate(request, base, template, normal, examples, spec, framed=framed)
        if surrogate is None:
            rule, source = AGNOSTIC, "no subject was found for placebo facts"

    def score(strength: float) -> float:
        tried = replace(guard, corruption=replace(guard.corruption, strength=strength))
        with tried.on(base.model, base.tokenizer) as attachment:
            attachment.force = True
            return row_scores(base, examples, max_tokens, framed=framed)

    max_tokens = resolve().train.pass_tokens
    how = {"rule": rule, "surrogate": surrogate, "source": source, "norm": norm}
    if not CORRUPTIONS[wish.corruption].strength:
        return Found(1.0, score(1.0), ()), {**how, "rule": "the function has none"}
    if rule == AGNOSTIC or surrogate is None:
        value = min(AGNOSTIC_TIMES * norm, most) if rule == AGNOSTIC else fixed_strength(wish.strength)
        return Found(value, score(value), ()), how
    if rule == ZEROTH:
        return zeroth_order(score, surrogate, most), how
    return bracket(score, surrogate, norm, most), how


def _surrogate(
    request: FitRequest,
    base: Base,
    template: Template,
    normal: Sequence[Record],
    examples: Sequence[Example],
    spec: LoadSpec,
    *,
    framed: bool,
) -> tuple[float | None, str]:
    """What a model that never knew would score, and how that is known; None where nothing tells."""
    limit = resolve().train.pass_tokens
    if request.retrained is not None:
        other = load_base(request.retrained.folder, spec)
        rows = encoded([e.record for e in examples], other, template, _limit(other))
        return row_scores(other, rows, limit, framed=framed), "the retrained model"
    records = placebos(request.bad.records, normal, request.wish.seed)[:_MOST_SCORED]
    if not records:
        return None, ""
    rows = encoded(records, base, template, _limit(base))
    return row_scores(base, rows, limit, framed=framed), f"{len(rows)} placebo facts"


def _limit(base: Base) -> int:
    return min(resolve().data.max_length, positions_of(base.model.config))
