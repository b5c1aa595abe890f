"""Check what `eval` was asked for, before anything heavy is imported."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qunlearn.config.resolve import TRUST, resolve
from qunlearn.config.settings import SETTINGS, Config
from qunlearn.data.paths import data_path, fields_of
from qunlearn.data.records import Dataset, read_dataset
from qunlearn.errors import ConfigError, DataError, ModelError
from qunlearn.evaluation.catalog import SUITES
from qunlearn.evaluation.results import SPLITS
from qunlearn.hub.checked import CheckedModel, check_model
from qunlearn.hub.download import resolve_model
from qunlearn.runs.base_model import check_run_model, run_config
from qunlearn.runs.folder import Run, is_adapter_folder, open_run
from qunlearn.runs.recorded_files import recorded
from qunlearn.utils.console import warn
from qunlearn.utils.file_names import EVAL, EVAL_CACHE
from qunlearn.utils.output import check_added

_ENDINGS = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
NO_ADAPTER = "none"  # --adapter none: the base alone
OWN_CLASSIFIER = "sandbox"
_JUDGES = {"harm": "--harm-classifier", "reward": "--reward-model"}
_OWN = {"forget": "bad", "holdout": "holdout"}  # a split, and what a run's record calls its file


class GuardLike(Protocol):
    """What stands before a model: `on` puts it there while a block runs; `identity` changes with its answers."""

    @property
    def identity(self) -> str: ...
    def on(self, model: Any, tokenizer: Any = None) -> contextlib.AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class Wish:
    """What may be asked for besides a model and files.

    `retrained`: a model that never saw what is forgotten. `harm`, `reward`: models that judge outputs. `output`: a
    folder for eval.json and what was measured; without one a run keeps it, and a bare model keeps nothing. `trust`:
    run Python code that the models bring. `guard`: stands before the adapter, or before a bare model.
    """

    suite: str = "basic"
    retrained: str | None = None
    harm: str | None = None
    reward: str | None = None
    output: Path | None = None
    trust: bool = False
    guard: GuardLike | None = None
    retrained_flag: str = "--retrained-model"  # by which `retrained` was named


@dataclass(frozen=True)
class EvalRequest:
    """A measurement that can start. `run` is None for a bare model; a judge is None for the embedded classifier;
    `asked_with` is the template that the run asks with, also where its base is asked alone."""

    run: Run | None
    config: Config
    model: CheckedModel
    sets: Mapping[str, Dataset]
    template: str | None
    suite: str = "basic"
    retrained: CheckedModel | None = None
    judges: Mapping[str, CheckedModel | None] | None = None
    output: Path | None = None
    guard: GuardLike | None = None
    asked_with: Mapping[str, Any] | None = None

    @classmethod
    def check(
        cls,
        run: Path | None,
        model: str | None,
        files: Mapping[str, Path],
        *,
        template: str | None = None,
        wish: Wish = Wish(),
        adapter_off: bool = False,
    ) -> EvalRequest:
        """Read the files, the run and the models' headers; with `adapter_off` the run's base is asked alone, as the
        run asks it. Raises QunlearnErrors."""
        if wish.suite not in SUITES:
            close = difflib.get_close_matches(wish.suite, SUITES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(SUITES)}"
            raise ConfigError(f"unknown suite {wish.suite!r}", where="--suite", hint=hint)
        if run is None and model is None:
            hint = "a RUN folder, a MODEL, or --model"
            raise ConfigError("neither a run nor a model", where="eval", hint=hint)
        opened = open_run(run) if run is not None else None
        trust = wish.trust
        config = run_config(run, trust=trust) if run is not None else resolve(("command line", {TRUST: trust}))
        if opened is None:
            resolve_model(model or "")  # a mistyped run is none: more is to say of it than that files are missing
        files = files or _own_files(opened)
        if not files:
            hint = "give at least one of --forget, --paraphrase, --retain, --holdout, --general, or --data"
            raise ConfigError("nothing to measure", where="eval", hint=hint)
        fields = fields_of(config.data)
        sets = {name: read_dataset(path, fields, role=f"--{name}") for name, path in files.items()}
        if wish.output is not None:  # before a model is fetched
            named = (Path(os.path.expanduser(model)),) if model is not None else ()  # noqa: PTH111
            check_added(wish.output, (*named, *(opened.folders if opened is not None else ())))
        if opened:
            checked = check_run_model(opened, model, trust=trust)
        else:
            checked = check_model(resolve_model(model or ""), trust)
        retrained = _named_model(wish.retrained_flag, wish.retrained, trust) if wish.retrained else None
        judges = {name: _judge(name, asked) for name, asked in (("harm", wish.harm), ("reward", wish.reward)) if asked}
        output = wish.output or (run if opened is not None and opened.record and not adapter_off else None)
        stored = opened.record.get("data", {}).get("template") if opened is not None else None
        asked = None if adapter_off else opened
        return cls(asked, config, checked, sets, template, wish.suite, retrained, judges, output, wish.guard, stored)

    @property
    def result_path(self) -> Path | None:
        return self.output / EVAL if self.output else None

    @property
    def cache_folder(self) -> Path | None:
        return self.output / EVAL_CACHE if self.output else None


def _judge(name: str, asked: str) -> CheckedModel | None:
    return None if name == "harm" and asked == OWN_CLASSIFIER else _named_model(_JUDGES[name], asked, False)


def _named_model(flag: str, asked: str, trust: bool) -> CheckedModel:
    """A model beside the one that is measured. Raises ModelError naming the flag, for several models are named."""
    try:
        return check_model(resolve_model(asked, flag=flag), trust)
    except ModelError as error:
        if error.where == flag:
            raise
        raise ModelError(f"{flag}: {error.message}", where=error.where, hint=error.hint) from error


def check_quant(quant: str | None) -> None:
    """Raises ConfigError for a form in which no model is loaded."""
    choices = SETTINGS["model.quant"].choices
    if quant is not None and quant not in choices:
        raise ConfigError(f"unknown form {quant[:40]!r}", where="--quant", hint=f"one of {', '.join(choices)}")


def _own_files(run: Run | None) -> dict[str, Path]:
    """Return what the run itself says should be gone, and what it never trained on, where the files are still there.

    Raises DataError for a file that holds other bytes now.
    """
    found: dict[str, Path] = {}
    if run is None:
        return found
    for split, name in _OWN.items():
        own = recorded(run, name)
        if own.path is None:
            continue
        if not own.path.is_file():
            warn(f"the {name} file {own.path} {own.why}: it is not measured (give --{split})")
            continue
        if own.why:
            hint = f"its rows were others; --{split} {own.path} measures these all the same"
            raise DataError(f"{own.why}", where=str(own.path), hint=hint)
        found[split] = own.path
    return found


def check_eval(
    target: str | None,
    adapter: Path | None,
    model: str | None,
    data: str | None,
    named: Mapping[str, str | None],
    quant: str | None,
    template: str | None,
    wish: Wish,
) -> tuple[EvalRequest, str | None]:
    """Resolve what was named on the command line or from Python to a request, and the form in which to load the model.

    Raises QunlearnErrors.
    """
    check_quant(quant)
    files = split_files(data, named)
    alone = adapter is not None and str(adapter) == NO_ADAPTER
    run, model = find_target(target, None if alone else adapter, model)
    return EvalRequest.check(run, model, files, template=template, wish=wish, adapter_off=alone), quant


def find_target(target: str | None, adapter: Path | None, model: str | None) -> tuple[Path | None, str | None]:
    """(run or adapter folder, model) of `RUN|MODEL --adapter A --model M`. Raises ConfigError."""
    if target is None:
        return adapter, model
    folder = Path(target)
    if adapter is not None:
        if model is not None:
            raise ConfigError("the model was named twice", where="--model", hint="MODEL --adapter A is enough")
        return adapter, target
    if is_adapter_folder(folder) or (folder.is_dir() and not (folder / "config.json").is_file()):
        return folder, model  # of a folder that is neither, opening it as a run says what is missing
    if model is not None:
        raise ConfigError("two models were named", where="--model", hint="give a RUN folder, or one model")
    return None, target


def split_files(data: str | None, named: Mapping[str, str | None]) -> dict[str, Path]:
    """The file of each split: those of a --data folder or sandbox:KIND, and over them the ones named singly.

    Raises ConfigError.
    """
    found = _folder_files(data) if data else {}
    found |= {name: data_path(text) for name, text in named.items() if text is not None}
    return {name: found[name] for name in SPLITS if name in found}


def _folder_files(data: str) -> dict[str, Path]:
    if data.startswith("sandbox:"):
        # `forget` names the folder: sandbox:KIND/SPLIT is checked in one place.
        folder = data_path(f"{data}/forget").parent
        return {**_in_folder(folder), "general": folder.parent / "general.jsonl"}
    folder = Path(data)
    found = _in_folder(folder)
    if not found:
        hint = (
            "a folder with forget.jsonl, paraphrase.jsonl, retain.jsonl, holdout.jsonl, general.jsonl, or some of them"
        )
        raise ConfigError("no such files in the folder", where=f"--data {data}", hint=hint)
    return found


def _in_folder(folder: Path) -> dict[str, Path]:
    names = {name: (name,) for name in SPLITS} | {"paraphrase": ("paraphrase", "forget_paraphrase")}
    found = {}
    for split, stems in names.items():
        paths = (folder / f"{stem}{ending}" for stem in stems for ending in _ENDINGS)
        path = next((p for p in paths if p.is_file()), None)
        if path is not None:
            found[split] = path
    return found
