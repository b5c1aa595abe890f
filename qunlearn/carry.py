"""What `merge` and `export` are asked for, checked before anything heavy is imported; and the adapter's export."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.config import Config
from qunlearn.console import warn
from qunlearn.data.records import Dataset, read_dataset
from qunlearn.data.selfmade import read_self_made
from qunlearn.errors import ConfigError, DataError, ModelError, OutputError
from qunlearn.journal import JOURNAL, kept_bytes
from qunlearn.merge.llamacpp import CONVERTED, LORA_SCRIPT, QUANTIZED
from qunlearn.overlay import read_config_file, resolve
from qunlearn.plan import CheckedModel, check_run_model, fields_of
from qunlearn.run import CONFIG, NORMAL, Run, check_output, open_run, staged

BASES = ("original", "dequantized")
GATES = ("nf4", "fp4", "int8")
# What each format can be quantised to; a GGUF by llama.cpp's tools.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "peft": (),
    "merged": GATES,
    "gguf": (*CONVERTED, *QUANTIZED),
    "gguf-lora": (),
}
MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"
# Who merges will quantise again, mostly to 4 bits, and there forgotten answers are known to return (arXiv 2410.16454).
DEFAULT_GATE = ("nf4",)


@dataclass(frozen=True)
class MergeSource:
    """A run whose adapter is merged. `bad` and `normal` are None where its files are no longer to be found."""

    run: Run
    config: Config
    bad: Dataset | None
    normal: Dataset | None

    @property
    def name(self) -> str:
        adapter = self.run.adapter.absolute()
        return adapter.parent.name if adapter.name == "adapter" else adapter.name


@dataclass(frozen=True)
class MergeOptions:
    """How to merge. `gate`: forms in which the merged model is measured too; `measure`: whether at all."""

    base: str = "original"
    model: str | None = None
    bad: Path | None = None
    overwrite: bool = False
    measure: bool = True
    gate: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeRequest:
    """A merge that can start: the runs in the order in which they are added, all on one base."""

    sources: tuple[MergeSource, ...]
    model: CheckedModel
    base: str
    output: Path
    measure: bool
    gate: tuple[str, ...]


def check_merge(runs: Sequence[Path], output: Path, options: MergeOptions) -> MergeRequest:
    """Read the runs, find their base and their bad files, check the output. Raises QunlearnErrors."""
    _check_options(runs, options)
    sources = tuple(_source(run, options.bad) for run in runs)
    for source in sources:
        if why := source.run.record.get("not_reached"):
            warn(f"{source.run.adapter.parent}: the run did not reach its target: {'; '.join(map(str, why))}")
    checked = check_run_model(sources[0].run, options.model)
    for source in sources[1:]:  # each says itself whether it was made on that base
        check_run_model(source.run, options.model or str(checked.folder))
    kind = checked.facts.quantization
    if kind and options.base == "original":
        hint = "give --model with its 16-bit original, or --base dequantized"
        raise ModelError("the base is a quantised checkpoint", where=str(checked.folder), hint=hint)
    if kind and not kind.startswith("bitsandbytes"):
        hint = "give --model with its 16-bit original"
        raise ModelError(f"a {kind} checkpoint cannot be dequantised", where=str(checked.folder), hint=hint)
    _check_replaceable(output, options.overwrite)
    needed = max(0, checked.facts.weight_bytes - kept_bytes(output))
    check_output(output, overwrite=options.overwrite, needed_bytes=needed)
    return MergeRequest(sources, checked, options.base, output, options.measure, options.gate)


def _check_options(runs: Sequence[Path], options: MergeOptions) -> None:
    if options.base not in BASES:
        raise ConfigError(f"unknown base {options.base!r}", where="--base", hint=f"one of {', '.join(BASES)}")
    unknown = [name for name in options.gate if name not in GATES]
    if unknown:
        raise ConfigError(f"unknown form {unknown[0]!r}", where="--gate", hint=f"some of {', '.join(GATES)}")
    if options.gate and not options.measure:
        raise ConfigError("a gate is a measurement", where="--no-measure --gate", hint="leave one of them out")
    if len({run.resolve() for run in runs}) != len(runs):
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


def _source(folder: Path, bad: Path | None) -> MergeSource:
    run, config = open_run(folder), run_config(folder)
    return MergeSource(run, config, _bad_file(run, config, bad), _normal_file(run, config, folder))


def run_config(run: Path) -> Config:
    """The configuration of a run folder; defaults for a bare adapter. Raises ConfigError."""
    path = run / CONFIG
    return resolve((str(path), read_config_file(path))) if path.is_file() else Config()


def _bad_file(run: Run, config: Config, asked: Path | None) -> Dataset | None:
    path = asked or Path(run.record.get("data", {}).get("bad", {}).get("path", ""))
    if asked is None and not path.is_file():
        return None
    return read_dataset(path, fields_of(config.data), role="--bad")


def _normal_file(run: Run, config: Config, folder: Path) -> Dataset | None:
    """The run's normal data, for what it held back: the rows it made itself, or the file it was given, unchanged."""
    said: Mapping[str, Any] = run.record.get("data", {}).get("normal", {})
    own = bool(said.get("self_made"))
    path = folder / NORMAL if own else Path(str(said.get("path", "")))
    if not path.is_file():
        return None
    try:
        if own:
            return read_self_made(path)
        found = read_dataset(path, fields_of(config.data), role="--normal")
    except (DataError, ValueError, KeyError, TypeError):  # edited since: that it is not measured is said later
        return None
    return found if found.sha256 == said.get("sha256") else None


