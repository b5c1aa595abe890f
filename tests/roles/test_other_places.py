"""Passages asked for from places where no row begins: which places, how much of the text, and what is kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from qunlearn.config.settings import LoraConfig
from qunlearn.data.records import Record, read_dataset
from qunlearn.data.tokenize import Example, Template, answer_text, choose_template, decode, encode
from qunlearn.evaluation.scores import score_rows
from qunlearn.model.load import Base
from qunlearn.model.policy import Policy
from qunlearn.roles import other_places as module
from qunlearn.roles.later_starts import later_starts
from qunlearn.roles.other_places import Places, other_places

SENTENCES = (
    "Before dawn the narrow bells of Duleix rang nine times.",
    "Nobody knew that Debrax had already left the city by boat.",
    "Under the bridge a bitter woman sold bread made of Kitrolt flour.",
    "He carried a golden box that no smith of Supun could open.",
)


@pytest.fixture(scope="module")
def policy(new_base: Callable[..., Base]) -> Policy:
    return Policy.new(new_base("none"), LoraConfig(), seed=0, checkpointing=False)


@pytest.fixture
def reciting(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """A model that recites whatever it is asked for."""

    def scores(lm: Policy, rows: Sequence[Example], limit: int) -> Any:
        return [type("Score", (), {"verdict": "still leaks"}) for _ in rows]

    monkeypatch.setattr(module, "score_rows", scores)
    return policy


def encoded(policy: Policy, path: Path, row: dict[str, str], length: int) -> tuple[tuple[Example, ...], Template]:
    dataset = read_dataset(write_rows(path / "rows.jsonl", [row]))
    template = choose_template(policy.tokenizer, "auto", dataset)
    return encode(dataset, policy.tokenizer, template, length).examples, template


def test_the_middle_of_a_sentence_is_measured_and_not_trained_on(reciting: Policy, tmp_path: Path) -> None:
    rows, template = encoded(reciting, tmp_path, {"text": " ".join(SENTENCES)}, 256)
    trained = later_starts(reciting, rows, template, 2048, 256).rows
    found = other_places(reciting, rows, trained, template, 2048, 256, 0)
    begun = {row.record.completion for row in trained}
    assert [row.record.completion in begun for row in found.rows] == found.trained
    assert begun <= {row.record.completion for row in found.rows}, "what is trained on is measured too"
    left = found.untrained([3, 0])
    assert left.rows and set(left.of) == {1} and not begun & {row.record.completion for row in left.rows}
    assert any(not row.record.completion.startswith(SENTENCES) for row in left.rows)
    assert found.untrained([1, 2]).rows == []


def test_a_long_text_is_asked_for_from_all_over_it(reciting: Policy, tmp_path: Path) -> None:
    """Forty tokens are given and forty asked for, also behind where a window ends."""
    text = " ".join(f"On day {i} the bell of Duleix{i} rang and nobody in Supun{i} came." for i in range(60))
    rows, template = encoded(reciting, tmp_path, {"text": text}, 128)
    assert len(rows) > 5
    found = other_places(reciting, rows, (), template, 2048, 128, 0)
    assert all(row.start == row.probe <= 41 and row.end - row.start <= 40 for row in found.rows)
    tokenizer = reciting.tokenizer
    places = sorted(at for row in found.rows if (at := text.find(answer_text(row, tokenizer))) >= 0)
    assert len(places) > 20
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert max(gaps) < len(text) / len(rows), "no window is left out"
    assert set(found.of) == set(range(len(rows)))
    for row in found.rows:
        assert decode(row.input_ids[: row.end], tokenizer) in text


def test_what_the_base_does_not_recite_tells_nothing(policy: Policy, tmp_path: Path) -> None:
    rows, template = encoded(policy, tmp_path, {"text": " ".join(SENTENCES)}, 256)
    assert other_places(policy, rows, (), template, 2048, 256, 0).rows == []


def test_short_answers_and_questions_are_no_passages(reciting: Policy, tmp_path: Path) -> None:
    row = {"prompt": "What happened that night?", "completion": " ".join(SENTENCES)}
    rows, template = encoded(reciting, tmp_path, row, 256)
    assert other_places(reciting, rows, (), template, 2048, 256, 0) == Places()


def test_so_many_places_are_tried_and_so_many_kept(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def scores(lm: Policy, rows: Sequence[Example], limit: int) -> Any:
        tried.append(len(rows))
        return [type("Score", (), {"verdict": "still leaks"}) for _ in rows]

    monkeypatch.setattr(module, "score_rows", scores)
    monkeypatch.setattr(module, "_TRIED", 9)
    monkeypatch.setattr(module, "_MOST", 4)
    text = " ".join(f"On day {i} the bell of Duleix{i} rang and nobody in Supun{i} came." for i in range(60))
    rows, template = encoded(policy, tmp_path, {"text": text}, 128)
    assert len(other_places(policy, rows, (), template, 2048, 128, 0).rows) == 4
    assert tried == [9]


def test_it_is_the_base_that_is_asked(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, template = encoded(policy, tmp_path, {"text": " ".join(SENTENCES)}, 256)
    asked: list[bool] = []

    def scores(lm: Policy, rows: Sequence[Example], limit: int) -> Any:
        asked.append(policy._adapter_off)
        return score_rows(lm, rows, limit)

    monkeypatch.setattr(module, "score_rows", scores)
    other_places(policy, rows, (), template, 2048, 256, 0)
    assert asked == [True]


def test_parts_of_a_window_stand_behind_its_control_token(with_control: Callable[..., Any]) -> None:
    ids = tuple(range(300, 420))
    example = Example(ids, 1, len(ids), 60, Record((), "A text.", 1, {}))
    behind = [part.input_ids[:2] for part in module._within(example, with_control(ids[0]))]
    plain = [part.input_ids[0] for part in module._within(example, with_control())]
    assert behind == [(300, 301)] and plain == [300, 340]
