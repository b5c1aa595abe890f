"""Check what `guard fit` was asked for, before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qunlearn.data.paths import data_path
from qunlearn.data.records import Dataset, check_overlap, read_dataset
from qunlearn.errors import ConfigError
from qunlearn.hub.checked import CheckedModel, check_model, fetch_all
from qunlearn.hub.download import resolve_model
from qunlearn.utils.output import GUARDS, MARK, Place

AUTO, ZEROTH, AGNOSTIC = "auto", "zeroth", "agnostic"
FUNCTIONS = (
    "noise-first", "noise-random", "noise-top", "set-noise-first", "add-first", "zero-first", "zero-top", "flip-first",
    "flip-top", "reverse-order", "shuffle",
)  # fmt: skip
SUBJECT = "subject"
TOKENS = ("all", "turn", SUBJECT)


@dataclass(frozen=True)
class FitWish:
    """How to fit. strength: auto (bracketing), zeroth, agnostic, or a number; rows: self-made ones without a file."""

    corruption: str = "noise-first"
    dims: int = 1
    tokens: str = "turn"
    strength: str = AUTO
    false_alarms: float = 0.01
    conformal: bool = False
    rows: int = 384
    seed: int = 0
    template: str = "auto"
    trust: bool = False
    overwrite: bool = False
    classifier_lr: float = 2e-5
    classifier_epochs: int = 30


@dataclass(frozen=True)
class ModelNames:
    """The models that a fit reads, as they were named: the base, one that never saw the bad rows, an encoder that is to
    be the gate, and one that tags names."""

    model: str
    retrained: str | None = None
    classifier: str | None = None
    ner: str | None = None


@dataclass(frozen=True)
class FitRequest:
    """A fit that can start. normal: rows to pass, where a file was given; the models are those of `ModelNames`."""

    model: CheckedModel
    bad: Dataset
    normal: Dataset | None
    retrained: CheckedModel | None
    classifier: CheckedModel | None
    ner: CheckedModel | None
    output: Place
    wish: FitWish


def check_fit(names: ModelNames, bad: str, normal: str | None, output: Path, wish: FitWish) -> FitRequest:
    """Read the files and the models' headers, and ask whether the output may be written. Raises QunlearnErrors."""
    for flag, value, allowed in (("--corrupt", wish.corruption, FUNCTIONS), ("--tokens", wish.tokens, TOKENS)):
        if value not in allowed:
            raise ConfigError(f"unknown value {value[:40]!r}", where=flag, hint=f"one of {', '.join(allowed)}")
    if names.ner is not None and wish.tokens != SUBJECT:
        hint = f"--tokens {SUBJECT}, or leave --ner out"
        raise ConfigError(f"tells the tokens of a subject, and --tokens is {wish.tokens}", where="--ner", hint=hint)
    if wish.strength not in (AUTO, ZEROTH, AGNOSTIC):
        fixed_strength(wish.strength)
    files = [Path(data_path(text)) for text in (bad, normal) if text is not None]
    rows = read_dataset(files[0], role="--bad")
    passing = read_dataset(files[1], role="--normal") if normal is not None else None
    if passing is not None:
        check_overlap(rows, passing)
    flags = {"--retrained-model": names.retrained, "--classifier": names.classifier, "--ner": names.ner}
    sources = [(resolve_model(name, flag=flag) if name else None) for flag, name in flags.items()]
    Place(output, MARK, wish.overwrite, tuple(files), GUARDS).check()  # before a model is fetched
    fetch_all([source for source in sources if source])
    checked = check_model(resolve_model(names.model), wish.trust)
    retrained, classifier, ner = (check_model(source) if source else None for source in sources)
    others = tuple(found.folder for found in (retrained, classifier, ner) if found is not None)
    place = Place(output, MARK, wish.overwrite, (*files, checked.folder, *others), GUARDS)
    place.check()
    return FitRequest(checked, rows, passing, retrained, classifier, ner, place, wish)


def fixed_strength(text: str) -> float:
    """Return a strength that was given as a number. Raises ConfigError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e38:
        hint = f"{AUTO}, {ZEROTH}, {AGNOSTIC}, or a number above 0"
        raise ConfigError(f"unknown strength {text[:40]!r}", where="--strength", hint=hint)
    return value
