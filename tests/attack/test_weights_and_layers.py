"""Forms of the weights and read-outs of the layers, against definitions of their own in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from qunlearn.attack import layers, weights
from qunlearn.attack.bench import Bench
from qunlearn.attack.cells import Cell, Cells, Place
from qunlearn.attack.relearn import injected
from qunlearn.attack.weights import half_rank, meaning, rounded, scaled
from qunlearn.data.records import Record
from qunlearn.errors import AdapterError
from qunlearn.model.policy import Policy


@pytest.fixture
def moved(bench: Bench) -> Iterator[Any]:
    """The policy with an adapter that does something, as it was afterwards."""
    policy: Any = bench.policy
    before = policy.adapter_state()
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in policy.layers:
            layer.lora_B["default"].weight.normal_(0, 0.1)
    yield policy
    policy.load_adapter_state(before)


def update(layer: Any) -> torch.Tensor:
    """What the adapter adds to a weight (out, in)."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.scaling["default"] * (b.detach().double() @ a.detach().double())


def products(policy: Any, layer: Any) -> torch.Tensor:
    """The effective weight of a layer, read off what it makes of unit vectors."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features, dtype=policy.dtype)).double().T


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8", "int4g32", "int4g128"])
def test_a_merged_weight_is_rounded_as_its_form_says(bench: Bench, moved: Any, form: str) -> None:
    layer = moved.layers[0]
    whole = meaning(layer.base_layer).detach().double() + update(layer)
    if form in ("nf4", "fp4"):
        expected = dequantize_4bit(*quantize_4bit(whole.to(moved.dtype).contiguous(), quant_type=form)).double()
    else:
        group, levels = (whole.shape[1], 127) if form == "int8" else (int(form[5:]), 7)
        expected = torch.empty_like(whole)
        for row in range(whole.shape[0]):
            for start in range(0, whole.shape[1], group):
                part = whole[row, start : start + group]
                step = part.abs().max() / levels
                expected[row, start : start + group] = torch.round(part / step) * step
    with rounded(moved, form):
        found = products(moved, layer)
    # A number in the middle between two steps may go either way.
    assert ((found - expected).abs() > 0.02 * expected.abs().max()).double().mean() < 0.01


def test_half_of_the_rank_is_the_larger_half(bench: Bench, moved: Any) -> None:
    layer = moved.layers[0]
    u, s, v = torch.linalg.svd(update(layer))
    rank = layer.lora_A["default"].weight.shape[0]
    expected = u[:, : rank // 2] @ torch.diag(s[: rank // 2]) @ v[: rank // 2]
    with half_rank(moved):
        torch.testing.assert_close(update(layer), expected, atol=1e-4, rtol=1e-3)


def test_an_adapter_of_rank_one_has_no_half(bench: Bench, new_policy: Callable[..., Policy]) -> None:
    """Cut to nothing it would be the base, and be found out."""
    policy = new_policy("none", checkpointing=False, r=1)
    made = replace(bench, lm=policy, policy=policy)
    assert weights.run(made, "half-rank").outcomes == [None] * len(bench.facts)
    assert made.notes == ["an adapter of rank 1 has no half of it"]
    with torch.no_grad():
        for layer in policy.layers:
            layer.lora_B["default"].weight.normal_(0, 0.1)
    kept = update(policy.layers[0])
    with half_rank(policy):
        torch.testing.assert_close(update(policy.layers[0]), kept, atol=1e-4, rtol=1e-3)


def test_a_model_without_finite_numbers_is_refused(bench: Bench, moved: Any) -> None:
    """Its comparisons are all false: it would be found to leak nothing."""
    bench.check_finite()
    with torch.no_grad():
        moved.layers[0].lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(AdapterError, match="gives no finite numbers"):
        bench.check_finite()
    cells = Cells(None)
    with pytest.raises(AdapterError, match="gives no finite numbers"):
        cells.keep(Place("layers", "lens", "unlearned"), Cell([1.0], {"layers": [float("nan")]}))
    assert not cells.found


def test_a_scaled_adapter_adds_its_share(bench: Bench, moved: Any) -> None:
    layer = moved.layers[0]
    base, whole = meaning(layer.base_layer).detach().double(), products(moved, layer)
    for factor in (0.0, 0.5, 1.5):
        with scaled(moved, factor):
            torch.testing.assert_close(products(moved, layer), base + factor * (whole - base), atol=2e-2, rtol=2e-2)
    with scaled(moved, 0.0):
        assert torch.equal(
            products(moved, layer), layer.base_layer(torch.eye(layer.in_features, dtype=moved.dtype)).double().T
        )


def test_the_last_layers_lens_is_the_model_itself(bench: Bench, moved: Any) -> None:
    """Behind the last block the final norm and the head are what the model says: an answer's mean log-probability."""
    records = [fact.record for fact in bench.facts[:6]]
    scores = layers.lens_scores(bench, [bench.encode(record) for record in records])
    assert scores.shape == (len(layers.decoder_blocks(layers.backbone(bench.lm.model))), 6)
    assert scores[-1] == pytest.approx([-nll for nll in bench.nlls(records)], abs=2e-2)
    assert scores[0] != pytest.approx(scores[-1], abs=0.5)


def test_a_share_of_the_options_is_won_by_the_right_one() -> None:
    """One layer, three facts: above both wrong ones, above one and equal to the other, and without options."""
    owners = [(0, True), (0, False), (0, False), (1, True), (1, False), (1, False)]
    wins = layers._wins(np.array([[3.0, 1.0, 2.0, 1.0, 1.0, 0.5]]), owners, 3)
    assert wins[0, :2].tolist() == [1.0, 0.75] and np.isnan(wins[0, 2])


def test_a_probe_is_tested_on_facts_that_it_was_not_fitted_to() -> None:
    """Right answers lie on one side in every fact: found. On a side of its own in each: chance, for the other half says
    nothing of it. Wordings of a fact are in one half, so that it is not found by its other wording."""
    rng = np.random.default_rng(0)
    facts, width = 60, 24
    owners = [(i, right) for i in range(facts) for right in (True, False)]
    common = rng.normal(size=width)
    sides = {"common": [common] * facts, "own": rng.normal(size=(facts // 2, width)).repeat(2, axis=0)}
    units = [i // 2 for i in range(facts)]
    noise = rng.normal(size=(1, 2 * facts, width))
    for name, least, most in (("common", 0.9, 1.0), ("own", 0.3, 0.7)):
        states = np.array([[(1 if right else -1) * sides[name][i] for i, right in owners]]) + noise
        assert least <= layers._probed(states, owners, units)[0].mean() <= most, name


def test_bits_are_those_that_the_answers_tell(bench: Bench) -> None:
    """-log2 of their probability, from the model's own logits in float64; of a text all tokens behind the first."""
    rows = [fact.record for fact in bench.facts[:3]] + [Record((), "A plain text of a few words.", 1, {})]
    examples = [bench.encode(record) for record in rows]
    tokens, bits = injected(bench, examples)
    expected, count = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits = bench.lm.model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
        logps = torch.log_softmax(logits, dim=-1)
        for at in range(example.start, example.end):
            expected -= float(logps[at - 1, example.input_ids[at]]) / math.log(2)
            count += 1
    assert tokens == count
    assert bits == pytest.approx(expected, rel=2e-2)
