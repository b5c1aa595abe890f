"""Export an adapter alone: as PEFT files or as GGUF."""

from __future__ import annotations

import shutil
from pathlib import Path

from qunlearn.hub.adapter_files import check_adapter
from qunlearn.hub.preflight import within
from qunlearn.merging.llamacpp import LORA_SCRIPT
from qunlearn.merging.request import warn_of
from qunlearn.runs.base_model import check_run_model
from qunlearn.runs.folder import open_run
from qunlearn.utils.console import say
from qunlearn.utils.output import MARK, MODELS, Place, real
from qunlearn.utils.staging import staged
from qunlearn.utils.text import command_line


def export_adapter(run: Path, output: Path, *, overwrite: bool) -> list[str]:
    """Copy the adapter, whole or not at all; returns the names of its files. Raises QunlearnErrors."""
    opened = open_run(run)
    place = Place(output, MARK, overwrite, (run, opened.adapter), MODELS)
    place.check()
    warn_of(opened)
    tensors = check_adapter(opened.adapter)
    found = [p for p in sorted(opened.adapter.iterdir()) if p.suffix in (".json", ".safetensors", ".md")]
    # What is exported is mostly published: a link could bring in any file of this machine.
    files = [within(opened.adapter, path).name for path in found if path.name != MARK and not path.is_dir()]
    with staged(place) as folder:
        for name in files:
            shutil.copyfile(opened.adapter / name, folder / name)
    folder_size = sum((output / name).stat().st_size for name in files)
    say(f"{len(tensors)} tensors, {folder_size / 2**20:.1f} MiB, in {output}: {', '.join(files)}")
    base = ["--base" if Path(opened.base).is_dir() else "--base-model-id", opened.base]
    command = ["python", LORA_SCRIPT, str(output), *base, "--outfile", f"{output}.gguf"]
    say(f"for llama.cpp, with its own script: {command_line(*command)}")
    rank = max((min(shape) for shape in tensors.values()), default=0)
    lora = [f"--max-lora-rank={vllm_rank(rank)}", "--lora-modules", f"{real(output).name}={output}"]
    say(f"for vLLM: {command_line('vllm', 'serve', opened.base, '--enable-lora', *lora)}")
    return files


def vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank that admits an adapter: vLLM takes these values only (vllm/config/lora.py)."""
    return next((most for most in (1, 8, 16, 32, 64, 128, 256, 320, 512) if rank <= most), rank)


def export_adapter_gguf(
    run: Path, output: Path, model: str | None, tools: Path | None, *, overwrite: bool, trust: bool = False
) -> list[str]:
    """The adapter as a GGUF file, whole or not at all; returns the names of its files. Raises QunlearnErrors."""
    opened = open_run(run)
    Place(output, MARK, overwrite, (run,), MODELS).check()
    base = check_run_model(opened, model, trust=trust).folder
    place = Place(output, MARK, overwrite, (run, opened.adapter, base), MODELS)
    place.check()
    warn_of(opened)
    from qunlearn.merging.gguf import adapter_gguf

    return adapter_gguf(opened.adapter, base, place, tools)
