"""Everything about a run that can be decided, and refused, before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qunlearn.config import INSTEAD, Config, DataConfig
from qunlearn.console import stage
from qunlearn.data.files import local_path
from qunlearn.data.records import Dataset, FieldNames, check_overlap, read_dataset
from qunlearn.errors import AdapterError, ConfigError, ModelError
from qunlearn.model.fits_settings import check_settings
from qunlearn.model.folder import Fingerprint, FolderFacts, commit_of, preflight_folder, take_fingerprint
from qunlearn.model.source import ModelSource, go_offline, local_snapshot, resolve_model
from qunlearn.output import Place, default_folder, real
from qunlearn.run import FINISHED, RECORD, Run, status_of_run
from qunlearn.sandbox import KINDS, data_file


@dataclass(frozen=True)
class CheckedModel:
    """A model whose files are here and look sound."""

    source: ModelSource
    folder: Path
    facts: FolderFacts


@dataclass(frozen=True)
class Plan:
    """A run whose inputs are read and checked, and whose output can be written. `resume`: go on where one stopped."""

    config: Config
    model: CheckedModel
    bad: Dataset
    normal: Dataset | None
    output: Path
    resume: bool = False
    holdout: Dataset | None = None
    instead: Dataset | None = None

    @property
    def place(self) -> Place:
        """The output with what it may replace, as things are now."""
        data = [Path(found.path) for found in (self.bad, self.normal, self.holdout, self.instead) if found]
        return _place(self.config, self.output, self.resume, [*data, self.model.folder])


def _place(config: Config, output: Path, resume: bool, inputs: Sequence[Path]) -> Place:
    # What --resume finds in the folder is a run that was interrupted, to be replaced.
    overwrite = config.output.overwrite or (resume and (output / RECORD).is_file())
    return Place(output, RECORD, overwrite, tuple(inputs))


def make_plan(config: Config, *, resume: bool = False) -> Plan:
    """Read the data, find the output, fetch and check the model, cheapest first. Raises QunlearnErrors."""
    data, out = config.data, config.output
    if not config.model.name:
        raise ConfigError("no model was named", where="--model", hint="see `qunlearn models`")
    if not data.bad:
        raise ConfigError("no file of bad answers was named", where="--bad", hint="--bad bad.jsonl")
    fields = fields_of(data)
    bad = read_dataset(data_path(data.bad), fields, role="--bad")
    normal = read_dataset(data_path(data.normal), fields, role="--normal") if data.normal else None
    holdout = read_dataset(data_path(data.holdout), fields, role="--holdout") if data.holdout else None
    if normal is not None:
        check_overlap(bad, normal)
    if holdout is not None:
        for trained in filter(None, (bad, normal)):
            check_overlap(trained, holdout, "rows that are trained on are also in the holdout data")
    instead = _read_instead(config.objective.instead, fields)
    source = resolve_model(config.model.name, config.model.revision)
    output = Path(out.folder) if out.folder else default_folder(config.model.name, data.bad)
    real(output)
    if not (resume and status_of_run(output) in FINISHED):  # such a one is left as it is
        read = [Path(found.path) for found in (bad, normal, holdout, instead) if found]
        local = [Path(source.location)] if source.kind != "hub" else []
        _place(config, output, resume, [*read, *local]).check()
    model = check_model(source, config.model.trust_remote_code)
    check_settings(config, model.facts)
    return Plan(config, model, bad, normal, output, resume, holdout, instead)


def _read_instead(asked: str, fields: FieldNames) -> Dataset | None:
    """The file of what is said instead, where it is a file. Raises ConfigError, DataError."""
    if asked in INSTEAD:
        return None
    path = data_path(asked)
    if not path.is_file():
        hint = f"one of {', '.join(INSTEAD)}, or a file of answers"
        raise ConfigError(f"no such file, and no kind of answer: {asked[:80]!r}", where="--instead", hint=hint)
    return read_dataset(path, fields, role="--instead")


def fields_of(data: DataConfig) -> FieldNames:
    """Return how a run's files name their fields, and which answers of a dialogue are rows."""
    return FieldNames(data.prompt_field, data.completion_field, data.turns)


