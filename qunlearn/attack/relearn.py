"""Family C: fine-tune the subject with the project's own loop, and count what that injects.

An attack's adapter is laid over the one under audit, which stays as it is; the control gets the same one. The original
is attacked first: the rate is the highest at which it keeps half of its answers, else the lowest, for what an attack
makes the original lose it cannot find in another model.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer

from qunlearn.attack import formats
from qunlearn.attack.bench import Bench
from qunlearn.attack.cells import ORIGINAL, Cell
from qunlearn.attack.facts import Fact
from qunlearn.attack.statistics import LEAST_KEPT, known
from qunlearn.config.settings import Config
from qunlearn.data.batch import ANSWER, CLOSED
from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example
from qunlearn.evaluation.scores import row_nlls
from qunlearn.model.kernels.lora import make_plain
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Live
from qunlearn.objectives.losses import nll
from qunlearn.objectives.table import Term
from qunlearn.roles.mismatch import NO_MISMATCH
from qunlearn.roles.roles import Roles
from qunlearn.training.loop import train
from qunlearn.training.schedule import auto_lr

ATTACK = "attack"
RANK, BATCH = 16, 8
RATES = (1.0, 0.25, 0.0625)  # of the learning rate of `forget`
_TAUGHT = Term("taught", "forget", CLOSED, lambda c: 1.0, lambda s, c: nll(s))


def run(bench: Bench, arm: str) -> Cell:
    """Return the outcomes of open questions on the facts that the arm scores, after the largest size.

    `more["sizes"][n]`: outcomes, tokens and bits injected; bits are -log2 of the answers' probability under this very
    subject before it is attacked. Of the original the largest size alone. `more["rate"]`: the learning rate, as a share
    of the one that `forget` takes for a model of this width.
    """
    taught, scored = _arm(bench, arm)
    rows = [bench.encode(record) for record in taught[: bench.effort.sizes[-1]]]
    asked = bench.on([fact for _, fact in scored])
    if bench.subject == ORIGINAL and rows:
        before = sum(known(formats.run(asked, "open").outcomes))
        for rate in RATES:
            outcomes, sizes = _relearnt(bench, asked, rows, (len(rows),), rate)
            if sum(known(outcomes)) >= LEAST_KEPT * before:
                break
    else:
        original = bench.cells.get("relearning", arm, ORIGINAL)
        rate = RATES[0] if original is None else original.more["rate"]
        outcomes, sizes = _relearnt(bench, asked, rows, bench.effort.sizes, rate)
    for told in sizes.values():
        told["outcomes"] = _at(told["outcomes"], scored, len(bench.facts))
    return Cell(_at(outcomes, scored, len(bench.facts)), {"sizes": sizes, "rate": rate})


def _relearnt(
    bench: Bench, asked: Bench, rows: Sequence[Example], sizes: Sequence[int], rate: float
) -> tuple[Sequence[float | None], dict[str, Any]]:
    """Train on the first rows of each size; return the outcomes after the last one, and what is told of each."""
    outcomes: Sequence[float | None] = [None] * len(asked.facts)
    told: dict[str, Any] = {}
    policy = bench.policy
    with attacked(policy):
        start = policy.adapter_state()
        for n in dict.fromkeys(min(size, len(rows)) for size in sizes if rows):
            policy.load_adapter_state(start)
            with bench.unguarded():  # whoever trains has the weights; a guard stands before what comes of it
                tokens, bits = injected(bench, rows[:n])
                fine_tune(policy, rows[:n], bench.config, bench.effort.epochs, rate)
            outcomes = formats.run(asked, "open").outcomes
            told[str(n)] = {"outcomes": outcomes, "tokens": tokens, "bits": bits, "epochs": bench.effort.epochs}
    return outcomes, told


def _arm(bench: Bench, arm: str) -> tuple[list[Record], list[tuple[int, Fact]]]:
    """What is taught, and the facts that are scored. Halves are the same for every subject: their places tell; and no
    wording of a fact that is scored is taught."""
    places = [(i, fact) for i, fact in enumerate(bench.facts) if fact.asks]
    mixed, units = random.Random("relearning").sample(places, len(places)), bench.inputs.units
    order = {unit: n for n, unit in enumerate(dict.fromkeys(units[i] for i, _ in mixed))}
    halves = [[(i, fact) for i, fact in mixed if order[units[i]] % 2 == half] for half in (0, 1)]
    if arm == "half":
        return [fact.record for _, fact in halves[0]], halves[1]
    if arm == "all":
        return [fact.record for _, fact in mixed], mixed
    if arm == "format":
        # Placebos of one half only, so that where placebos are the control, none is taught that is scored.
        return [bench.inputs.placebo[i].record for i, _ in halves[0]], halves[1]
    rows = bench.inputs.general if arm == "unrelated" else bench.inputs.retain
    return random.Random(arm).sample(rows, len(rows)), mixed


def _at(values: Sequence[float | None], scored: Sequence[tuple[int, Fact]], n: int) -> list[float | None]:
    out: list[float | None] = [None] * n
    for (i, _), value in zip(scored, values, strict=True):
        out[i] = value
    return out


def injected(bench: Bench, rows: Sequence[Example]) -> tuple[int, float]:
    """Return the tokens of the answers that are taught, and the bits that they tell this subject."""
    found = row_nlls(bench.lm, rows, ANSWER, bench.config.train.pass_tokens)
    return sum(n for _, n in found), sum(loss for loss, _ in found) / math.log(2)


@contextlib.contextmanager
def attacked(policy: Policy) -> Iterator[None]:
    """The policy with the attack's adapter on top, which starts as nothing and alone is trained; it goes again."""
    own, layers = list(policy.model.peft_config), policy.layers
    torch.manual_seed(0)
    make_plain(layers)
    config = PeftLoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    policy.model.add_adapter(ATTACK, config)
    policy.model.base_model.set_adapter([*own, ATTACK])
    policy.layers = [m for m in policy.model.modules() if isinstance(m, LoraLayer)]
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_(f".{ATTACK}." in name)
    make_plain(policy.layers)
    try:
        yield
    finally:
        policy.model.delete_adapter(ATTACK)
        policy.model.base_model.set_adapter(own)
        policy.layers = layers


def fine_tune(policy: Policy, rows: Sequence[Example], config: Config, epochs: int, rate: float = 1.0) -> None:
    """Train the attack's adapter on rows: the loop of `forget`, one loss, nothing that stops it before its steps."""
    size = min(BATCH, len(rows))
    steps = max(4, epochs * math.ceil(len(rows) / size))
    of_attack = replace(
        config.train, steps=steps, batch_size=size, normal_batch_size=1, lr=rate * auto_lr(policy.hidden_size),
        warmup=2, schedule="linear", optimizer="adamw", seed=0,
    )  # fmt: skip
    made = replace(config, train=of_attack, objective=replace(config.objective, retain_budget=None))
    roles = Roles(rows, (), (), NO_MISMATCH)
    train(policy, roles, Live(policy, config.train.pass_tokens), made, lambda _: None, stopping=None, terms=(_TAUGHT,))
