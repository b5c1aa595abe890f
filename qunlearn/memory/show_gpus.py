"""Print the plan of a model on several GPUs, for `qunlearn plan --gpus` and before `forget` loads anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.memory.gpus import MOST_GPUS, GpusPlan, Sharded, plan_here
from qunlearn.memory.placement import Placement
from qunlearn.memory.plan import DeviceFacts
from qunlearn.utils.console import Column, clean, out, table
from qunlearn.utils.units import show_size


def gpus_plan_before_loading(
    config: Config, model_config: Mapping[str, Any], gpus: Sequence[DeviceFacts], longest: int
) -> GpusPlan:
    """Plan a run whose rows are known on the GPUs that are there, and print where everything goes.

    Raises DoesNotFitError, ModelError for an architecture that is not known.
    """
    plan = plan_here(config, model_config, gpus, longest)
    show_placement(plan.placement, plan.choices.optimizer, to_stdout=False)
    plan.check()
    return plan


def shards_plan_before_loading(
    config: Config, model_config: Mapping[str, Any], gpus: Sequence[DeviceFacts], longest: int
) -> GpusPlan:
    """Plan a run whose rows are known with a shard of everything on each GPU, and print what a GPU needs.

    Raises DoesNotFitError, ModelError for an architecture that is not known.
    """
    plan = plan_here(config, model_config, gpus, longest).for_shards()
    if plan.sharded is not None:
        _show_sharded(plan.sharded, to_stdout=False)
    plan.check_shards()
    return plan


def show_gpus_plan(plan: GpusPlan, name: str) -> None:
    """Both ways to use the GPUs, what each GPU needs, and the fewest that do, on stdout."""
    shape, load, n = plan.shape, plan.load, len(plan.limits)
    gpus = f"{n} {plan.device.name or 'CUDA'} GPU{'s' if n > 1 else ''} of {show_size(min(plan.limits))}"
    _tell(f"{name}: {shape.model_type}, {shape.parameters / 1e9:.2f} B parameters, on {gpus}")
    recomputed = "recomputed" if plan.choices.checkpointing else "kept"
    _tell(f"passes of up to {load.tokens} tokens, rows of up to {load.row_tokens}; activations {recomputed}")
    show_placement(plan.placement, plan.choices.optimizer, to_stdout=True)
    _tell(_verdict(plan.placement.fits, plan.placed_from))
    if plan.sharded is None:
        _tell("FSDP: int8 weights cannot be sharded")
        return
    _show_sharded(plan.sharded, to_stdout=True)
    _tell(_verdict(plan.sharded.fits, plan.sharded_from))


def show_placement(placement: Placement, optimizer: str, *, to_stdout: bool) -> None:
    """Where everything is, GPU by GPU; what is left over for the host's memory last."""
    rows = []
    for i, gpu in enumerate(placement.gpus):
        holds = _holds(gpu.start, gpu.stop, gpu.embeddings, gpu.head)
        rows.append([str(i), holds, _mib(gpu.needs_bytes), _mib(gpu.limit_bytes)])
    if not placement.fits:
        left = _holds(*placement.host_blocks, placement.host_embeddings, placement.host_head)
        rows.append(["host", f"left over: {left}", "", ""])
    columns = [Column("GPU", False), Column("holds", False), Column("needs, MiB"), Column("there is")]
    title = f"--device-map auto: laid over the GPUs, optimizer {optimizer}"
    table(title, columns, rows, to_stdout=to_stdout)


def _show_sharded(sharded: Sharded, *, to_stdout: bool) -> None:
    rows = [[name, _mib(size)] for name, size in sharded.parts.items() if size]
    rows += [["in all", _mib(sharded.needs_bytes)], ["there is", _mib(sharded.limit_bytes)]]
    title = f"--device-map fsdp: sharded over the GPUs, optimizer {sharded.optimizer}"
    table(title, [Column("component", False), Column("MiB on each GPU")], rows, to_stdout=to_stdout)


def _holds(start: int, stop: int, embeddings: bool, head: bool) -> str:
    named = ["embeddings"] if embeddings else []
    if stop > start:
        named.append(f"block {start}" if stop == start + 1 else f"blocks {start} to {stop - 1}")
    return ", ".join(named + (["output head"] if head else [])) or "nothing"


def _verdict(fits: bool, fewest: int | None) -> str:
    gpus = f"the fewest such GPUs that hold it: {fewest}" if fewest else f"{MOST_GPUS} such GPUs do not hold it"
    return f"{'fits' if fits else 'does not fit'}; {gpus}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _tell(text: str) -> None:
    out().print(clean(text), markup=False)
