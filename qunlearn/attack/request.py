"""Check what `audit` was asked for, before anything heavy is loaded."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qunlearn.attack.catalog import BUDGETS, EFFORTS, FAMILIES, NAMED, Effort
from qunlearn.attack.facts import Inputs, at_most, in_parts, make_facts
from qunlearn.attack.placebo import make_placebos
from qunlearn.config.fields import MOST_SEED
from qunlearn.config.settings import Config
from qunlearn.data.records import Dataset, Record
from qunlearn.errors import ConfigError, DataError, GuardError, ModelError
from qunlearn.evaluation.request import EvalRequest, Wish, check_eval, find_target
from qunlearn.hub.checked import CheckedModel, check_model
from qunlearn.hub.download import resolve_model
from qunlearn.hub.fingerprint import fingerprint
from qunlearn.merging.llamacpp import MODEL_FILE
from qunlearn.merging.lora_tensors import WEIGHTS
from qunlearn.roles.self_made_file import read_self_made
from qunlearn.runs.folder import open_run
from qunlearn.runs.recorded_files import recorded
from qunlearn.utils.file_names import AUDIT, NORMAL
from qunlearn.utils.json_files import read_object
from qunlearn.utils.output import AUDITS, MARK, Place
from qunlearn.utils.units import parse_size

if TYPE_CHECKING:
    from qunlearn.guard import Guard

FEWEST = 4  # facts of which two halves can be made
_VERSION = 4  # of what a cell holds


@dataclass(frozen=True)
class AuditWish:
    """What is asked for besides model and files. `tolerance`: the share of the facts that may leak; `original`: the
    model before unlearning, where the one under audit is no adapter; `guard`: stands before the model under audit;
    `merged`: what `merge` made of it, a subject of its own."""

    budget: str = "standard"
    only: str | None = None
    tolerance: float = 0.0
    original: str | None = None
    output: Path | None = None
    overwrite: bool = False
    seed: int = 0
    vram: str | None = None
    guard: Guard | None = None
    merged: str | None = None


@dataclass(frozen=True)
class AuditRequest:
    """An audit that can start. `given` is what an evaluation of the same would be given."""

    given: EvalRequest
    original: CheckedModel | None
    inputs: Inputs
    renamed: int  # placebo facts about another subject
    config: Config
    quant: str | None
    wish: AuditWish
    only: frozenset[str]
    merged: CheckedModel | None = None
    gguf: Path | None = None  # the file that `merged` is read from, of the run's base

    @property
    def effort(self) -> Effort:
        return EFFORTS[self.wish.budget]

    @property
    def place(self) -> Place:
        """The audit folder, and what it may replace."""
        inputs = [Path(d.path) for d in self.given.sets.values()] + [self.given.model.folder]
        inputs += [self.given.run.adapter] if self.given.run else []
        inputs += [m.folder for m in (self.given.retrained, self.original, self.merged) if m]
        inputs += [self.gguf] if self.gguf else []
        return Place(self.output, MARK, self.wish.overwrite, tuple(inputs), AUDITS)

    @property
    def output(self) -> Path:
        if self.wish.output is not None:
            return self.wish.output
        return (self.given.output or Path()) / AUDIT

    def identity(self) -> Mapping[str, Any]:
        """Return what decides every cell, the rows as digests: an unfinished audit of anything else is not resumed."""
        import torch

        from qunlearn import __version__
        from qunlearn.model.device import choose_device

        adapter = self.given.run.adapter / WEIGHTS if self.given.run else None
        models = {"model": self.given.model, "control": self.given.retrained, "original": self.original}
        models["merged"] = self.merged
        rows = {name: getattr(self.inputs, name) for name in ("retain", "holdout", "general")}
        rows |= {name: [f.record for f in getattr(self.inputs, name)] for name in ("facts", "placebo")}
        rows["paraphrase"] = [p for fact in self.inputs.facts for p in fact.paraphrases]
        return {
            "audit": _VERSION,
            "qunlearn": __version__,
            "torch": torch.__version__,
            **{name: str(fingerprint(m.folder)) if m else None for name, m in models.items()},
            "adapter": _digest(adapter),
            "gguf": _digest(self.gguf),
            "given": {name: d.sha256 for name, d in sorted(self.given.sets.items())},
            "rows": {name: _digest_of_rows(records) for name, records in sorted(rows.items())},
            "device": str(choose_device(self.config.model.device)),
            "max_length": self.config.data.max_length,
            "how": [self.wish.budget, self.wish.seed, self.quant or self.config.model.quant, sorted(self.only)],
            "template": self.given.template,
            "guard": self.wish.guard.identity if self.wish.guard else None,
        }


def check_audit(
    target: str | None,
    adapter: Path | None,
    model: str | None,
    named: Mapping[str, str | None],
    control: str | None,
    how: tuple[str | None, str | None, str, bool],
    wish: AuditWish,
) -> AuditRequest:
    """Read files, run and models' headers. `how`: quantisation, template, device, whether code that a model brings is
    run. Raises QunlearnErrors."""
    quant, template, device, trust = how
    only = _check_wish(wish)
    if wish.output is not None:  # before a model is fetched; what it must not replace is asked at the end
        Place(wish.output, MARK, wish.overwrite, (), AUDITS).check()
    asked = Wish(retrained=control, trust=trust, guard=wish.guard, retrained_flag="--control")
    run, _ = find_target(target, adapter, model)
    if (
        run is not None and named.get("forget") is None and any(named.values())
    ):  # others were named, and this is the run's
        own = recorded(open_run(run), "bad")
        named = {**named, "forget": None if own.usable is None else str(own.usable)}
    given, form = check_eval(target, adapter, model, None, named, quant, template, asked)
    original = check_model(resolve_model(wish.original, flag="--original"), trust) if wish.original else None
    if original is not None and given.run is not None:
        hint = "the base of an adapter is its original: leave --original out"
        raise ConfigError("the model under audit is an adapter", where="--original", hint=hint)
    if wish.output is None and given.output is None:
        raise ConfigError("a bare model has no run folder", where="audit", hint="-o FOLDER keeps the audit")
    forget = given.sets.get("forget")
    if forget is None:
        raise ConfigError("nothing to audit", where="--forget", hint="give the file of what should be gone")
    inputs, renamed = _inputs(given, forget, wish)
    placed = replace(given.config.model, device=device, vram=wish.vram)
    if device not in ("auto", "cuda"):  # one device, that the user named, holds it
        placed = replace(placed, device_map="none")
    config = replace(given.config, model=placed)
    _check_guard(given, wish)
    merged, gguf = _merged(given, wish, trust)
    request = AuditRequest(given, original, inputs, renamed, config, form, wish, only, merged, gguf)
    request.place.check()
    return request


def _merged(given: EvalRequest, wish: AuditWish, trust: bool) -> tuple[CheckedModel | None, Path | None]:
    """What was made of the run, of the same base, and the GGUF file that holds it. Raises ConfigError, ModelError."""
    if wish.merged is None:
        return None, None
    if given.run is None:
        hint = "qunlearn audit MERGED --original BASE --forget FILE audits a merged folder alone"
        raise ConfigError("only a run has a merged form", where="--merged", hint=hint)
    if (file := _gguf(Path(wish.merged).expanduser())) is not None:
        source = replace(given.model.source, kind="folder", asked=wish.merged, location=str(file), revision=None)
        return replace(given.model, source=source), file
    found = check_model(resolve_model(wish.merged, flag="--merged"), trust)
    mark = found.folder / MARK
    made = read_object(mark, ModelError) if mark.is_file() else {}
    if isinstance(made.get("base"), str) and made["base"] != str(fingerprint(given.model.folder)):
        raise _merged_otherwise("was merged into another base than the run's", wish)
    adapters = made.get("adapters")  # what was written quantised or elsewhere does not say
    ours = _digest(given.run.adapter / WEIGHTS)
    if isinstance(adapters, list) and not any(isinstance(a, dict) and a.get(WEIGHTS) == ours for a in adapters):
        raise _merged_otherwise("was merged from another run", wish)
    return found, None


def _merged_otherwise(what: str, wish: AuditWish) -> ConfigError:
    hint = "give the folder that `qunlearn merge` made of this very run"
    return ConfigError(what, where=f"--merged {wish.merged}", hint=hint)


def _gguf(path: Path) -> Path | None:
    """The GGUF file of a path, or of a folder that `export` made; None for anything else. Raises ConfigError,
    ModelError."""
    inside = path / MODEL_FILE
    file = inside if inside.is_file() and not (path / "config.json").exists() else path
    if file.suffix != ".gguf":
        return None
    if not file.is_file():
        raise ModelError("no such file", where=f"--merged {path}", hint="give a GGUF file, or the folder of a model")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelError("is no GGUF file", where=str(file), hint="it may be broken: export or download it again")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("reading GGUF needs the package gguf", where="--merged", hint="pip install gguf")
    return file


def _check_guard(given: EvalRequest, wish: AuditWish) -> None:
    """Refuse the guard of another base as soon as its fingerprint tells. Raises GuardError."""
    known = wish.guard.base.weights if wish.guard is not None else None
    if known is not None and known != str(fingerprint(given.model.folder)):
        hint = "give the model it was fitted on, or fit again"
        raise GuardError("belongs to another base", where="--guard", hint=hint)


def _check_wish(wish: AuditWish) -> frozenset[str]:
    if wish.budget not in BUDGETS:
        raise ConfigError(f"unknown budget {wish.budget[:40]!r}", where="--budget", hint=f"one of {', '.join(BUDGETS)}")
    if not 0 <= wish.tolerance <= 1:
        raise ConfigError("must be a share between 0 and 1", where="--tolerance", hint="such as 0.05")
    if not 0 <= wish.seed <= MOST_SEED:
        raise ConfigError(f"must be between 0 and {MOST_SEED}", where="--seed", hint="such as 0")
    if wish.vram:
        parse_size(wish.vram, "--vram")
    names = frozenset(part.strip() for part in (wish.only or "").split(",") if part.strip())
    known = {name for family, row in FAMILIES.items() for name in (family, row.letter)}
    if unknown := sorted(names - known - NAMED):
        hint = f"some of {', '.join(FAMILIES)}, letters from A to F, or an attack such as prefix-search, formats.cloze"
        raise ConfigError(f"unknown family {unknown[0][:40]!r}", where="--only", hint=hint)
    return names


def _inputs(given: EvalRequest, forget: Dataset, wish: AuditWish) -> tuple[Inputs, int]:
    effort = EFFORTS[wish.budget]
    asked = in_parts(forget.records)
    if len(asked) < FEWEST:
        hint = "with fewer facts nothing can be told from chance"
        raise DataError(f"an audit needs at least {FEWEST} rows", where=forget.path, hint=hint)
    records = {name: given.sets[name].records if name in given.sets else () for name in ("paraphrase", "holdout")}
    records["general"] = given.sets["general"].records if "general" in given.sets else ()
    retain = given.sets["retain"].records if "retain" in given.sets else _own_retain(given)
    drawn = at_most(range(len(asked)), effort.facts, wish.seed)
    chosen, unmatched = make_facts(asked, records["paraphrase"], drawn)
    if given.retrained is None and not any(fact.asks for fact in chosen):
        raise ConfigError("plain texts have no placebo", where="audit", hint="--control MODEL, that never saw them")
    around = [*retain, *records["holdout"], *asked]
    placebos = make_placebos(chosen, around, wish.seed)
    most = effort.facts * 3
    holdout, retain = at_most(records["holdout"], most, wish.seed), at_most(retain, most, wish.seed)
    inputs = Inputs(chosen, placebos.facts, retain, holdout, at_most(records["general"], most, wish.seed), unmatched)
    return inputs, placebos.renamed


def _own_retain(given: EvalRequest) -> Sequence[Record]:
    """The rows that the run itself kept, where they are still there."""
    run = given.run
    if run is None:
        return ()
    made = run.adapter.parent / NORMAL
    if made.is_file():
        try:
            return read_self_made(made).records
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError("not what a run wrote", where=str(made), hint="give --retain") from error
    path = recorded(run, "normal").usable
    if path is None:
        return ()
    from qunlearn.data.paths import fields_of
    from qunlearn.data.records import read_dataset

    return read_dataset(path, fields_of(given.config.data), role="--retain").records


def _digest_of_rows(records: Sequence[Record]) -> str:
    told = json.dumps([[record.turns, record.completion] for record in records])
    return hashlib.sha256(told.encode()).hexdigest()


def _digest(path: Path | None) -> str | None:
    from qunlearn.utils.files import sha256_of

    return sha256_of(path) if path is not None and path.is_file() else None
