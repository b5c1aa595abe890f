"""Print the memory plan, for `qunlearn plan` and before `forget` loads anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.errors import ModelError
from qunlearn.memory.fit import memory_plan
from qunlearn.memory.plan import DeviceFacts, MemoryPlan
from qunlearn.utils.console import Column, clean, facts, out, table, warn
from qunlearn.utils.units import show_size

# -- for `forget` ----------------------------------------------------------------------------------------

_LIBRARIES = "some 0.5 GiB of Python and its libraries"  # resident with a tiny model (benchmarks/bench_resident.py)


def plan_before_loading(
    config: Config, model_config: Mapping[str, Any], device: DeviceFacts, longest: int
) -> MemoryPlan | None:
    """Plan a run whose rows are known and print it; None, and a line that says so, for an unknown architecture.

    Raises DoesNotFitError on a GPU, or where --vram was given.
    """
    try:
        plan = memory_plan(config, model_config, device, longest)
    except ModelError as error:
        facts("", [("memory", f"no plan: {error}")])
        if config.model.vram:
            warn("--vram is not checked before loading: it only caps what is allocated on a GPU")
        return None
    if device.on_gpu or config.model.vram:
        show_parts(plan, to_stdout=False)
        plan.check()
    else:
        size, moment = show_size(plan.needs.total_bytes), plan.needs.moment
        facts("", [("memory", f"{size} of tensors, at most in {moment}, and {_LIBRARIES}; {_activations(plan)}")])
    return plan


# -- for people ------------------------------------------------------------------------------------------


def show_plan(plan: MemoryPlan, name: str) -> None:
    """The table and what follows from it, on stdout."""
    shape, load, choices = plan.shape, plan.load, plan.choices
    _tell(f"{name}: {shape.model_type}, {shape.parameters / 1e9:.2f} B parameters, on {_place(plan.device)}")
    _tell(
        f"passes of up to {load.tokens} tokens, rows of up to {load.row_tokens}; optimizer {choices.optimizer}, "
        f"embeddings on the {'host' if choices.embeddings == 'cpu' else 'device'}, {_activations(plan)}"
    )
    show_parts(plan, to_stdout=True)
    if plan.limit_bytes is None:
        _tell("no limit is known here: give --vram, such as --vram 6GiB")
        return
    if plan.fits:
        spare = plan.limit_bytes - plan.needs.total_bytes
        _tell(f"fits, {show_size(spare)} to spare; the largest --max-tokens that fits so is {plan.largest_tokens}")


def show_parts(plan: MemoryPlan, *, to_stdout: bool) -> None:
    """The components, what is alive of each at the worst moment, and the sums."""
    needs = plan.needs
    rows = [[part.name, _mib(part.size_bytes), _mib(part.counted_bytes)] for part in needs.parts if part.size_bytes]
    rows.append([f"allocated at most, in {needs.moment}", "", _mib(needs.allocated_bytes)])
    if needs.loading_bytes > needs.allocated_bytes:
        rows.append(["before that, while it is loaded", "", _mib(needs.loading_bytes)])
    if needs.answering_bytes > needs.allocated_bytes:
        rows.append([f"while answering, cache of {show_size(needs.cache_bytes)}", "", _mib(needs.answering_bytes)])
    if needs.context_bytes:
        rows.append(["CUDA context, beside that", "", _mib(needs.context_bytes)])
    rows.append(["in all", "", _mib(needs.total_bytes)])
    if plan.limit_bytes is not None:
        rows.append(["there is", "", _mib(plan.limit_bytes)])
    columns = [Column("component", False), Column("MiB"), Column("at the peak")]
    table("memory plan", columns, rows, to_stdout=to_stdout)


def _place(device: DeviceFacts) -> str:
    name = device.name or ("a CUDA GPU (none was found here)" if device.on_gpu else "the CPU")
    return f"{name}, computing in {8 * device.compute_bytes} bits"


def _activations(plan: MemoryPlan) -> str:
    recorded = f", passes of {plan.max_tokens} tokens recorded as CUDA graphs" if plan.choices.recorded else ""
    return f"activations {plan.choices.activations}{recorded}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _tell(text: str) -> None:
    out().print(clean(text), markup=False)
