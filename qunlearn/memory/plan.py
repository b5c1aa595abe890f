"""Whether a run fits into a memory, how it fits best, and what is the least that would have to change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.errors import DoesNotFitError, ModelError
from qunlearn.hub.known_configs import carried_config
from qunlearn.hub.short_names import SHORT_NAMES
from qunlearn.memory.architecture import Shape
from qunlearn.memory.families import read_shape
from qunlearn.memory.resident import Choices
from qunlearn.memory.step import CACHE_BYTES, Load, Needs, run_needs
from qunlearn.utils.units import parse_size, show_size

_STEP_TOKENS = 16  # the token budget is looked for in steps of so many
_MOST_TOKENS = 1 << 17
_FILLED = 0.9  # of a memory that kept activations may fill: who is short of it recomputes them
_CPU_BYTES = 2 << 30  # that a run with kept activations may take where no limit is known


@dataclass(frozen=True)
class DeviceFacts:
    """Where a run would be. `kind`: cuda or cpu; `compute_bytes` of a number; `memory_bytes` of the card, if known."""

    kind: str
    compute_bytes: int
    memory_bytes: int | None = None
    name: str = ""

    @property
    def on_card(self) -> bool:
        return self.kind == "cuda"


@dataclass(frozen=True)
class Lengths:
    """What is known of the data: tokens of its longest row."""

    longest: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs, as it would be run: `choices` holds every decision that was left to the plan.

    `largest_tokens` is the largest --max-tokens that fits with these choices, None where not even the longest row does;
    `change` is the least that has to change where it does not fit.
    """

    shape: Shape
    choices: Choices
    load: Load
    needs: Needs
    device: DeviceFacts
    limit_bytes: int | None
    largest_tokens: int | None = None
    change: str | None = None

    @property
    def fits(self) -> bool:
        return self.limit_bytes is None or self.needs.total_bytes <= self.limit_bytes

    @property
    def cache_bytes(self) -> int:
        """The key-value cache a batch of answers may take."""
        return CACHE_BYTES if self.limit_bytes is None else self.needs.cache_within(self.limit_bytes)

    def settled(self, config: Config) -> Config:
        """The settings with `auto` replaced by what was chosen."""
        recompute = "always" if self.choices.checkpointing else "never"
        config = _with(config, "train", optimizer=self.choices.optimizer, checkpointing=recompute)
        return _with(config, "model", embeddings=self.choices.embeddings)

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
            "largest_max_tokens": self.largest_tokens,
            "change": self.change,
        }


def memory_plan(
    config: Config, model_config: Mapping[str, Any], device: DeviceFacts, lengths: Lengths | None = None
) -> MemoryPlan:
    """Plan a run from its settings and its model's config.json. Where nothing fits, the plan says what would.

    Raises ModelError for an architecture that is not known and modules that are not there, ConfigError for no size.
    """
    shape, config = read_shape(model_config), as_stored(config, model_config)
    limit = memory_limit(config, device)
    plan = _best(config, shape, device, limit, lengths)
    if limit is None:
        return plan
    settled = _with(plan.settled(config), "train", checkpointing=config.train.checkpointing)
    largest = _largest_tokens(settled, shape, device, limit, lengths)
    change = None if plan.fits else _least_change(config, shape, device, limit, lengths)
    return replace(plan, largest_tokens=largest, change=change)


def memory_limit(config: Config, device: DeviceFacts) -> int | None:
    """--vram, or the card's memory where that is less or nothing was asked for; None where neither is known."""
    asked = parse_size(config.model.vram, "--vram") if config.model.vram else None
    known = [size for size in (asked, device.memory_bytes if device.on_card else None) if size is not None]
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


def step_load(config: Config, lengths: Lengths | None) -> Load:
    """The largest work of a step under these settings: what longer rows or more of them cannot exceed."""
    data, train, objective = config.data, config.train, config.objective
    longest = min(data.max_length, lengths.longest) if lengths else data.max_length
    family = longest * objective.answers if train.pack else longest
    rows = train.batch_size * (1 if train.pack else objective.answers) + train.normal_batch_size
    tokens = max(longest, min(train.max_tokens, rows * family))
    reference = train.normal_batch_size * longest if objective.eps3 > 0 else 0
    return Load(tokens, min(tokens, family), tokens, reference, longest)


