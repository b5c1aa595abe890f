"""Export a merged model quantised: by bitsandbytes for plain transformers, or as GGUF."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from qunlearn.hub.preflight import preflight_folder
from qunlearn.hub.side_files import copy_into
from qunlearn.merging.gguf import ModelTools, can_read_back, drop_code, read_back, write_gguf
from qunlearn.merging.llamacpp import MODEL_FILE
from qunlearn.merging.merge import MergeReport, report_of
from qunlearn.merging.plan import MergePlan, make_plan
from qunlearn.merging.request import MergeRequest
from qunlearn.merging.verify import after_quantized, before
from qunlearn.merging.writer import write_model
from qunlearn.model.load import LoadSpec, load_base
from qunlearn.model.quiet import quiet_transformers
from qunlearn.utils.console import stage
from qunlearn.utils.output import real
from qunlearn.utils.staging import Journal, staged
from qunlearn.utils.text import command_line

_SHARD = "2GB"


def export_quantized(request: MergeRequest, quant: str, device: str) -> MergeReport:
    """Merge in 16 bits beside the output, load that quantised, write it, and measure what was written.

    Needs the disk of both and the memory of the quantised model. Raises QunlearnErrors.
    """
    plan = make_plan(request, device)
    look = before(request, device) if request.measure else None
    with staged(request.place) as folder:
        with _sixteen_bits(request, plan, folder) as sixteen, stage(f"quantising to {quant}"), quiet_transformers():
            base = load_base(sixteen, LoadSpec(quant, True, device, _trusted(request), as_stored=True))
            base.model.save_pretrained(folder, max_shard_size=_SHARD)
            copy_into(folder, plan.companions)
            del base
        if look is not None:
            after_quantized(look, folder, quant)
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return report_of(request, plan.adapter_tensors, sizes, look)


def export_gguf(request: MergeRequest, quant: str | None, tools: ModelTools, device: str) -> MergeReport:
    """Merge in 16 bits beside the output, have llama.cpp's tools convert that, read it back and measure it.

    `quant`: None is the 16-bit form nearest to the model's. Raises QunlearnErrors.
    """
    plan = make_plan(request, device)
    look = before(request, device) if request.measure and can_read_back(str(plan.config.get("model_type"))) else None
    with staged(request.place) as folder:
        made = folder / MODEL_FILE
        with _sixteen_bits(request, plan, folder) as sixteen:
            preflight_folder(sixteen, trust_remote_code=_trusted(request))
            if not _trusted(request):
                drop_code(sixteen)
            write_gguf(tools, sixteen, made, quant, real(request.output).name)
        if look is not None:
            seen = folder / "seen"
            read_back(made, plan.companions, plan.config, seen)
            after_quantized(look, seen, quant or "gguf")
            shutil.rmtree(seen)
        size = made.stat().st_size
    load = command_line("llama-cli", "-m", request.output / MODEL_FILE)
    return report_of(request, plan.adapter_tensors, [size], look, load)


@contextlib.contextmanager
def _sixteen_bits(request: MergeRequest, plan: MergePlan, folder: Path) -> Iterator[Path]:
    """The merged model in a folder of its own, while something else is made of it."""
    sixteen = folder / "16-bit"
    sixteen.mkdir(mode=0o700)
    with stage(f"merging into the {request.base} weights"):
        write_model(plan, Journal(sixteen, plan.identity))
    yield sixteen
    shutil.rmtree(sixteen)


def _trusted(request: MergeRequest) -> bool:
    return request.sources[0].config.model.trust_remote_code
