"""What several GPUs need for one model, from its config alone."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from conftest import call

from qunlearn.config.resolve import resolve
from qunlearn.errors import ConfigError, DoesNotFitError
from qunlearn.hub.known_configs import carried_config
from qunlearn.hub.short_names import SHORT_NAMES
from qunlearn.memory import devices as driver
from qunlearn.memory.architecture import Shape
from qunlearn.memory.families import read_shape
from qunlearn.memory.gpus import GpusPlan, demand_of, plan_gpus, sharded_parts
from qunlearn.memory.placement import place
from qunlearn.memory.plan import DeviceFacts, run_choices, step_load
from qunlearn.memory.resident import resident_bytes
from qunlearn.memory.step import CACHE_BYTES, Load, run_needs

GPU = DeviceFacts("cuda", 2)
CARRIED = [m.name for m in SHORT_NAMES.values() if m.hub_id]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers on a machine that has one."""
    monkeypatch.setattr(driver, "_library", lambda: None)


def carried(name: str) -> Any:
    return carried_config(SHORT_NAMES[name])


def shape_of(name: str) -> Shape:
    return read_shape(carried(name))


def planned(name: str, *limits: int, **values: Any) -> GpusPlan:
    return plan_gpus(resolve(("test", values)), carried(name), GPU, limits)


# -- laid over the GPUs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["always", "never"])
@pytest.mark.parametrize("name", CARRIED)
def test_on_one_gpu_it_is_the_plan_of_one_gpu(name: str, checkpointing: str) -> None:
    """Counted in parts as counted at once; where activations are kept the last block's own are counted twice."""
    config = resolve(("test", {"train.checkpointing": checkpointing}))
    shape, load = shape_of(name), step_load(config, None)
    choices = run_choices(config, GPU, "adamw", "device")
    whole = run_needs(shape, choices, load)
    alone = place(demand_of(shape, choices, load), [1 << 50]).gpus[0].needs_bytes
    assert alone >= whole.allocated_bytes + whole.context_bytes
    assert alone <= (1.0001 if checkpointing == "always" else 1.05) * whole.total_bytes


def test_the_parts_add_up() -> None:
    """Two GPUs hold together what one holds, and twice what is on every GPU: context, masks, a block at work."""
    config = resolve()
    choices, load = run_choices(config, GPU, "adamw", "device"), step_load(config, None)
    demand = demand_of(shape_of("llama-70b"), choices, load)
    one, two = (sum(c.needs_bytes for c in place(demand, [1 << 50] * n).gpus) for n in (1, 2))
    assert demand.working > demand.head_working and two - one == demand.every + demand.working


def test_a_70b_model_is_on_two_gpus_of_24_gib() -> None:
    plan = planned("llama-70b", *[24 << 30] * 2)
    assert plan.fits and plan.placed_from == 2 and plan.placement.spans == ((0, 40), (40, 80))
    # 856 M weights a block in half a byte, their scales 1 + 4 / 256 bytes for 64 of them
    weights = 40 * 855_638_016 * (0.5 + (1 + 4 / 256) / 64)
    assert all(weights < gpu.needs_bytes < 1.35 * weights for gpu in plan.placement.gpus)
    assert plan.cache_bytes >= 512 * 2 * 2 * 8 * 128 * 80, "one row at least"


def test_a_shared_table_is_where_the_head_is() -> None:
    choices, load = run_choices(resolve(), GPU, "adamw", "device"), step_load(resolve(), None)
    shared, apart = (demand_of(shape_of(name), choices, load) for name in ("llama-3.2-3b", "llama-7b"))
    assert shared.first == 0 and shared.last > 2 * 128256 * 3072
    assert apart.first == 2 * 32000 * 4096
    first, last = planned("llama-3.2-3b", 8 << 30, 8 << 30).placement.gpus
    assert not first.embeddings and last.embeddings and last.head