def data_path(text: str, *, stdin: bool = False) -> Path:
    """Return a path, `sandbox:KIND/SPLIT` for an embedded file, and where `stdin` is allowed - for it.

    Raises ConfigError for what is no file here.
    """
    scheme, _, name = text.partition(":")
    if text == "-":
        if stdin:
            return Path("/dev/stdin")
        raise ConfigError("a run reads its files again later, which a pipe cannot be", where="-", hint="save it first")
    if scheme != "sandbox":
        return local_path(text)
    kind, _, split = name.partition("/")
    path = data_file(kind, split)
    if kind not in KINDS or not path.is_file():
        hint = f"sandbox:KIND/SPLIT, with KIND one of {', '.join(KINDS)}"
        raise ConfigError(f"no embedded file {name!r}", where=text, hint=hint)
    return path


def check_model(source: ModelSource, trust_remote_code: bool = False) -> CheckedModel:
    """Fetch a model if it is on the hub, check its folder, and close the network behind it. Raises ModelError."""
    if source.kind == "hub":
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        with stage(f"fetching {source.location}"):
            folder = local_snapshot(source, offline=offline, trust_remote_code=trust_remote_code)
    else:
        folder = Path(source.location)
    facts = preflight_folder(folder, trust_remote_code=trust_remote_code)
    go_offline()
    return CheckedModel(source, folder, facts)


def check_run_model(run: Run, asked: str | None, *, trust: bool = False) -> CheckedModel:
    """The base of a run or adapter, from its record or as asked. Raises AdapterError for another base.

    trust: whether Python code that the base brings may run.
    """
    name = asked or run.base
    where = str(run.adapter)
    if not name:
        raise AdapterError("does not say which base it belongs to", where=where, hint="give --model")
    trained_on = run.record.get("model", {})
    try:
        model = check_model(_as_trained(resolve_model(name, typed=bool(asked)), run, asked), trust)
    except ModelError as error:
        if asked:
            raise
        moved = "give --model if it has moved"
        hint = error.hint if error.hint and (Path(name) / "config.json").is_file() else moved
        raise ModelError(f"the run's base: {error}", hint=hint) from error
    known = trained_on.get("fingerprint")
    # The 16-bit original of a quantised checkpoint is another model by its bytes; its tensors are compared later.
    if known and "checkpoint" not in (trained_on.get("quantization") or ""):
        found = take_fingerprint(model.folder)
        if found.like(known) != known:
            raise _another_base(model, found, trained_on, where)
    return model


def _as_trained(source: ModelSource, run: Run, asked: str | None) -> ModelSource:
    """A hub model at the commit a run was made on: its branch may have moved on. A folder has no revisions."""
    trained_on = run.record.get("model", {})
    named = trained_on.get("commit") or trained_on.get("revision") or run.adapter_config.get("revision")
    same = not asked or source.location == run.base
    return replace(source, revision=str(named)) if named and same and source.kind == "hub" else source


def _another_base(model: CheckedModel, found: Fingerprint, trained_on: Mapping[str, Any], where: str) -> AdapterError:
    """What differs between the base of a run and the model that is there."""
    parts = (("config.json", "config_fingerprint", found.config), ("weights", "weights_fingerprint", found.weights))
    differ = [word for word, key, value in parts if trained_on.get(key, value) != value]
    # A run of before did not record the two apart.
    what = " and ".join(differ) or "config.json or weights"
    then, now = trained_on.get("commit") or trained_on.get("revision"), commit_of(model.folder) or model.source.revision
    revisions = f"; the run is of revision {then}" if then else ""
    revisions += f", this is {now}" if then and now else f"; this is revision {now}" if now else ""
    message = f"belongs to another base than {model.source.location}: other {what}{revisions}"
    hint = "give --model with the model the run was made on"
    if then and trained_on.get("kind") == "hub":
        hint += f": `hf download {trained_on.get('location')} --revision {then}` fetches it and prints its folder"
    return AdapterError(message, where=where, hint=hint)
