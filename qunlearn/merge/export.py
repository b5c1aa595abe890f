"""A merged model in 4 or 8 bits, as bitsandbytes stores it and plain transformers loads it."""

from __future__ import annotations

import shutil

from qunlearn.carry import MergeRequest
from qunlearn.console import stage
from qunlearn.journal import Journal
from qunlearn.merge.command import MergeReport, report_of
from qunlearn.merge.measure import after_quantized, before
from qunlearn.merge.plan import make_plan
from qunlearn.merge.stream import write_model
from qunlearn.model.load import LoadSpec, load_base
from qunlearn.model.quiet import quiet_transformers
from qunlearn.run import staged

_SHARD = "2GB"


def export_quantized(request: MergeRequest, quant: str, device: str) -> MergeReport:
    """Merge in 16 bits beside the output, load that quantised, write it, and measure what was written.

    Needs the disk of both and the memory of the quantised model. Raises QunlearnErrors.
    """
    plan = make_plan(request, device)
    look = before(request, device) if request.measure else None
    with staged(request.output) as folder:
        sixteen = folder / "16-bit"
        sixteen.mkdir(mode=0o700)
        with stage(f"merging into the {request.base} weights"):
            write_model(plan, Journal(sixteen, plan.identity))
        with stage(f"quantising to {quant}"), quiet_transformers():
            trusted = request.sources[0].config.model.trust_remote_code
            base = load_base(sixteen, LoadSpec(quant, True, device, trusted, as_stored=True))
            base.model.save_pretrained(folder, max_shard_size=_SHARD)
            for name, path in plan.companions.items():
                shutil.copyfile(path, folder / name)
        del base
        shutil.rmtree(sixteen)
        if look is not None:
            after_quantized(look, folder, quant)
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return report_of(request, plan.adapter_tensors, sizes, look)
