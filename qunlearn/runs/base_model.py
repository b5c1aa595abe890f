"""The base model and the configuration that a run folder belongs to."""

from __future__ import annotations

from pathlib import Path

from qunlearn.config.resolve import TRUST, read_config_file, resolve
from qunlearn.config.settings import Config
from qunlearn.errors import AdapterError, ModelError
from qunlearn.hub.checked import CheckedModel, check_model
from qunlearn.hub.download import resolve_model
from qunlearn.hub.preflight import fingerprint
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
    named = trained_on.get("commit") or trained_on.get("revision") or run.adapter_config.get("revision")
    revision = None if asked else named
    try:
        model = check_model(resolve_model(name, revision), trust)
    except ModelError as error:
        if asked:
            raise
        moved = "give --model if it has moved"
        hint = error.hint if error.hint and (Path(name) / "config.json").is_file() else moved
        raise ModelError(f"the run's base: {error}", hint=hint) from error
    known = trained_on.get("fingerprint")
    # The 16-bit original of a quantised checkpoint is another model by its bytes; its tensors are compared later.
    if known and "checkpoint" not in trained_on.get("quantization", "") and fingerprint(model.folder) != known:
        hint = "give --model with the model the run was made on"
        raise AdapterError(f"belongs to another base than {name}", where=where, hint=hint)
    return model


def run_config(run: Path, *, trust: bool = False) -> Config:
    """The configuration of a run folder; defaults for a bare adapter. Raises ConfigError.

    trust: whether code that a model brings is run. A folder from elsewhere cannot say so itself.
    """
    path = run / CONFIG
    stored = read_config_file(path) if path.is_file() else {}
    return resolve((str(path), stored), ("command line", {TRUST: trust}))