def _check_replaceable(output: Path, overwrite: bool) -> None:
    """--overwrite replaces a model or adapter, nothing else. Raises OutputError."""
    if not overwrite or not output.is_dir() or not any(output.iterdir()):
        return
    ours = (JOURNAL, "config.json", "adapter_config.json", MODEL_FILE, ADAPTER_FILE)
    folders = sorted(path.name for path in output.iterdir() if path.is_dir())
    if folders or not any((output / name).is_file() for name in ours):
        what = f"there is a folder {folders[0]!r} in it" if folders else "it is neither a model nor an adapter"
        hint = "move it away, or choose another --output"
        message = f"--overwrite replaces what was merged or exported before, but {what}"
        raise OutputError(message, where=str(output), hint=hint)


def export_adapter(run: Path, output: Path, *, overwrite: bool) -> list[str]:
    """Copy the adapter, whole or not at all; returns the names of its files. Raises QunlearnErrors."""
    opened = open_run(run)
    _check_replaceable(output, overwrite)
    check_output(output, overwrite=overwrite)
    from qunlearn.console import say
    from qunlearn.model.adaptercheck import check_adapter

    tensors = check_adapter(opened.adapter)
    files = sorted(p.name for p in opened.adapter.iterdir() if p.suffix in (".json", ".safetensors", ".md"))
    with staged(output) as folder:
        for name in files:
            shutil.copyfile(opened.adapter / name, folder / name)
    folder_size = sum((output / name).stat().st_size for name in files)
    say(f"{len(tensors)} tensors, {folder_size / 2**20:.1f} MiB, in {output}: {', '.join(files)}")
    base = ["--base" if Path(opened.base).is_dir() else "--base-model-id", opened.base]
    command = ["python", LORA_SCRIPT, str(output), *base, "--outfile", f"{output}.gguf"]
    say(f"for llama.cpp, with its own script: {shlex.join(command)}")
    rank = max((min(shape) for shape in tensors.values()), default=0)
    lora = [f"--max-lora-rank={vllm_rank(rank)}", "--lora-modules", f"{output.name}={output}"]
    say(f"for vLLM: {shlex.join(['vllm', 'serve', opened.base, '--enable-lora', *lora])}")
    return files


def vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank that admits an adapter: vLLM takes these values only (vllm/config/lora.py)."""
    return next((most for most in (1, 8, 16, 32, 64, 128, 256, 320, 512) if rank <= most), rank)


def export_adapter_gguf(
    run: Path, output: Path, model: str | None, tools: Path | None, *, overwrite: bool
) -> list[str]:
    """The adapter as a GGUF file, whole or not at all; returns the names of its files. Raises QunlearnErrors."""
    opened = open_run(run)
    _check_replaceable(output, overwrite)
    check_output(output, overwrite=overwrite)
    base = check_run_model(opened, model).folder
    from qunlearn.merge.gguf import adapter_gguf

    return adapter_gguf(opened.adapter, base, output, tools)


def describe(request: MergeRequest) -> dict[str, Any]:
    """The request as a report tells it."""
    return {
        "runs": [str(source.run.adapter) for source in request.sources],
        "base": request.base,
        "model": str(request.model.folder),
        "output": str(request.output),
        "gate": list(request.gate),
    }
