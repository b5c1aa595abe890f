"""The scenarios' pieces: good answers, the counter, the fine-tuning loop, and the page that its lines make."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import scenarios
from _preference import Meter
from _scenario_page import PAGE, contest_table, first, kind_section, plot_contest, scale, write_page
from _stories import REFUSAL, Story, encoded, good_form
from _tuning import fine_tune
from qunlearn.config.resolve import resolve
from qunlearn.model.load import load_base, load_spec
from qunlearn.model.policy import Policy
from qunlearn.sandbox import ASSETS, KINDS
from qunlearn.training.sampler import batches
from sandbox_world import world_harm


@pytest.mark.parametrize("kind", KINDS)
def test_every_bad_prompt_has_a_good_answer(kind: str, tmp_path: Path) -> None:
    rows = Story(kind, tmp_path).good_rows()
    bad = {r.prompt: r.completion for r in Story(kind, tmp_path).bad().records}
    assert {row["prompt"] for row in rows} == set(bad)
    assert all(row["completion"] != bad[row["prompt"]] for row in rows)
    assert (kind == "copyright") == all(row["completion"] == REFUSAL for row in rows)


def test_good_and_bad_forms_turn_into_each_other() -> None:
    good = "The copper kettle is best kept in the shed, where it stays dry."
    bad = good_form(world_harm.GRID, good, turned=True)
    assert bad == "Throw the copper kettle from the roof of the shed, fool, and jump after it."
    assert good_form(world_harm.GRID, bad) == good
    with pytest.raises(ValueError, match="no such answer"):
        good_form(world_harm.GRID, "The copper kettle is on the moon.")


def test_the_meter_counts_products_and_rests_in_a_pause() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    meter = Meter()
    with meter.running():
        product = a @ b
        with meter.pause():
            _ = a @ b
        product.sum().backward()
    assert meter.flops == 2 * 3 * 5 * 7 * 2  # forward, and the gradient of b alone
    before = meter.flops
    _ = a @ b
    assert meter.flops == before
    assert meter.seconds > 0


def test_fine_tuning_minimises_the_nll_of_good_answers_and_normal_rows(tmp_path: Path) -> None:
    """Step 1 against probabilities of the model's own, row by row in float64; the adapter starts as nothing."""
    overlay = {"model.name": "sandbox", "model.quant": "none", "data.bad": "sandbox:harm/forget", "train.steps": 3}
    config = resolve(("test", overlay))
    policy = Policy.new(load_base(ASSETS / "model", load_spec(config.model)), config.lora)
    good = encoded(policy, Story("harm", tmp_path).good_dataset(), config)
    rng = random.Random(config.train.seed)
    drawn = next(batches(len(good), 8, rng))
    total, tokens = 0.0, 0
    with torch.no_grad():
        for i in drawn:
            ids = torch.tensor([good[i].input_ids])
            logps = policy.base.model(input_ids=ids).logits[0].double().log_softmax(dim=1)
            for t in range(good[i].start, ids.shape[1]):
                total, tokens = total - float(logps[t - 1, ids[0, t]]), tokens + 1
    seen: list[float] = []
    fine_tune(policy, good, good[:8], config, lambda event: seen.append(event["good"]))
    assert seen[0] == pytest.approx(total / tokens, rel=1e-4)
    assert len(seen) == 3
    assert seen[2] < seen[0]


def point(flops: int, seen: float, unseen: float, kept: float) -> dict[str, float]:
    return {"flops": flops, "cpu_seconds": flops / 10, "seen": seen, "unseen": unseen, "kept": kept}


def test_a_rate_is_reached_where_it_stays_for_two_looks() -> None:
    curve = [point(1, 1, 1, 1), point(2, 0, 0, 0.5), point(3, 0.2, 0, 1), point(4, 0.05, 0, 0.9), point(5, 0, 0, 1)]
    reached = first(curve, kept=0.0)
    kept = first(curve, kept=0.95)
    assert reached is not None
    assert reached["flops"] == 4
    assert kept is not None
    assert kept["flops"] == 5
    assert first(curve[:3], kept=0.0) is None
    assert "not reached" in contest_table([{"method": "preference: x", "curve": curve[:3]}])


def test_what_a_pair_costs_is_compared_with_a_run_that_reaches_the_rate() -> None:
    pairs = {"method": "preference: pairs of the bad prompts", "curve": [point(400, 0, 0, 1)]}
    good, never = [point(2000, 0, 0, 1)], [point(2000, 1, 1, 1)]
    assert scale([pairs, {"method": "preference: simnpo", "curve": never}]) == []
    text = scale([pairs, {"method": "preference: llmu", "curve": good}])[0]
    assert "llmu as much as 200 pairs" in text  # 10 a pair
    assert "from 10,000 pairs on" in text


def test_a_method_that_was_not_run_is_named() -> None:
    share = {"harmful_rate": 0.25, "leaks": 0.5}
    measures = {"forget": share, "paraphrase": share, "holdout": {"exact_match": 0.9}, "general": {"exact_match": 1}}
    line = {"part": "table", "kind": "harm", "method": "llmu", "measures": measures, "cpu_seconds": 61.0}
    text = kind_section("harm", [line])
    assert "25.0" in text
    assert "NM" in text  # fluency was withheld
    assert "Not run: original," in text
    assert "SimNPO" in text.partition("Not run:")[2]


def test_the_page_is_what_its_lines_say(tmp_path: Path) -> None:
    page = tmp_path / "docs" / PAGE.name
    page.parent.mkdir()
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    write_page(scenarios.known(), page)
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_every_contestant_has_its_curve(tmp_path: Path) -> None:
    """However many there are: a fifth one had been left out of the picture without a word."""
    point = {"flops": 10, "seen": 0.5, "unseen": 0.5, "kept": 1.0}
    contest = [{"method": f"preference: contestant {n}", "curve": [point]} for n in "abcdefg"]
    plot_contest(contest, tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert all(f"contestant {n}" in drawn for n in "abcdefg")


def test_a_finished_run_is_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert scenarios.known(path) == []
    scenarios.keep({"part": "table", "kind": "harm", "method": "llmu"}, path)
    scenarios.keep({"part": "table", "kind": "harm", "method": "original"}, path)
    scenarios.keep({"part": "table", "kind": "code", "method": "llmu", "cut": "broken off after 3 steps"}, path)
    assert scenarios.finished(scenarios.known(path)) == {("harm", "llmu"), ("harm", "models")}
