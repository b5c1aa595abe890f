"""Print the plan of a model on several cards, for `qunlearn plan --gpus` and before `forget` loads anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.memory.cards import MOST_CARDS, CardsPlan, Sharded, plan_here
from qunlearn.memory.placement import Placement
from qunlearn.memory.plan import DeviceFacts
from qunlearn.utils.console import Column, clean, out, table
from qunlearn.utils.units import show_size


def cards_plan_before_loading(
    config: Config, model_config: Mapping[str, Any], cards: Sequence[DeviceFacts], longest: int
) -> CardsPlan:
    """Plan a run whose rows are known on the cards that are there, and print where everything goes.

    Raises DoesNotFitError, ModelError for an architecture that is not known.
    """
    plan = plan_here(config, model_config, cards, longest)
    show_placement(plan.placement, plan.choices.optimizer, to_stdout=False)
    plan.check()
    return plan


def shards_plan_before_loading(
    config: Config, model_config: Mapping[str, Any], cards: Sequence[DeviceFacts], longest: int
) -> CardsPlan:
    """Plan a run whose rows are known with a shard of everything on each card, and print what a card needs.

    Raises DoesNotFitError, ModelError for an architecture that is not known.
    """
    plan = plan_here(config, model_config, cards, longest).for_shards()
    if plan.sharded is not None:
        _show_sharded(plan.sharded, to_stdout=False)
    plan.check_shards()
    return plan


def show_cards_plan(plan: CardsPlan, name: str) -> None:
    """Both ways to use the cards, what each card needs, and the fewest that do, on stdout."""
    shape, load, n = plan.shape, plan.load, len(plan.limits)
    cards = f"{n} {plan.device.name or 'CUDA'} GPU{'s' if n > 1 else ''} of {show_size(min(plan.limits))}"
    _tell(f"{name}: {shape.model_type}, {shape.parameters / 1e9:.2f} B parameters, on {cards}")
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
    """Where everything is, card by card; what is left over for the host's memory last."""
    rows = []
    for i, card in enumerate(placement.cards):
        holds = _holds(card.start, card.stop, card.embeddings, card.head)
        rows.append([str(i), holds, _mib(card.needs_bytes), _mib(card.limit_bytes)])
    if not placement.fits:
        left = _holds(*placement.host_blocks, placement.host_embeddings, placement.host_head)
        rows.append(["host", f"left over: {left}", "", ""])
    columns = [Column("card", False), Column("holds", False), Column("needs, MiB"), Column("there is")]
    title = f"--device-map auto: laid over the cards, optimizer {optimizer}"
    table(title, columns, rows, to_stdout=to_stdout)


def _show_sharded(sharded: Sharded, *, to_stdout: bool) -> None:
    rows = [[name, _mib(size)] for name, size in sharded.parts.items() if size]
    rows += [["in all", _mib(sharded.needs_bytes)], ["there is", _mib(sharded.limit_bytes)]]
    title = f"--device-map fsdp: sharded over the cards, optimizer {sharded.optimizer}"
    table(title, [Column("component", False), Column("MiB on each card")], rows, to_stdout=to_stdout)


def _holds(start: int, stop: int, embeddings: bool, head: bool) -> str:
    named = ["embeddings"] if embeddings else []
    if stop > start:
        named.append(f"block {start}" if stop == start + 1 else f"blocks {start} to {stop - 1}")
    return ", ".join(named + (["output head"] if head else [])) or "nothing"


def _verdict(fits: bool, fewest: int | None) -> str:
    cards = f"the fewest such cards that hold it: {fewest}" if fewest else f"{MOST_CARDS} such cards do not hold it"
    return f"{'fits' if fits else 'does not fit'}; {cards}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _tell(text: str) -> None:
    out().print(clean(text), markup=False)
