"""Check what `forget` was asked for: everything that can be decided, or refused, before heavy imports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qunlearn.config.objective import INSTEAD
from qunlearn.config.settings import Config
from qunlearn.data.paths import data_path, fields_of
from qunlearn.data.records import Dataset, FieldNames, check_overlap, read_dataset
from qunlearn.data.shared_text import SharedText, shared_text
from qunlearn.errors import ConfigError
from qunlearn.hub.checked import CheckedModel, check_model
from qunlearn.hub.download import resolve_model
from qunlearn.hub.positions import positions_of
from qunlearn.runs.folder import FINISHED, status_of_run
from qunlearn.training.settings_check import check_settings
from qunlearn.utils.file_names import RECORD
from qunlearn.utils.output import Place, default_folder, real


@dataclass(frozen=True)
class ForgetRequest:
    """A run whose inputs are read and checked, and whose output can be written. `resume`: go on where one stopped;
    `shared`: passages of the bad file in the others."""

    config: Config
    model: CheckedModel
    forget_rows: Dataset
    retain_rows: Dataset | None
    output: Path
    resume: bool = False
    holdout: Dataset | None = None
    instead: Dataset | None = None
    shared: tuple[SharedText, ...] = ()

    @property
    def place(self) -> Place:
        """The output with what it may replace, as things are now."""
        data = [Path(found.path) for found in (self.forget_rows, self.retain_rows, self.holdout, self.instead) if found]
        return _place(self.config, self.output, self.resume, [*data, self.model.folder])


def _place(config: Config, output: Path, resume: bool, inputs: Sequence[Path]) -> Place:
    # What --resume finds in the folder is a run that was interrupted, to be replaced.
    overwrite = config.output.overwrite or (resume and (output / RECORD).is_file())
    return Place(output, RECORD, overwrite, tuple(inputs))


def check_forget(config: Config, *, resume: bool = False) -> ForgetRequest:
    """Read the data, find the output, fetch and check the model, cheapest first. Raises QunlearnErrors."""
    data, out = config.data, config.output
    if not config.model.name:
        raise ConfigError("no model was named", where="--model", hint="see `qunlearn models`")
    if not data.bad:
        raise ConfigError("no file of bad answers was named", where="--bad", hint="--bad bad.jsonl")
    fields = fields_of(data)
    forget_rows = read_dataset(data_path(data.bad), fields, role="--bad")
    retain_rows = read_dataset(data_path(data.normal), fields, role="--normal") if data.normal else None
    holdout = read_dataset(data_path(data.holdout), fields, role="--holdout") if data.holdout else None
    if retain_rows is not None:
        check_overlap(forget_rows, retain_rows)
    if holdout is not None:
        for trained in filter(None, (forget_rows, retain_rows)):
            check_overlap(trained, holdout, "rows that are trained on are also in the holdout data")
    shared = shared_text(forget_rows, retain_rows, holdout)
    instead = _read_instead(config.objective.instead, fields)
    source = resolve_model(config.model.name, config.model.revision)
    output = Path(out.folder) if out.folder else default_folder(config.model.name, data.bad)
    real(output)
    if not (resume and status_of_run(output) in FINISHED):  # such a one is left as it is
        read = [Path(found.path) for found in (forget_rows, retain_rows, holdout, instead) if found]
        local = [Path(source.location)] if source.kind != "hub" else []
        _place(config, output, resume, [*read, *local]).check()
    model = check_model(source, config.model.trust_remote_code)
    check_settings(config, model.facts)
    config = replace(config, data=replace(data, max_length=min(data.max_length, positions_of(model.facts.config))))
    return ForgetRequest(config, model, forget_rows, retain_rows, output, resume, holdout, instead, shared)


def _read_instead(asked: str, fields: FieldNames) -> Dataset | None:
    """The file of what is said instead, where it is a file. Raises ConfigError, DataError."""
    if asked in INSTEAD:
        return None
    path = data_path(asked)
    if not path.is_file():
        hint = f"one of {', '.join(INSTEAD)}, or a file of answers"
        raise ConfigError(f"no such file, and no kind of answer: {asked[:80]!r}", where="--instead", hint=hint)
    return read_dataset(path, fields, role="--instead")
