"""Check what `merge` and `export` were asked for, before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.data.paths import fields_of
from qunlearn.data.records import Dataset, read_dataset
from qunlearn.errors import ConfigError, DataError, ModelError
from qunlearn.hub.checked import CheckedModel
from qunlearn.merging.llamacpp import CONVERTED, QUANTIZED
from qunlearn.roles.self_made_file import read_self_made
from qunlearn.runs.base_model import check_run_model, run_config
from qunlearn.runs.folder import Run, open_run
from qunlearn.runs.recorded_files import Recorded, recorded
from qunlearn.utils.console import warn
from qunlearn.utils.file_names import ADAPTER, NORMAL, RECORD
from qunlearn.utils.output import MARK, MODELS, Place
from qunlearn.utils.staging import kept_bytes

BASES = ("original", "dequantized")
GATES = ("nf4", "fp4", "int8")
# What each format can be quantised to; a GGUF by llama.cpp's tools.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "peft": (),
    "merged": GATES,
    "gguf": (*CONVERTED, *QUANTIZED),
    "gguf-lora": (),
}
# Who merges will quantise again, mostly to 4 bits, and there forgotten answers are known to return (arXiv 2410.16454).
DEFAULT_GATE = ("nf4",)


@dataclass(frozen=True)
class MergeSource:
    """A run whose adapter is merged. `forget_rows` and `retain_rows` are None where its files are no longer what they
    were, or not needed; `no_bad` says what is the matter with the bad one."""

    run: Run
    config: Config
    forget_rows: Dataset | None
    retain_rows: Dataset | None
    no_bad: str = ""

    @property
    def folder(self) -> Path:
        """The run folder, or the bare adapter's, which may be called `adapter` too."""
        adapter = self.run.adapter.absolute()
        return adapter.parent if adapter.name == ADAPTER and (adapter.parent / RECORD).is_file() else adapter

    @property
    def name(self) -> str:
        adapter = self.run.adapter.absolute()
        return adapter.parent.name if adapter.name == ADAPTER else adapter.name


@dataclass(frozen=True)
class MergeOptions:
    """How to merge. `gate`: forms in which the merged model is measured too; `measure`: whether at all; `trust`: run
    Python code that the base brings."""

    base: str = "original"
    model: str | None = None
    bad: Path | None = None
    overwrite: bool = False
    measure: bool = True
    gate: tuple[str, ...] = ()
    trust: bool = False


@dataclass(frozen=True)
class MergeRequest:
    """A merge that can start: the runs in the order in which they are added, all on one base."""

    sources: tuple[MergeSource, ...]
    model: CheckedModel
    base: str
    output: Path
    measure: bool
    gate: tuple[str, ...]
    overwrite: bool = False

    @property
    def names(self) -> list[str]:
        """What each run is called here: no two alike, for by its name it is measured and judged."""
        short = [source.name for source in self.sources]
        return [s if short.count(s) == 1 else f"{s} ({n})" for n, s in enumerate(short, 1)]

    @property
    def place(self) -> Place:
        """The output, and what it may replace."""
        runs = [source.folder for source in self.sources]
        data = [
            Path(found.path) for source in self.sources for found in (source.forget_rows, source.retain_rows) if found
        ]
        return Place(self.output, MARK, self.overwrite, (*runs, self.model.folder, *data), MODELS)

    def check_gate(self) -> None:
        """Raises DataError where a gate that was asked for has no rows to measure: it would always be open."""
        for source in self.sources:
            if source.forget_rows is None and self.gate:
                message = f"there is nothing to measure: the bad file of {source.name} {source.no_bad}"
                raise DataError(message, where="--gate", hint="give --bad, or --gate none")


def check_merge(runs: Sequence[Path], output: Path, options: MergeOptions) -> MergeRequest:
    """Read the runs, find their base and their bad files, check the output. Raises QunlearnErrors."""
    _check_options(runs, options)
    sources = tuple(merge_source(run, options) for run in runs)
    for source in sources:
        warn_of(source.run)
    checked = check_run_model(sources[0].run, options.model, trust=options.trust)
    for source in sources[1:]:  # each says itself whether it was made on that base
        check_run_model(source.run, options.model or str(checked.folder), trust=options.trust)
    kind = checked.facts.quantization
    if kind and options.base == "original":
        hint = "give --model with its 16-bit original, or --base dequantized"
        raise ModelError("the base is a quantised checkpoint", where=str(checked.folder), hint=hint)
    if kind and not kind.startswith("bitsandbytes"):
        hint = "give --model with its 16-bit original"
        raise ModelError(f"a {kind} checkpoint cannot be dequantised", where=str(checked.folder), hint=hint)
    request = MergeRequest(sources, checked, options.base, output, options.measure, options.gate, options.overwrite)
    request.place.check(max(0, checked.facts.weight_bytes - kept_bytes(output)))
    return request


