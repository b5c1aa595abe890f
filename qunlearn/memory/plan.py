"""The memory plan: settings, device and shape, and the best of the ways in which a run could use them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qunlearn.config.objective import KEPT_APART, ObjectiveConfig
from qunlearn.config.settings import Config
from qunlearn.errors import DoesNotFitError, ModelError
from qunlearn.memory.architecture import Shape
from qunlearn.memory.resident import Choices
from qunlearn.memory.step import CACHE_BYTES, Load, Needs, run_needs
from qunlearn.utils.units import parse_size, show_size

_STEP_TOKENS = 16  # the token budget is looked for in steps of so many
_MOST_TOKENS = 1 << 17
_FEWEST_RECORDED = 512  # tokens of a pass that is recorded for the sake of memory; fewer gain nothing
_FILLED = 0.9  # of a memory that kept activations may fill: who is short of it recomputes them
_CPU_BYTES = 2 << 30  # that a run with kept activations may take where no limit is known


@dataclass(frozen=True)
class DeviceFacts:
    """Where a run would be. `kind`: cuda or cpu; `compute_bytes` of a number; `memory_bytes` of the GPU, if known."""

    kind: str
    compute_bytes: int
    memory_bytes: int | None = None
    name: str = ""

    @property
    def on_gpu(self) -> bool:
        return self.kind == "cuda"


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs, as it would be run: `choices` holds every decision that was left to the plan.

    `max_tokens` of a pass are those asked for, or what was chosen; fewer where passes are recorded.
    `largest_tokens` is the largest --max-tokens that fits with these choices, None where not even the longest row does;
    `change` is the least that has to change where it does not fit.
    """

    shape: Shape
    choices: Choices
    load: Load
    needs: Needs
    device: DeviceFacts
    limit_bytes: int | None
    max_tokens: int = 0
    largest_tokens: int | None = None
    change: str | None = None

    @property
    def fits(self) -> bool:
        return self.limit_bytes is None or self.needs.total_bytes <= self.limit_bytes

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The blocks of each of several GPUs: none, it is a plan for one."""
        return ()

    @property
    def cache_bytes(self) -> int:
        """The key-value cache a batch of answers may take."""
        return CACHE_BYTES if self.limit_bytes is None else self.needs.cache_within(self.limit_bytes)

    def settled(self, config: Config) -> Config:
        """The settings with `auto` replaced by what was chosen."""
        recompute = "always" if self.choices.checkpointing else "never"
        recorded = "graphs" if self.choices.recorded else "off"
        train = {"checkpointing": recompute, "kept_blocks": self.choices.kept_blocks, "compile": recorded}
        train["max_tokens"] = self.max_tokens
        config = with_values(config, "train", optimizer=self.choices.optimizer, **train)
        return with_values(config, "model", embeddings=self.choices.embeddings)

    def check(self) -> None:
        """Raises DoesNotFitError naming the least change that would help."""
        if self.fits or self.limit_bytes is None:
            return
        message = f"needs {show_size(self.needs.total_bytes)}, there is {show_size(self.limit_bytes)}"
        raise DoesNotFitError(message, where="memory plan", hint=self.change)

    def as_dict(self) -> dict[str, Any]:
        """For --json; every number in bytes or tokens."""
        return {
            "architecture": self.shape.model_type,
            "parameters": self.shape.parameters,
            "device": asdict(self.device),
            "choices": asdict(self.choices),
            "load": asdict(self.load),
            "moment": self.needs.moment,
            "components": [asdict(part) for part in self.needs.parts],
            "allocated_bytes": self.needs.allocated_bytes,
            "loading_bytes": self.needs.loading_bytes,
            "answering_bytes": self.needs.answering_bytes,
            "cache_bytes": self.cache_bytes,
            "context_bytes": self.needs.context_bytes,
            "total_bytes": self.needs.total_bytes,
            "limit_bytes": self.limit_bytes,
            "fits": self.fits,
            "max_tokens": self.max_tokens,
            "largest_max_tokens": self.largest_tokens,
            "change": self.change,
        }


def memory_limit(config: Config, device: DeviceFacts) -> int | None:
    """--vram, or the GPU's memory where that is less or nothing was asked for; None where neither is known."""
    asked = parse_size(config.model.vram, "--vram") if config.model.vram else None
    known = [size for size in (asked, device.memory_bytes if device.on_gpu else None) if size is not None]
    return min(known) if known else None


