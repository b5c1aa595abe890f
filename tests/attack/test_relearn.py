"""Relearning: how hard the original lets a model be trained, and that the model under audit stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from qunlearn.attack import relearn
from qunlearn.attack.bench import Bench
from qunlearn.attack.catalog import Effort
from qunlearn.attack.cells import ORIGINAL, UNLEARNED, Cell, Cells, Place
from qunlearn.attack.facts import Inputs
from qunlearn.attack.relearn import RATES
from qunlearn.attack.weights import scaled
from qunlearn.data.records import Record
from qunlearn.model.policy import Policy

GENERAL = [Record((("user", f"What is {n} and {n}?"),), f"It is {2 * n}.", 1, {}) for n in range(6)]
TEXTS = [Record((), f"A plain text about the number {n}, and nothing else.", 1, {}) for n in range(6)]


def on(bench: Bench, subject: str, cells: Cells, general: Sequence[Record] = GENERAL) -> Bench:
    facts = bench.facts[:4]
    inputs, effort = Inputs(facts, general=general), Effort(40, 4, (2, 6), 1)
    return replace(bench, subject=subject, inputs=inputs, facts=facts, cells=cells, effort=effort)


@pytest.mark.parametrize(("kept", "rate"), [(4, RATES[0]), (2, RATES[1]), (0, RATES[2])])
def test_the_rate_is_the_highest_that_the_original_survives(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kept: int, rate: float
) -> None:
    """Half of its answers are enough; the others are trained at the rate that the original was."""
    tried: list[tuple[str, float, int]] = []
    left = {RATES[0]: kept, RATES[1]: kept, RATES[2]: 0}
    left[RATES[0]] = 4 if kept == 4 else 1

    def relearnt(made: Bench, asked: Bench, rows: Sequence[Any], sizes: Sequence[int], rate: float) -> Any:
        tried.append((made.subject, rate, max(sizes)))
        return [float(i < left[rate]) for i in range(4)], {"6": {"outcomes": [float(i < left[rate]) for i in range(4)]}}

    monkeypatch.setattr(relearn, "_relearnt", relearnt)
    monkeypatch.setattr(relearn.formats, "run", lambda *_: Cell([1.0] * 4))
    cells = Cells(None)
    cells.keep(Place("relearning", "unrelated", ORIGINAL), relearn.run(on(bench, ORIGINAL, cells), "unrelated"))
    assert [used for _, used, _ in tried] == list(RATES[: RATES.index(rate) + 1])
    cell = relearn.run(on(bench, UNLEARNED, cells), "unrelated")
    assert tried[-1] == (UNLEARNED, rate, 6)
    assert cell.more["rate"] == rate
    assert relearn.run(on(bench, UNLEARNED, Cells(None)), "unrelated").more["rate"] == RATES[0]


@pytest.fixture(params=["all-linear", "q_proj,v_proj"])
def of_some_layers(bench: Bench, new_policy: Callable[..., Policy], request: pytest.FixtureRequest) -> Bench:
    """A bench whose adapter is on all layers, or on few: the attack's is on all."""
    policy = new_policy("nf4", checkpointing=False, target_modules=request.param)
    policy.model.eval()
    return replace(bench, lm=policy, policy=policy)


@pytest.mark.parametrize("general", [GENERAL, TEXTS], ids=["rows", "texts"])
def test_an_attack_leaves_the_model_as_it_was(of_some_layers: Bench, general: Sequence[Record]) -> None:
    """The original is trained with the adapter under audit off, and so are plain texts taught."""
    bench, policy = of_some_layers, of_some_layers.policy
    layers = list(policy.layers)
    with torch.no_grad():
        for layer in policy.layers:
            layer.lora_B["default"].weight.normal_(0, 2.0)  # an adapter that breaks the model
    facts = bench.facts[:4]
    probes = relearn.formats._open(bench.on(facts))
    broken = bench.leaked(probes)
    cells = Cells(None)
    with scaled(policy, 0.0):
        assert bench.leaked(probes) == [1.0] * 4  # the base, exactly
        cell = relearn.run(on(bench, ORIGINAL, cells, general), "unrelated")
    assert cell.more["rate"] == RATES[0] and sum(v or 0.0 for v in cell.outcomes) >= 2
    assert list(cell.more["sizes"]) == ["6"]
    assert cell.more["sizes"]["6"]["tokens"] > 0 and cell.more["sizes"]["6"]["bits"] > 0
    assert list(relearn.run(on(bench, UNLEARNED, cells, general), "unrelated").more["sizes"]) == ["2", "6"]
    assert bench.leaked(probes) == broken != [1.0] * 4
    assert policy.layers == layers and list(policy.model.peft_config) == ["default"]
