"""Find the base model and the configuration that a run folder belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qunlearn.config.resolve import TRUST, read_config_file, resolve
from qunlearn.config.settings import Config
from qunlearn.errors import AdapterError, ModelError
from qunlearn.hub.checked import CheckedModel, check_model
from qunlearn.hub.download import ModelSource, resolve_model
from qunlearn.hub.fingerprint import Fingerprint, take_fingerprint
from qunlearn.hub.preflight import commit_of
from qunlearn.runs.folder import Run
from qunlearn.utils.file_names import CONFIG


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
    """Return what differs between the base of a run and the model that is there."""
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


def run_config(run: Path, *, trust: bool = False) -> Config:
    """The configuration of a run folder; defaults for a bare adapter. Raises ConfigError.

    trust: whether code that a model brings is run. A folder from elsewhere cannot say so itself.
    """
    path = run / CONFIG
    stored = read_config_file(path) if path.is_file() else {}
    return resolve((str(path), stored), ("command line", {TRUST: trust}))