def test_eight_bit_state_only_where_it_makes_it_fit() -> None:
    assert planned("llama-70b", 24 << 30, 24 << 30).choices.optimizer == "adamw"
    tight = planned("llama-70b", *[int(21.5 * 2**30)] * 2)
    assert tight.fits and tight.choices.optimizer == "adamw8bit"


def test_what_does_not_fit_says_how_many_gpus_do() -> None:
    plan = planned("llama-70b", *[16 << 30] * 2)
    with pytest.raises(DoesNotFitError, match="do not hold blocks 57 to 79") as caught:
        plan.check()
    assert plan.placed_from == 3 and str(caught.value.hint).startswith("3 such GPUs do")
    assert planned("llama-70b", *[16 << 30] * 3).fits


def test_embeddings_on_the_host_are_refused() -> None:
    with pytest.raises(ConfigError, match="of no use with several GPUs"):
        planned("llama-7b", 8 << 30, 8 << 30, **{"model.embeddings": "cpu"})


# -- sharded ---------------------------------------------------------------------------------------------


def test_sharded_by_hand() -> None:
    """Llama-2-7B on four GPUs: 6.476 G weights in its blocks, 40 M numbers in the adapters, 1/32 of them in each."""
    choices = run_choices(resolve(), GPU, "adamw", "device")
    parts = sharded_parts(shape_of("llama-2-7b"), choices, Load(512, 512, 512, 512, 512), 4)
    weights, adapters, a_block = 6_476_005_376, 39_976_960, 202_375_168
    assert parts["weights, its shard"] == weights / 2 / 4
    assert parts["scales of the weights, all"] == weights / 64 + 4 * weights / 64 / 256
    assert parts["adapter, gradients, optimizer state, its shard"] == (4 + 4 + 8) * adapters / 4
    assert parts["a block's adapter at work, its gradients"] == (2 + 4 + 4) * adapters / 32
    assert parts["adapter outside of blocks, all"] == 0
    assert parts["embeddings, head, norms"] == 2 * (2 * 32000 * 4096 + 65 * 4096)
    assert parts["a block gathered"] == 2 * (a_block / 2 + 4 * adapters / 32)


def test_the_adapter_of_a_70b_model_is_in_shards() -> None:
    """207 M numbers at r = 16: of 3.3 GB as trained, with gradients and state, a GPU of eight has 0.41."""
    shape, load, numbers = shape_of("llama-70b"), Load(512, 512, 512, 512, 512), 80 * 16 * 161_792
    choices = run_choices(resolve(), GPU, "adamw", "device")
    one, eight = (sharded_parts(shape, choices, load, n) for n in (1, 8))
    name = "adapter, gradients, optimizer state, its shard"
    assert one[name] == 16 * numbers and eight[name] == 16 * numbers / 8
    kept = run_choices(resolve(), GPU, "adamw", "device", recompute=False)
    at_work = [sharded_parts(shape, c, load, 8)["a block's adapter at work, its gradients"] for c in (choices, kept)]
    assert at_work == [10 * numbers / 80, 8 * numbers / 80 + 2 * numbers]


def test_an_adapter_outside_of_blocks_is_whole() -> None:
    """As OPT-350m's layers between the embeddings' width and its own, which are in no block."""
    shape = shape_of("opt-2.7b")
    shape = replace(shape, outside=(replace(shape.block[0], name="project_in"),))
    choices, load = run_choices(resolve(), GPU, "adamw", "device"), step_load(resolve(), None)
    numbers = 16 * sum(x.inputs + x.outputs for x in shape.outside)
    for gpus in (2, 8):
        assert sharded_parts(shape, choices, load, gpus)["adapter outside of blocks, all"] == (12 + 2 + 8) * numbers


