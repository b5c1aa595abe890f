"""Count what several GPUs need for one model: its blocks laid over them, or everything sharded over all (FSDP).

From settings and config.json alone. Laid over the GPUs a model computes on one of them after the other; sharded, each
GPU computes its own passes and gathers a block's weights when it comes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.errors import ConfigError, DoesNotFitError, ModelError
from qunlearn.memory.architecture import Linear, Shape
from qunlearn.memory.families import FAMILIES, read_shape
from qunlearn.memory.placement import Demand, Placement, place
from qunlearn.memory.plan import DeviceFacts, as_stored, memory_limit, run_choices, step_load, with_values
from qunlearn.memory.resident import (
    CUBLAS_BYTES,
    Choices,
    adapted_names,
    other_bytes,
    scale_bytes,
    state_bytes,
    weight_bytes,
)
from qunlearn.memory.step import CACHE_BYTES, CONTEXT_BYTES, Load, Step
from qunlearn.utils.units import show_size

_FP32 = 4
MOST_GPUS = 64  # that are looked for; a machine has 16 at most


@dataclass(frozen=True)
class Sharded:
    """What each GPU needs under FSDP, by component."""

    parts: Mapping[str, int]
    limit_bytes: int
    optimizer: str

    @property
    def needs_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.needs_bytes <= self.limit_bytes


@dataclass(frozen=True)
class GpusPlan:
    """A run of one model on several GPUs. `placed_from`, `sharded_from`: the fewest GPUs of the smallest one's size
    that hold it so; None where MOST_GPUS do not. `sharded` is None for a quantisation that cannot be sharded."""

    shape: Shape
    choices: Choices
    load: Load
    device: DeviceFacts
    placement: Placement
    sharded: Sharded | None
    placed_from: int | None
    sharded_from: int | None
    cache_bytes: int

    @property
    def limits(self) -> tuple[int, ...]:
        return tuple(gpu.limit_bytes for gpu in self.placement.gpus)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The blocks of each GPU: from, up to but not including."""
        return self.placement.spans

    @property
    def fits(self) -> bool:
        """Return whether the GPUs hold the model laid over them, which is what `forget` can do."""
        return self.placement.fits

    def settled(self, config: Config) -> Config:
        """The settings with `auto` replaced by what a model that is laid over several GPUs is run with."""
        recompute = "always" if self.choices.checkpointing else "never"
        train = {"checkpointing": recompute, "kept_blocks": 0, "optimizer": self.choices.optimizer}
        config = with_values(config, "train", compile="off", **train)
        return with_values(config, "model", embeddings="device")

    def check(self) -> None:
        """Raises DoesNotFitError unless the GPUs hold the model laid over them."""
        if self.placement.fits:
            return
        start, stop = self.placement.host_blocks
        left = [f"blocks {start} to {stop - 1}"] if stop > start else []
        left += ["the embeddings"] if self.placement.host_embeddings else []
        left += ["the output head"] if self.placement.host_head else []
        message = f"{len(self.limits)} GPUs of {show_size(min(self.limits))} do not hold {' and '.join(left)}"
        hint = "fewer --max-tokens, a shorter --max-length, or a smaller model"
        if self.placed_from is not None and self.placed_from > len(self.limits):
            hint = f"{self.placed_from} such GPUs do; or {hint}"
        raise DoesNotFitError(message, where="memory plan", hint=hint)

    def for_shards(self) -> GpusPlan:
        """The same for a run in shards: its optimizer, and a cache for generation in what is left."""
        if self.sharded is None:
            return self
        left = (
            self.sharded.limit_bytes
            - self.sharded.needs_bytes
            + self.sharded.parts["saved activations, its own passes"]
        )
        choices = replace(self.choices, optimizer=self.sharded.optimizer)
        return replace(self, choices=choices, cache_bytes=max(1, min(CACHE_BYTES, left)))

    def check_shards(self) -> None:
        """Raises DoesNotFitError unless each GPU holds its shard of everything."""
        if self.sharded is not None and self.sharded.fits:
            return
        hint = "fewer --max-tokens, a shorter --max-length, or a smaller model"
        if self.sharded_from is not None:
            hint = f"{self.sharded_from} such GPUs do; or {hint}"
        message = f"{len(self.limits)} GPUs of {show_size(min(self.limits))} do not hold it in shards"
        raise DoesNotFitError(message, where="memory plan", hint=hint)

    def as_dict(self) -> dict[str, Any]:
        """For --json; every number in bytes, tokens or GPUs."""
        sharded = self.sharded
        return {
            "architecture": self.shape.model_type,
            "parameters": self.shape.parameters,
            "gpus": len(self.limits),
            "choices": asdict(self.choices),
            "load": asdict(self.load),
            "device_map": {"fits": self.placement.fits, "least_gpus": self.placed_from, **asdict(self.placement)},
            "fsdp": sharded
            and {
                "fits": sharded.fits,
                "least_gpus": self.sharded_from,
                "optimizer": sharded.optimizer,
                "components": dict(sharded.parts),
                "needs_bytes": sharded.needs_bytes,
                "limit_bytes": sharded.limit_bytes,
            },
        }