def as_stored(config: Config, model_config: Mapping[str, Any]) -> Config:
    """The settings with the quantisation of a checkpoint that has its own. Raises ModelError for other kinds."""
    stored = model_config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return config
    if stored.get("load_in_4bit"):
        quant, double = str(stored.get("bnb_4bit_quant_type", "fp4")), bool(stored.get("bnb_4bit_use_double_quant"))
    elif stored.get("load_in_8bit"):
        quant, double = "int8", False
    else:
        message = f"the memory plan does not know checkpoints quantised with {stored.get('quant_method')!r}"
        raise ModelError(message, where="config.json", hint="`forget` does not need the plan")
    return replace(config, model=replace(config.model, quant=quant, double_quant=double))


# -- from settings to numbers ----------------------------------------------------------------------------


def step_load(config: Config, longest_row: int | None) -> Load:
    """The largest work of a step under these settings: what longer rows or more of them cannot exceed. The longest row
    in tokens is None where the data is not known."""
    data, train, objective = config.data, config.train, config.objective
    longest = min(data.max_length, longest_row or data.max_length)
    family = longest * objective.answers if train.pack else longest
    rows = train.batch_size * (1 if train.pack else objective.answers) + train.normal_batch_size
    tokens = max(longest, min(train.pass_tokens, rows * family))
    reference = train.normal_batch_size * longest if objective.eps3 > 0 else 0
    return Load(tokens, min(tokens, family), tokens, reference, longest)


def run_choices(
    config: Config,
    device: DeviceFacts,
    optimizer: str,
    embeddings: str,
    *,
    recompute: bool | None = None,
    recorded: bool = False,
) -> Choices:
    """The settings memory depends on, with what `auto` has come to."""
    return Choices(
        quant=config.model.quant,
        double_quant=config.model.double_quant,
        compute_bytes=device.compute_bytes,
        on_gpu=device.on_gpu,
        r=config.lora.r,
        target_modules=config.lora.target_modules,
        optimizer=optimizer,
        embeddings=embeddings,
        head=config.model.head,
        offload=config.train.offload,
        checkpointing=config.train.recomputes if recompute is None else recompute,
        packed=config.train.pack,
        recorded=recorded,
        apart=_kept_apart(config.objective),
        kept_blocks=config.train.kept_blocks or 0,
    )


def _kept_apart(objective: ObjectiveConfig) -> int:
    """Return how many losses' gradients are kept apart: the row's own, what is said instead, and what is taught."""
    losses = KEPT_APART.get(objective.name, 0)
    return losses + 1 + (objective.instead != "nothing") if losses else 0


def _ways(config: Config, shape: Shape, device: DeviceFacts, longest_row: int | None) -> Iterator[tuple[Choices, int]]:
    """Return what `auto` may come to, and the tokens of a pass, best first.

    Recomputing and moving embeddings cost time, 8-bit state a result. Recorded passes gain more than large ones.
    """
    optimizers = ("adamw", "adamw8bit") if config.train.optimizer == "auto" else (config.train.optimizer,)
    places: tuple[str, ...] = ("device",)
    if device.on_gpu and not shape.tied:
        places = ("device", "cpu")
    elif device.on_gpu and config.model.head == "8bit":  # beside the head's codes a shared table would be one more
        places = ("cpu",)
    places = places if config.model.embeddings == "auto" else (config.model.embeddings,)
    asked = config.train.checkpointing
    if asked == "auto" and config.train.offload:  # it is the inputs of recomputed blocks that are moved
        asked = "always"
    recompute = {"always": (True,), "never": (False,)}.get(asked, (False, True))
    for optimizer, place in itertools.product(optimizers, places):
        for tokens, again in itertools.product(_recorded_tokens(config, shape, device, place, longest_row), recompute):
            yield run_choices(config, device, optimizer, place, recompute=again, recorded=True), tokens
        for tokens, again in itertools.product(_unrecorded_tokens(config, device, longest_row), recompute):
            yield run_choices(config, device, optimizer, place, recompute=again), tokens


