"""Plan a run so that it fits into a memory, or find the least change that makes it fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.hub.known_configs import carried_config
from qunlearn.hub.short_names import SHORT_NAMES
from qunlearn.memory.architecture import Shape
from qunlearn.memory.families import read_shape
from qunlearn.memory.plan import (
    DeviceFacts,
    MemoryPlan,
    as_stored,
    best_plan,
    keep_blocks,
    largest_tokens,
    memory_limit,
    with_values,
)


def memory_plan(
    config: Config, model_config: Mapping[str, Any], device: DeviceFacts, longest_row: int | None = None
) -> MemoryPlan:
    """Plan a run from its settings and its model's config.json. Where nothing fits, the plan says what would.

    Raises ModelError for an architecture that is not known and modules that are not there, ConfigError for no size.
    """
    shape, config = read_shape(model_config), as_stored(config, model_config)
    limit = memory_limit(config, device)
    plan = keep_blocks(best_plan(config, shape, device, limit, longest_row), config)
    if limit is None:
        return plan
    asked = {"checkpointing": config.train.checkpointing, "kept_blocks": config.train.kept_blocks}
    settled = with_values(plan.settled(config), "train", **asked)
    largest = largest_tokens(settled, shape, device, limit, longest_row)
    change = None if plan.fits else _least_change(config, shape, device, limit, longest_row)
    return replace(plan, largest_tokens=largest, change=change)


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
        return (
            None if getattr(getattr(config, section), name) == value else with_values(config, section, **{name: value})
        )

    return _Lever(text, apply)


def _less(flag: str, section: str, name: str, value: int) -> _Lever:
    def apply(config: Config) -> Config | None:
        asked = getattr(getattr(config, section), name)
        if asked is None or asked <= value:  # what was left to the plan it has tried
            return None
        return with_values(config, section, **{name: value})

    def larger(config: Config) -> Iterator[_Lever]:
        half = getattr(getattr(config, section), name) // 2
        while half > value:
            yield _less(flag, section, name, half)
            half //= 2

    return _Lever(f"{flag} {value}", apply, larger)


def _recompute(config: Config) -> Config | None:
    return with_values(config, "train", checkpointing="always") if config.train.checkpointing == "never" else None


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


def _least_change(config: Config, shape: Shape, device: DeviceFacts, limit: int, longest_row: int | None) -> str:
    """The fewest and most harmless changes that make it fit, as flags; else another model."""
    for levers in _FEW_LEVERS if _anything_helps(config, shape, device, limit, longest_row) else ():
        changed = _applied(levers, config)
        if changed is not None and best_plan(changed, shape, device, limit, longest_row).fits:
            levers = _mildest(levers, config, lambda c: best_plan(c, shape, device, limit, longest_row).fits)
            changed = _all_of(levers, config)
            texts = [lever.text for lever in levers if lever is not _MAX_TOKENS]
            if _MAX_TOKENS in levers:
                wide = with_values(changed, "train", max_tokens=config.train.max_tokens)
                texts.insert(0, f"--max-tokens {largest_tokens(wide, shape, device, limit, longest_row)}")
            return f"it fits with {' '.join(texts)}"
    smaller = _smaller_model(config, shape, device, limit, longest_row)
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


def _anything_helps(config: Config, shape: Shape, device: DeviceFacts, limit: int, longest_row: int | None) -> bool:
    """Return whether it fits with every lever at once; rounding the head has both forms of it there for a moment."""
    tried = (_LEVERS, tuple(lever for lever in _LEVERS if lever is not _HEAD))
    return any(best_plan(_all_of(levers, config), shape, device, limit, longest_row).fits for levers in tried)


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
    config: Config, shape: Shape, device: DeviceFacts, limit: int, longest_row: int | None
) -> str | None:
    """The largest of the models with short names that is smaller and fits as asked."""
    for known in sorted(SHORT_NAMES.values(), key=lambda known: -known.params_b):
        carried = carried_config(known)
        if carried is None:
            continue
        other = read_shape(carried)
        if other.parameters < shape.parameters and best_plan(config, other, device, limit, longest_row).fits:
            return known.name
    return None