def run_choices(
    config: Config, device: DeviceFacts, optimizer: str, embeddings: str, *, recompute: bool | None = None
) -> Choices:
    """The settings memory depends on, with what `auto` has come to."""
    return Choices(
        quant=config.model.quant,
        double_quant=config.model.double_quant,
        compute_bytes=device.compute_bytes,
        on_card=device.on_card,
        r=config.lora.r,
        target_modules=config.lora.target_modules,
        optimizer=optimizer,
        embeddings=embeddings,
        head=config.model.head,
        offload=config.train.offload,
        checkpointing=config.train.recomputes if recompute is None else recompute,
        packed=config.train.pack,
    )


def _ways(config: Config, shape: Shape, device: DeviceFacts) -> Iterator[Choices]:
    """What `auto` may come to, the best first: recomputing and moving embeddings cost time, 8-bit state a result."""
    optimizers = ("adamw", "adamw8bit") if config.train.optimizer == "auto" else (config.train.optimizer,)
    places: tuple[str, ...] = ("device",)
    if device.on_card and not shape.tied:
        places = ("device", "cpu")
    elif device.on_card and config.model.head == "8bit":  # beside the head's codes a shared table would be one more
        places = ("cpu",)
    places = places if config.model.embeddings == "auto" else (config.model.embeddings,)
    asked = config.train.checkpointing
    if asked == "auto" and config.train.offload:  # it is the inputs of recomputed blocks that are moved
        asked = "always"
    recompute = {"always": (True,), "never": (False,)}.get(asked, (False, True))
    for optimizer, place, again in itertools.product(optimizers, places, recompute):
        yield run_choices(config, device, optimizer, place, recompute=again)


def _best(config: Config, shape: Shape, device: DeviceFacts, limit: int | None, lengths: Lengths | None) -> MemoryPlan:
    """The first way that fits, else the leanest."""
    load = step_load(config, lengths)
    plans = []
    for choices in _ways(config, shape, device):
        plan = MemoryPlan(shape, choices, load, run_needs(shape, choices, load), device, limit)
        if plan.fits and (choices.checkpointing or _may_keep(plan, config)):
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.needs.total_bytes)


def _may_keep(plan: MemoryPlan, config: Config) -> bool:
    """Whether activations are kept: as asked, or where there is plenty of room."""
    if config.train.checkpointing == "never":
        return True
    room = _FILLED * plan.limit_bytes if plan.limit_bytes else 0 if plan.device.on_card else _CPU_BYTES
    return plan.needs.total_bytes <= room


def _largest_tokens(
    config: Config, shape: Shape, device: DeviceFacts, limit: int, lengths: Lengths | None
) -> int | None:
    """The largest --max-tokens that fits, in steps of 16; None when not even the longest row does."""

    def fits(tokens: int) -> bool:
        return _best(_with(config, "train", max_tokens=tokens), shape, device, limit, lengths).fits

    least, high = step_load(_with(config, "train", max_tokens=1), lengths).tokens, _MOST_TOKENS
    if not fits(least):
        return None
    low = least
    while high - low > _STEP_TOKENS:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(least, low // _STEP_TOKENS * _STEP_TOKENS)


def _with(config: Config, section: str, **values: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **values)})


# -- what would have to change ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lever:
    """A change: how it is written, and the settings with it; None where it is nothing new.

    `larger`: of one that makes a number smaller, the same with numbers between this and what is asked, largest first.
    """

    text: str
    apply: Callable[[Config], Config | None]
    larger: Callable[[Config], Iterator[_Lever]] = lambda _: iter(())


def _set(text: str, section: str, name: str, value: Any) -> _Lever:
    def apply(config: Config) -> Config | None:
        return None if getattr(getattr(config, section), name) == value else _with(config, section, **{name: value})

    return _Lever(text, apply)


def _less(flag: str, section: str, name: str, value: int) -> _Lever:
    def apply(config: Config) -> Config | None:
        return None if getattr(getattr(config, section), name) <= value else _with(config, section, **{name: value})

    def larger(config: Config) -> Iterator[_Lever]:
        half = getattr(getattr(config, section), name) // 2
        while half > value:
            yield _less(flag, section, name, half)
            half //= 2

    return _Lever(f"{flag} {value}", apply, larger)