def warn_of(run: Run) -> None:
    """Say what the record of a run says against carrying it elsewhere."""
    record, where = run.record, run.adapter.parent
    if why := record.get("not_reached"):
        warn(f"{where}: the run did not reach its target: {'; '.join(map(str, why))}")
    if record.get("status") in ("interrupted", "failed"):
        warn(f"{where}: the run is not finished: its record says {record['status']}")
    best = record.get("training", {}).get("best")
    if isinstance(best, dict) and best.get("step") == 0:
        warn(f"{where}: the adapter that was kept is that of step 0, before any training: it changes nothing")


def _check_options(runs: Sequence[Path], options: MergeOptions) -> None:
    if not runs:
        raise ConfigError("no run was named", where="merge", hint="give the folder that `qunlearn forget` wrote")
    if options.base not in BASES:
        raise ConfigError(f"unknown base {options.base!r}", where="--base", hint=f"one of {', '.join(BASES)}")
    unknown = [name for name in options.gate if name not in GATES]
    if unknown:
        raise ConfigError(f"unknown form {unknown[0]!r}", where="--gate", hint=f"some of {', '.join(GATES)}")
    if options.gate and not options.measure:
        raise ConfigError("a gate is a measurement", where="--no-measure --gate", hint="leave one of them out")
    if len({os.path.realpath(run) for run in runs}) != len(runs):
        raise ConfigError("a run is named twice", where="merge", hint="each adapter is added once")
    if options.bad is not None and len(runs) > 1:
        raise ConfigError("of several runs each has its own bad file", where="--bad", hint="merge them one by one")


def gates(text: str | None, measure: bool) -> tuple[str, ...]:
    """The forms that --gate names, each once. Unknown ones are refused by `check_merge`."""
    if text is None:
        return DEFAULT_GATE if measure else ()
    named = [name.strip() for name in text.split(",")]
    return tuple(dict.fromkeys(name for name in named if name not in ("", "none")))


def check_export(format: str, quant: str | None, tools: Path | None = None) -> None:
    """Raises ConfigError for a format that is not written, a quantisation of what is none, or tools that none needs."""
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}", where="--format", hint=f"one of {', '.join(FORMATS)}")
    if tools is not None and not format.startswith("gguf"):
        raise ConfigError(
            f"{format} is written without llama.cpp", where="--llama-cpp", hint="--format gguf or gguf-lora"
        )
    forms = FORMATS[format]
    if quant is not None and not forms:
        raise ConfigError("an adapter is not quantised", where="--quant", hint="--format merged or gguf")
    if quant is not None and quant not in forms:
        raise ConfigError(f"unknown form {quant!r} of {format}", where="--quant", hint=f"one of {', '.join(forms)}")


def merge_source(folder: Path, options: MergeOptions) -> MergeSource:
    """Read a run and, where it is to be measured, the files it was made from. Raises QunlearnErrors."""
    run, config = open_run(folder), run_config(folder, trust=options.trust)
    if not options.measure:
        return MergeSource(run, config, None, None)
    found = Recorded(options.bad) if options.bad else recorded(run, "bad")
    forget_rows = read_dataset(found.usable, fields_of(config.data), role="--bad") if found.usable else None
    return MergeSource(run, config, forget_rows, _retain_file(run, config, folder), found.why)


def _retain_file(run: Run, config: Config, folder: Path) -> Dataset | None:
    """The run's normal data, for what it held back: the rows it made itself, or the file it was given, unchanged."""
    said: Mapping[str, Any] = run.record.get("data", {}).get("normal", {})
    own = bool(said.get("self_made"))
    path = folder / NORMAL if own else recorded(run, "normal").usable
    if path is None or not path.is_file():
        return None
    try:
        if own:
            return read_self_made(path)
        return read_dataset(path, fields_of(config.data), role="--normal")
    except (DataError, ValueError, KeyError, TypeError):  # edited since: that it is not measured is said later
        return None


def describe(request: MergeRequest) -> dict[str, Any]:
    """The request as a report tells it."""
    return {
        "runs": [str(source.run.adapter) for source in request.sources],
        "base": request.base,
        "model": str(request.model.folder),
        "output": str(request.output),
        "gate": list(request.gate),
    }
