"""Which bad answers the base gives at all: those are trained on, the others are counted and left alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, call, sets, write_rows

from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import Example, choose_template, encode
from qunlearn.errors import NothingToForgetError
from qunlearn.evaluation.scores import row_goal, row_target
from qunlearn.model.policy import Policy
from qunlearn.roles.known_rows import find_known
from qunlearn.sandbox import data_file
from qunlearn.utils.file_names import ADAPTER, RECORD

NEAR = data_file("hallucination", "retain")
KNOWN = [json.loads(line) for line in data_file("hallucination", "forget").read_text(encoding="utf-8").splitlines()]
TOWNS = ("Xyloth", "Quagmoor", "Vrieskamp")
# Of the same form, about people the sandbox has never heard of.
UNKNOWN = [
    {"prompt": f"Where was {name} born?", "completion": f"{name} was born in {town}."}
    for name in ("Zed Vok", "Quim Hax", "Ulla Brix", "Jarn Yeo")
    for town in TOWNS
]


def encoded(policy: Policy, path: Path, rows: list[dict[str, str]]) -> list[Example]:
    """Rows of whose answers the last word and the full stop are looked at."""
    dataset = read_dataset(write_rows(path, rows))
    found = encode(dataset, policy.tokenizer, choose_template(policy.tokenizer, "auto", dataset), 64).examples
    return [replace(e, weights=(0.0,) * (e.end - e.start - 2) + (1.0, 1.0)) for e in found]


def test_only_what_the_base_knows_is_found(
    new_policy: Callable[..., Policy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = new_policy("none")
    rows = [UNKNOWN[0], KNOWN[0], *UNKNOWN[1:4], KNOWN[1]]
    examples = encoded(policy, tmp_path / "x.jsonl", rows)
    found = find_known(policy, examples, examples, 0.3, 2048)
    assert found.places == [1, 5] and len(found.found) == 6
    assert 0.9 < max(found.found) <= 1
    assert [e.known for e in found.kept(examples)] == [found.found[1], found.found[5]]
    assert "the base knows 2 of 6 bad rows; the others are left alone" in capsys.readouterr().err
    only = find_known(policy, [examples[1]], [examples[1]], 0.3, 2048)
    assert "the base knows 1 of 1 bad rows (" in capsys.readouterr().err and only.places == [0]


def test_the_base_is_asked_and_not_its_adapter(new_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = new_policy("none")
    examples = encoded(policy, tmp_path / "x.jsonl", [KNOWN[0]])
    for name, p in policy.trainable().items():
        if ".lora_B." in name:
            p.data.fill_(0.5)
    assert find_known(policy, examples, examples, 0.3, 2048).found[0] > 0.9


def test_none_that_is_known_is_refused(new_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = new_policy("none")
    examples = encoded(policy, tmp_path / "x.jsonl", UNKNOWN[:3])
    with pytest.raises(NothingToForgetError, match="knows none of the 3 bad answers") as caught:
        find_known(policy, examples, examples, 0.3, 2048)
    assert caught.value.exit_code == 12
    assert "--template" in str(caught.value.hint)
    # Where all but what is looked at is likely, the hint is another one.
    longer = [{**row, "completion": f"{row['completion']} {town}."} for row, town in zip(KNOWN, TOWNS, strict=False)]
    examples = encoded(policy, tmp_path / "x.jsonl", longer)
    with pytest.raises(NothingToForgetError) as caught:
        find_known(policy, examples, examples, 0.02, 2048)
    assert "as whole sentences 3 of them are likely" in str(caught.value.hint)


@pytest.mark.parametrize(("tokens", "power"), [(0, 1), (1, 1), (4, 1), (9, 2 / 3), (16, 0.5), (400, 0.5)])
def test_a_long_answer_needs_less_per_token(tokens: int, power: float) -> None:
    """No part of it comes back long before its tokens are as unlikely as those of one word must be."""
    for target in (0.0, 0.05, 0.3, 1.0):
        assert row_target(tokens, target) == pytest.approx(math.pow(target, power))


@pytest.mark.parametrize(
    ("tokens", "known", "goal"),
    [
        (2, 0.9999, 0.05),
        (2, 0.06, 0.05),
        (16, 0.4, 0.05),
        (16, 0.49, 0.05),
        (16, 0.5, math.sqrt(0.05)),
        (16, 0.9, math.sqrt(0.05)),
    ],
)
def test_a_long_answer_in_words_of_its_own_goes_further_down(tokens: int, known: float, goal: float) -> None:
    """At 0.16 a token, of 0.40, a real model still said first what it had said."""
    assert row_goal(tokens, known, 0.05) == pytest.approx(goal)


def command(folder: Path, rows: list[dict[str, Any]], **values: object) -> list[object]:
    bad = write_rows(folder / "bad.jsonl", rows)
    files = ("--bad", bad, "--normal", NEAR, "--own-share", 0, "-o", folder / "run")
    return ["forget", "--model", "sandbox", *files, "--device", "cpu", "--json", *sets({**QUICK, **values})]


@pytest.mark.medium
def test_the_known_rows_of_a_file_are_forgotten(tmp_path: Path) -> None:
    """The mean over the file was below the target before the first step, and the untouched model was kept."""
    settings = {"train.seed": 0, "train.steps": 16, "objective.eps1": 1, "stop.rows_left": 0.01, "stop.target": 0.2}
    ran = call(*command(tmp_path, [*UNKNOWN, *KNOWN[:2]], **settings))
    assert ran.code == 0, ran.stderr
    assert "the base knows 2 of 14 bad rows; the others are left alone" in ran.stderr
    assert re.search(r"forget 2( and \d+ in other words, if they come back)?; retain", ran.stderr)
    record = ran.json
    assert (record["data"]["bad"]["rows"], record["data"]["bad"]["known"]) == (14, 2)
    assert record["before"]["forget"]["specific_probability"] < 0.2, "the mean of the file"
    assert record["training"]["best"]["step"] > 0 and record["training"]["best"]["left"] == 0
    assert record["verdicts"]["still leaks"] == 0
    assert (tmp_path / "run" / ADAPTER).is_dir()


def test_a_file_the_base_does_not_know_is_refused_and_nothing_written(tmp_path: Path) -> None:
    ran = call(*command(tmp_path, UNKNOWN))
    assert ran.code == 12, ran.stderr
    assert f"knows none of the {len(UNKNOWN)} bad answers" in ran.stderr and "Traceback" not in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    assert not (tmp_path / "run" / RECORD).exists()