def _recompute(config: Config) -> Config | None:
    return _with(config, "train", checkpointing="always") if config.train.checkpointing == "never" else None


# By how little they change: the first four no result at all, then what is rounded, then what is trained.
_MAX_TOKENS = _less("--max-tokens", "train", "max_tokens", 16)
_HEAD = _set("--set model.head=8bit", "model", "head", "8bit")
_LEVERS = (
    _MAX_TOKENS,
    _set("--embeddings cpu", "model", "embeddings", "cpu"),
    _set("--set train.offload=true", "train", "offload", True),
    _Lever("--set train.checkpointing=always", _recompute),
    _set("--set model.double_quant=true", "model", "double_quant", True),
    _set("--optimizer adamw8bit", "train", "optimizer", "adamw8bit"),
    _HEAD,
    _less("--lora-r", "lora", "r", 8),
    _less("--max-length", "data", "max_length", 256),
    _set("--quant nf4", "model", "quant", "nf4"),
    _less("--lora-r", "lora", "r", 4),
    _less("--max-length", "data", "max_length", 128),
)
_MOST_LEVERS = 4
_FEW_LEVERS = tuple(few for n in range(1, _MOST_LEVERS + 1) for few in itertools.combinations(_LEVERS, n))


def _least_change(config: Config, shape: Shape, device: DeviceFacts, limit: int, lengths: Lengths | None) -> str:
    """The fewest and most harmless changes that make it fit, as flags; else another model."""
    for levers in _FEW_LEVERS if _anything_helps(config, shape, device, limit, lengths) else ():
        changed = _applied(levers, config)
        if changed is not None and _best(changed, shape, device, limit, lengths).fits:
            levers = _mildest(levers, config, lambda c: _best(c, shape, device, limit, lengths).fits)
            changed = _all_of(levers, config)
            texts = [lever.text for lever in levers if lever is not _MAX_TOKENS]
            if _MAX_TOKENS in levers:
                wide = _with(changed, "train", max_tokens=config.train.max_tokens)
                texts.insert(0, f"--max-tokens {_largest_tokens(wide, shape, device, limit, lengths)}")
            return f"it fits with {' '.join(texts)}"
    smaller = _smaller_model(config, shape, device, limit, lengths)
    return f"--model {smaller} fits" if smaller else "no model with a short name fits either: it takes more memory"


def _mildest(levers: tuple[_Lever, ...], config: Config, fits: Callable[[Config], bool]) -> tuple[_Lever, ...]:
    """The same changes with the largest halves of their numbers that still fit; --max-tokens is searched for later."""
    for i, lever in enumerate(levers):
        for milder in lever.larger(config) if lever is not _MAX_TOKENS else ():
            tried = (*levers[:i], milder, *levers[i + 1 :])
            if fits(_all_of(tried, config)):
                levers = tried
                break
    return levers


def _anything_helps(config: Config, shape: Shape, device: DeviceFacts, limit: int, lengths: Lengths | None) -> bool:
    """Whether it fits with every lever at once; rounding the head has both forms of it there for a moment."""
    tried = (_LEVERS, tuple(lever for lever in _LEVERS if lever is not _HEAD))
    return any(_best(_all_of(levers, config), shape, device, limit, lengths).fits for levers in tried)


def _all_of(levers: tuple[_Lever, ...], config: Config) -> Config:
    for lever in levers:
        config = lever.apply(config) or config
    return config


def _applied(levers: tuple[_Lever, ...], config: Config) -> Config | None:
    for lever in levers:
        changed = lever.apply(config)
        if changed is None:
            return None
        config = changed
    return config


def _smaller_model(
    config: Config, shape: Shape, device: DeviceFacts, limit: int, lengths: Lengths | None
) -> str | None:
    """The largest of the models with short names that is smaller and fits as asked."""
    for known in sorted(SHORT_NAMES.values(), key=lambda known: -known.params_b):
        carried = carried_config(known)
        if carried is None:
            continue
        other = read_shape(carried)
        if other.parameters < shape.parameters and _best(config, other, device, limit, lengths).fits:
            return known.name
    return None