def plan_gpus(
    config: Config,
    model_config: Mapping[str, Any],
    device: DeviceFacts,
    limits: Sequence[int],
    longest_row: int | None = None,
) -> GpusPlan:
    """Plan a run on GPUs of so many bytes each. With `auto` the optimizer has 8-bit state only where that makes the
    model fit when it is laid over them.

    Raises ModelError for an architecture that is not known, ConfigError for what is of no use on several GPUs.
    """
    shape, config = read_shape(model_config), as_stored(config, model_config)
    check_settings(config)
    load = step_load(config, longest_row)
    ways = list(_ways(config, device))
    demands = [demand_of(shape, choices, load) for choices in ways]
    placed = [_with_table(place(demand, limits), shape) for demand in demands]
    best = next((i for i, one in enumerate(placed) if one.fits), len(ways) - 1)
    smallest, sharded, choices = min(limits), None, ways[best]
    sharded_from = None
    if choices.quant != "int8":  # FSDP shards numbers with a fraction alone
        sharded = Sharded(sharded_parts(shape, ways[0], load, len(limits)), smallest, ways[0].optimizer)
        sharded_from = _fewest(lambda n: sum(sharded_parts(shape, ways[0], load, n).values()) <= smallest)
    placed_from = _fewest(lambda n: any(place(demand, [smallest] * n).fits for demand in demands))
    cache = _cache_bytes(shape, choices, load, placed[best])
    return GpusPlan(shape, choices, load, device, placed[best], sharded, placed_from, sharded_from, cache)


def plan_answers(config: Config, model_config: Mapping[str, Any], gpus: Sequence[DeviceFacts]) -> GpusPlan:
    """Plan a model on these GPUs for answers and scores alone: the weights, a small adapter, one row at a time.

    Raises ModelError for an architecture that is not known, DoesNotFitError.
    """
    config = with_values(config, "train", max_tokens=1, checkpointing="always")
    plan = plan_here(with_values(config, "lora", r=1), model_config, gpus)
    plan.check()
    return plan


def plan_here(
    config: Config, model_config: Mapping[str, Any], gpus: Sequence[DeviceFacts], longest_row: int | None = None
) -> GpusPlan:
    """Plan a run on the GPUs that are there, each with its memory, or with --vram where that is less.

    Raises ModelError for an architecture that is not known, ConfigError.
    """
    try:
        limits = [memory_limit(config, gpu) or 0 for gpu in gpus]
        return plan_gpus(config, model_config, gpus[-1], limits, longest_row)
    except ModelError as error:
        hint = f"--device-map auto needs the plan, which knows {', '.join(sorted(FAMILIES))}"
        raise ModelError(error.message, where=error.where, hint=hint) from error


def check_settings(config: Config) -> None:
    """Refuse settings that a model on several GPUs cannot have. Raises ConfigError."""
    if config.model.embeddings == "cpu":
        hint = "leave it out: they are on the first GPU"
        raise ConfigError("of no use with several GPUs", where="--embeddings cpu", hint=hint)
    if config.train.kept_blocks:
        hint = "leave it out: all blocks are recomputed there, or, with train.checkpointing=never, none"
        raise ConfigError("not planned for several GPUs", where="train.kept_blocks", hint=hint)


def _ways(config: Config, device: DeviceFacts) -> Iterator[Choices]:
    """Return what `auto` may come to, best first."""
    recompute = config.train.checkpointing != "never"
    for optimizer in ("adamw", "adamw8bit") if config.train.optimizer == "auto" else (config.train.optimizer,):
        yield run_choices(config, device, optimizer, "device", recompute=recompute)


def _fewest(fits: Callable[[int], bool]) -> int | None:
    return next((n for n in range(1, MOST_GPUS + 1) if fits(n)), None)


# -- laid over the GPUs ---------------------------------------------------------------------------------