def _recorded_tokens(
    config: Config, shape: Shape, device: DeviceFacts, place: str, longest_row: int | None
) -> Iterator[int]:
    """The tokens of a pass that could be recorded, largest first: halves of what is asked, while they hold any row.

    None where gradients are kept apart by loss, or random numbers are drawn, which no recording repeats.
    """
    train, tokens = config.train, config.train.pass_tokens
    draws = config.lora.dropout > 0 or shape.traits.dropout > 0 or shape.traits.score_dropout > 0
    if draws or _kept_apart(config.objective) or not device.on_gpu:
        return
    if train.compile == "off" or place == "cpu" or train.offload or not train.pack:
        return
    yield tokens
    least = max(_FEWEST_RECORDED, step_load(with_values(config, "train", max_tokens=1), longest_row).tokens)
    while (tokens := tokens // 2) >= least:
        yield tokens


def _unrecorded_tokens(config: Config, device: DeviceFacts, longest_row: int | None) -> list[int]:
    """The tokens of a pass that is launched piece by piece, largest first: the whole step and halves of it, since on a
    GPU a pass takes as long for few tokens as for many."""
    usual = config.train.pass_tokens
    if config.train.max_tokens is not None or not device.on_gpu:
        return [usual]
    tokens = step_load(with_values(config, "train", max_tokens=_MOST_TOKENS), longest_row).tokens
    larger = []
    while tokens > usual:
        larger.append(tokens)
        tokens //= 2
    return [*larger, usual]


def best_plan(
    config: Config, shape: Shape, device: DeviceFacts, limit: int | None, longest_row: int | None
) -> MemoryPlan:
    """The first way that fits, else the leanest, with fewer tokens of a pass where that is left to the plan."""
    plans = []
    for choices, tokens in _ways(config, shape, device, longest_row):
        load = step_load(with_values(config, "train", max_tokens=tokens), longest_row)
        plan = MemoryPlan(shape, choices, load, run_needs(shape, choices, load), device, limit, tokens)
        usual = choices.checkpointing or config.train.checkpointing == "never"
        if plan.fits and ((usual and tokens <= config.train.pass_tokens) or _is_roomy(plan)):
            return plan
        plans.append(plan)
    if config.train.max_tokens is None and limit is not None:
        fewer = largest_tokens(config, shape, device, limit, longest_row)
        if fewer is not None:
            return best_plan(with_values(config, "train", max_tokens=fewer), shape, device, limit, longest_row)
    return min(plans, key=lambda plan: plan.needs.total_bytes)


def keep_blocks(plan: MemoryPlan, config: Config) -> MemoryPlan:
    """Return the plan with the activations of as many of the last blocks kept as there is plenty of room for."""
    auto = config.train.checkpointing == "auto" and config.train.kept_blocks is None
    if not (auto and plan.fits and plan.choices.checkpointing) or plan.choices.offload:
        return plan

    def keeping(blocks: int) -> MemoryPlan:
        choices = replace(plan.choices, kept_blocks=blocks)
        return replace(plan, choices=choices, needs=run_needs(plan.shape, choices, plan.load))

    more = bisect.bisect_left(range(1, plan.shape.layers), True, key=lambda n: not _is_roomy(keeping(n)))
    return keeping(more) if more else plan


def _is_roomy(plan: MemoryPlan) -> bool:
    """Return whether there is plenty of room, to keep activations or for large passes."""
    room = _FILLED * plan.limit_bytes if plan.limit_bytes else 0 if plan.device.on_gpu else _CPU_BYTES
    return plan.needs.total_bytes <= room


def largest_tokens(
    config: Config, shape: Shape, device: DeviceFacts, limit: int, longest_row: int | None
) -> int | None:
    """The largest --max-tokens that fits, in steps of 16; None when not even the longest row does.

    Of passes that are not recorded: those are made as small as they must be.
    """
    config = with_values(config, "train", compile="off")

    def fits(tokens: int) -> bool:
        return best_plan(with_values(config, "train", max_tokens=tokens), shape, device, limit, longest_row).fits

    least, high = step_load(with_values(config, "train", max_tokens=1), longest_row).tokens, _MOST_TOKENS
    if not fits(least):
        return None
    low = least
    while high - low > _STEP_TOKENS:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(least, low // _STEP_TOKENS * _STEP_TOKENS)


def with_values(config: Config, section: str, **values: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **values)})
