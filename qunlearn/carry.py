"""What `merge` and `export` are asked for, checked before anything heavy is imported; and the export itself."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.config import Config, read_config_file, resolve
from qunlearn.data.records import Dataset, FieldNames, read_dataset
from qunlearn.errors import ConfigError, ModelError
from qunlearn.plan import CheckedModel, check_run_model
from qunlearn.run import CONFIG, Run, check_output, open_run, staged

BASES = ("original", "dequantized")
FORMATS = ("peft",)


@dataclass(frozen=True)
class MergeRequest:
    """A merge that can start. `bad` is None where the run's bad file is no longer to be found."""

    run: Run
    config: Config
    model: CheckedModel
    base: str
    bad: Dataset | None
    output: Path
    overwrite: bool


def check_merge(
    run: Path, output: Path, *, base: str, model: str | None, bad: Path | None, overwrite: bool
) -> MergeRequest:
    """Read the run, find its base and its bad file, check the output. Raises QunlearnErrors."""
    if base not in BASES:
        raise ConfigError(f"unknown base {base!r}", where="--base", hint=f"one of {', '.join(BASES)}")
    opened = open_run(run)
    config = run_config(run)
    checked = check_run_model(opened, model)
    if base == "original" and checked.facts.quantization:
        hint = "give --model with its 16-bit original, or --base dequantized"
        raise ModelError("the base is a quantised checkpoint", where=str(checked.folder), hint=hint)
    check_output(output, overwrite=overwrite, needed_bytes=2 * checked.facts.weight_bytes)
    return MergeRequest(opened, config, checked, base, _bad_file(opened, config, bad), output, overwrite)


def run_config(run: Path) -> Config:
    """The configuration of a run folder; defaults for a bare adapter. Raises ConfigError."""
    path = run / CONFIG
    return resolve((str(path), read_config_file(path))) if path.is_file() else Config()


def _bad_file(run: Run, config: Config, asked: Path | None) -> Dataset | None:
    path = asked or Path(run.record.get("data", {}).get("bad", {}).get("path", ""))
    if asked is None and not path.is_file():
        return None
    return read_dataset(path, FieldNames(config.data.prompt_field, config.data.completion_field), role="--bad")


def export_adapter(run: Path, output: Path, *, format: str, overwrite: bool) -> list[str]:
    """Copy the adapter, whole or not at all; returns the names of its files. Raises QunlearnErrors."""
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}", where="--format", hint=f"one of {', '.join(FORMATS)}")
    opened = open_run(run)
    check_output(output, overwrite=overwrite)
    from qunlearn.console import say
    from qunlearn.model.policy import adapter_tensors

    tensors = adapter_tensors(opened.adapter)
    files = sorted(p.name for p in opened.adapter.iterdir() if p.suffix in (".json", ".safetensors", ".md"))
    with staged(output) as folder:
        for name in files:
            shutil.copyfile(opened.adapter / name, folder / name)
    folder_size = sum((output / name).stat().st_size for name in files)
    say(f"{len(tensors)} tensors, {folder_size / 2**20:.1f} MiB, in {output}: {', '.join(files)}")
    return files


def describe(request: MergeRequest) -> dict[str, Any]:
    return {"run": str(request.run.adapter), "base": request.base, "output": str(request.output)}