def demand_of(shape: Shape, choices: Choices, load: Load) -> Demand:
    """Count what the parts of a model need where they are placed.

    A table that embeddings and head share is on the last GPU, and learned positions with it.
    Raises ModelError for modules that are not there.
    """
    adapted = adapted_names(shape, choices.target_modules)
    step, c, other = Step(shape, choices, load, adapted), choices.compute_bytes, other_bytes(shape, choices)
    norms, final = divmod(shape.extra, shape.layers)  # the final norm has fewer numbers than there are in all blocks
    block = sum(_held(x, choices, adapted) for x in shape.block) + step.held_a_block()
    blocks = [block + c * (norms + sum(x.outputs for x in shape.block if x.bias))] * shape.layers
    for name in shape.unquantised:
        x = next(x for x in shape.block if x.name == name)
        blocks[-1] += x.weights * c - weight_bytes(x, choices)
    into = [x for x in shape.outside if x.outputs == shape.hidden]
    first = other["table"] + step.embedded + sum(_held(x, choices, adapted) for x in into)
    last = other["head"] + c * final + step.held_states()
    last += sum(_held(x, choices, adapted) for x in shape.outside if x not in into)
    last += c * sum(x.outputs for x in shape.outside if x.bias)
    if shape.tied:
        first, last = 0, last + first
    arriving = 0 if choices.quant == "none" else c * max(x.weights for x in shape.block)
    whole_head = c * shape.vocabulary * shape.embedding_width if choices.head == "8bit" else 0  # until it is rounded
    return Demand(
        blocks=tuple(blocks),
        first=first,
        last=last,
        working=max(step.working(), arriving),
        head_working=max(step.head_working(), whole_head),
        every=CONTEXT_BYTES + CUBLAS_BYTES + step.masks,
    )


def _with_table(placement: Placement, shape: Shape) -> Placement:
    """Name the embeddings where they are: with the head, where it shares their table."""
    if not shape.tied:
        return placement
    gpus = tuple(replace(gpu, embeddings=gpu.head) for gpu in placement.gpus)
    return replace(placement, gpus=gpus, host_embeddings=placement.host_head)


def _held(x: Linear, choices: Choices, adapted: frozenset[str]) -> int:
    """A frozen matrix; with its adapter, as trained and as computed, the gradients and the optimizer's state."""
    held = weight_bytes(x, choices)
    if x.name in adapted:
        numbers = choices.r * (x.inputs + x.outputs)
        held += (_FP32 + choices.compute_bytes + _FP32) * numbers + state_bytes(x, choices)
    return held


def _cache_bytes(shape: Shape, choices: Choices, load: Load, placement: Placement) -> int:
    """The key-value cache of a batch of answers, over all GPUs: half of what the fullest has to spare, and as much
    more on each as its blocks ask for; that of the fewest answers is counted already."""
    a_block = 2 * choices.compute_bytes * shape.kv_heads * shape.head_dim
    more = [
        (gpu.limit_bytes - gpu.needs_bytes) // (2 * a_block * (gpu.stop - gpu.start))
        for gpu in placement.gpus
        if gpu.stop > gpu.start
    ]
    return min(CACHE_BYTES, (load.longest + max(0, min(more, default=0))) * a_block * shape.layers)


# -- sharded ---------------------------------------------------------------------------------------------


def sharded_parts(shape: Shape, choices: Choices, load: Load, gpus: int) -> dict[str, int]:
    """Count what each of so many GPUs needs with `--device-map fsdp`: the blocks' weights and their adapters, with
    gradients and optimizer state, in shards, the rest whole.

    The scales of 4-bit weights are outside the sharded tensors, whole on each GPU. Every GPU has passes of its own,
    with the activations of all blocks. While a block computes its adapter is there whole, as trained and as computed,
    and on the way back its gradients, in the parameters and in the message that sums them.
    """
    adapted = adapted_names(shape, choices.target_modules)
    step, c, other = Step(shape, choices, load, adapted), choices.compute_bytes, other_bytes(shape, choices)
    everywhere = shape.linears()
    inside = [x for x in shape.block if x.name in adapted]
    outside = [x for x in shape.outside if x.name in adapted]
    scales = sum(n * scale_bytes(x, choices) for x, n in everywhere)
    packed = sum(n * weight_bytes(x, choices) for x, n in everywhere) - scales
    block = sum(weight_bytes(x, choices) - scale_bytes(x, choices) for x in shape.block)
    a_block, beside = (sum(choices.r * (x.inputs + x.outputs) for x in found) for found in (inside, outside))
    trained = shape.layers * (2 * _FP32 * a_block + sum(state_bytes(x, choices) for x in inside))
    whole = (3 * _FP32 + c) * beside + sum(state_bytes(x, choices) for x in outside)
    cast = c * a_block * (1 if choices.checkpointing else shape.layers)  # kept for the way back, as activations are
    ends = step.held_states() + step.embedded
    return {
        "weights, its shard": -(-packed // gpus),
        "scales of the weights, all": scales,
        "embeddings, head, norms": sum(other.values()),
        "adapter, gradients, optimizer state, its shard": -(-trained // gpus),
        "adapter outside of blocks, all": whole,
        "a block gathered": 2 * (block + _FP32 * a_block) if gpus > 1 else 0,
        "a block's adapter at work, its gradients": cast + 2 * _FP32 * a_block,
        "saved activations, its own passes": shape.layers * step.held_a_block() + ends,
        "block or head at work": max(step.working(), step.head_working()),
        "CUDA context, workspace, masks": CONTEXT_BYTES + CUBLAS_BYTES + step.masks,
    }
