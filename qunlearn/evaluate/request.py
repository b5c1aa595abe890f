"""What `eval` is asked for, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qunlearn.carry import run_config
from qunlearn.config import Config
from qunlearn.data.records import Dataset, FieldNames, read_dataset
from qunlearn.errors import ConfigError
from qunlearn.model.source import resolve_model
from qunlearn.plan import CheckedModel, check_model, check_run_model
from qunlearn.run import Run, open_run


@dataclass(frozen=True)
class EvalRequest:
    """A measurement that can start. `run` is None for a bare model."""

    run: Run | None
    config: Config
    model: CheckedModel
    sets: Mapping[str, Dataset]
    template: str | None

    @classmethod
    def check(
        cls, run: Path | None, model: str | None, files: Mapping[str, Path], *, template: str | None
    ) -> EvalRequest:
        """Read the files, the run and the model's headers. Raises QunlearnErrors."""
        if not files:
            hint = "give at least one of --forget, --retain, --holdout, --general"
            raise ConfigError("nothing to measure", where="eval", hint=hint)
        if run is None and model is None:
            raise ConfigError("neither a run nor a model", where="eval", hint="a RUN folder, or --model")
        opened = open_run(run) if run is not None else None
        config = run_config(run) if run is not None else Config()
        fields = FieldNames(config.data.prompt_field, config.data.completion_field)
        sets = {name: read_dataset(path, fields, role=f"--{name}") for name, path in files.items()}
        checked = check_run_model(opened, model) if opened else check_model(resolve_model(model or ""))
        return cls(opened, config, checked, sets, template)