@pytest.mark.parametrize("name", ["llama-7b", "gemma-2-9b", "opt-2.7b"])
def test_shards_are_what_is_resident(name: str) -> None:
    """On one GPU the shards are everything, and more GPUs never need more each."""
    config = resolve()
    choices, load, shape = run_choices(config, GPU, "adamw", "device"), step_load(config, None), shape_of(name)
    adapted = frozenset(x.name for x, _ in shape.linears())
    whole = resident_bytes(shape, choices, adapted)
    parts = sharded_parts(shape, choices, load, 1)
    assert parts["weights, its shard"] + parts["scales of the weights, all"] == whole["weights"]
    assert parts["embeddings, head, norms"] == whole["embeddings"]
    sums = [sum(sharded_parts(shape, choices, load, n).values()) for n in range(2, 12)]
    assert sums == sorted(sums, reverse=True)


def test_int8_cannot_be_sharded() -> None:
    plan = planned("llama-7b", 16 << 30, 16 << 30, **{"model.quant": "int8"})
    assert plan.sharded is None and plan.sharded_from is None and plan.fits


def test_a_run_in_shards_is_held_against_its_own_count() -> None:
    """Not against that of a model laid over the GPUs, and an answer's cache has what is left."""
    plan = planned("llama-70b", *[40 << 30] * 2).for_shards()
    assert plan.sharded is not None and plan.sharded.fits and plan.cache_bytes == CACHE_BYTES
    plan.check_shards()
    short = planned("llama-70b", *[16 << 30] * 2).for_shards()
    with pytest.raises(DoesNotFitError, match=r"2 GPUs of 16\.00 GiB do not hold it in shards") as caught:
        short.check_shards()
    assert f"{short.sharded_from} such GPUs do" in str(caught.value.hint)
    needed = planned("llama-7b", *[16 << 30] * 2, **{"train.max_tokens": 64}).sharded
    assert needed is not None
    tight = planned("llama-7b", *[needed.needs_bytes] * 2, **{"train.max_tokens": 64}).for_shards()
    assert tight.cache_bytes == needed.parts["saved activations, its own passes"] < CACHE_BYTES
    int8 = planned("llama-7b", 16 << 30, 16 << 30, **{"model.quant": "int8"}).for_shards()
    with pytest.raises(DoesNotFitError):
        int8.check_shards()


# -- the command -----------------------------------------------------------------------------------------


def test_the_command_says_where_everything_goes() -> None:
    ran = call("plan", "--model", "llama-70b", "--gpus", 2, "--vram", "24GiB")
    assert ran.code == 0, ran.stderr
    assert re.search(r"^ 0 +embeddings, blocks 0 to 39 .*24,576\.0", ran.stdout, re.M)
    assert re.search(r"^ 1 +blocks 40 to 79, output head ", ran.stdout, re.M)
    assert "the fewest such GPUs that hold it: 2" in ran.stdout
    assert "--device-map fsdp: sharded over the GPUs" in ran.stdout and "a block gathered" in ran.stdout


def test_the_command_ends_with_4_where_the_gpus_do_not_hold_it() -> None:
    ran = call("plan", "--model", "llama-70b", "--gpus", 2, "--vram", "16GiB")
    assert ran.code == 4 and "left over: blocks 57 to 79" in ran.stdout and "3 such GPUs do" in ran.stderr
    told = call("plan", "--model", "llama-70b", "--gpus", 2, "--vram", "16GiB", "--json")
    assert told.code == 4 and told.json["status"] == "does not fit"
    assert told.json["device_map"]["least_gpus"] == 3 and told.json["device_map"]["host_blocks"] == [57, 80]
    assert told.json["fsdp"]["needs_bytes"] == sum(told.json["fsdp"]["components"].values())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--gpus", 2), "no GPU was found here"),
        (("--gpus", 0, "--vram", "8GiB"), "0 is not a number of GPUs"),
        (("--gpus", 2, "--device", "cpu"), "of no use with --device cpu"),
    ],
)
def test_what_is_refused(flags: tuple[object, ...], says: str) -> None:
    ran = call("plan", "--model", "llama-7b", *flags)
    assert ran.code == 2 and says in ran.stderr and "hint:" in ran.stderr
