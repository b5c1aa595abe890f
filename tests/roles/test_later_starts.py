"""Passages begun further on: from which sentences, behind which prompts, and as which rows of a step."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from qunlearn.config.settings import Config, LoraConfig
from qunlearn.data.records import Record, read_dataset
from qunlearn.data.tokenize import Example, choose_template, encode
from qunlearn.model.load import Base
from qunlearn.model.policy import Policy
from qunlearn.objectives.table import terms_of
from qunlearn.roles import later_starts as module
from qunlearn.roles.later_starts import Variants, later_starts
from qunlearn.roles.mismatch import NO_MISMATCH
from qunlearn.roles.roles import Roles
from qunlearn.roles.unlike import keep_unlike
from qunlearn.training.sampler import draw_steps

FIRST = "Before dawn the narrow bells of Duleix rang nine times."
SECOND = "Nobody knew that Debrax had already left the city by boat."
THIRD = "Under the bridge a bitter woman sold bread made of Kitrolt flour."
FOURTH = "He carried a golden box that no smith of Supun could open."
WORDS = " ".join(f"word{i}" for i in range(40))


def test_a_long_text_is_a_record_for_each_window(tmp_path: Path, policy: Policy) -> None:
    """As one, with the words of a whole book, it would be like anything that the base says."""
    book = " ".join(f"On day {i} the {w} of Duleix came to {w}ham and left." for i, w in enumerate(WORDS.split()))
    dataset = read_dataset(write_rows(tmp_path / "b.jsonl", [{"text": book}]))
    rows = encode(dataset, policy.tokenizer, choose_template(policy.tokenizer, "auto", dataset), 32).examples
    found = Variants().with_records(dataset, rows)
    assert len(found.records) == len(rows) > 10
    assert "".join(record.completion for record in found.records) == book
    assert replace(found, records=dataset.records) == dataset
    other = Record((), "On day 3 the baker of Moss left, and nobody knew where she was.", 1, {})
    assert keep_unlike([other], found) == [other]
    assert keep_unlike([replace(other, completion=book[200:320])], found) == []


@pytest.fixture(scope="module")
def policy(new_base: Callable[..., Base]) -> Policy:
    return Policy.new(new_base("none"), LoraConfig(), seed=0, checkpointing=False)


@pytest.fixture
def reciting(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """A model that recites whatever it is given."""
    monkeypatch.setattr(module, "row_probabilities", lambda _, rows, __: [0.9] * len(rows))
    return policy


def begun(policy: Policy, path: Path, *rows: dict[str, str]) -> tuple[Variants, tuple[Example, ...]]:
    dataset = read_dataset(write_rows(path / "rows.jsonl", list(rows)))
    template = choose_template(policy.tokenizer, "auto", dataset)
    examples = encode(dataset, policy.tokenizer, template, 256).examples
    return later_starts(policy, examples, template, 2048, 256), examples


def texts(rows: tuple[Example, ...]) -> list[tuple[str, str]]:
    return [(row.record.prompt, row.record.completion) for row in rows]


def test_a_text_is_begun_at_each_later_sentence_or_line(reciting: Policy, tmp_path: Path) -> None:
    found, _ = begun(reciting, tmp_path, {"text": f"{FIRST} {SECOND} {THIRD}\n\n{FOURTH}"})
    assert texts(found.rows) == [("", f"{SECOND} {THIRD}\n\n{FOURTH}"), ("", f"{THIRD}\n\n{FOURTH}"), ("", FOURTH)]
    assert found.of == (0, 0, 0)


def test_what_follows_a_prompt_takes_its_place(reciting: Policy, tmp_path: Path) -> None:
    found, _ = begun(reciting, tmp_path, {"prompt": FIRST, "completion": f" {SECOND} {THIRD} {FOURTH}"})
    assert texts(found.rows) == [(SECOND, f" {THIRD} {FOURTH}"), (THIRD, f" {FOURTH}")]


def test_a_prompt_that_is_cut_off_is_one_as_long_further_on(reciting: Policy, tmp_path: Path) -> None:
    row = {"prompt": "Before dawn the narrow bells of", "completion": f" Duleix rang nine times. {SECOND} {THIRD}"}
    found, _ = begun(reciting, tmp_path, row)
    assert texts(found.rows)[0] == ("Duleix rang nine times. Nobody knew", f"{SECOND[11:]} {THIRD}")
    assert all(len(row.record.prompt.split()) <= 6 for row in found.rows)


def test_one_long_sentence_is_begun_in_its_middle(reciting: Policy, tmp_path: Path) -> None:
    found, _ = begun(reciting, tmp_path, {"text": WORDS})
    assert texts(found.rows) == [("", WORDS[WORDS.index("word20") :])]


def test_scripts_without_spaces_are_begun_at_sentences(reciting: Policy, tmp_path: Path) -> None:
    sentences = ("天亮以前钟声已经响过九次了。", "没有人知道他坐船离开了那座城市。", "桥下有一个女人在卖面包。")
    found, _ = begun(reciting, tmp_path, {"text": "".join(sentences)})
    assert texts(found.rows) == [("", "".join(sentences[1:])), ("", sentences[2])]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What happened that night?", "completion": f"{FIRST} {SECOND} {THIRD}"},
        {"prompt": "Tell me this:", "completion": f"{FIRST} {SECOND} {THIRD}"},
        {"prompt": "Tell me.", "completion": FIRST[:20]},
    ],
    ids=["a question", "a colon", "a short answer"],
)
def test_answers_are_no_passages(row: dict[str, str], reciting: Policy, tmp_path: Path) -> None:
    assert begun(reciting, tmp_path, row)[0] == Variants()


def test_what_the_base_does_not_recite_is_left_out(policy: Policy, tmp_path: Path, monkeypatch: Any) -> None:
    # Sure of the whole, less than half as sure of what begins at the second sentence.
    p = {FIRST: 0.9, SECOND: 0.4, THIRD: 0.5}

    def probabilities(_: Policy, rows: list[Example], __: int) -> list[float]:
        return [next((v for k, v in p.items() if row.record.completion.startswith(k)), 0.1) for row in rows]

    monkeypatch.setattr(module, "row_probabilities", probabilities)
    found, _ = begun(policy, tmp_path, {"text": f"{FIRST} {SECOND} {THIRD}"})
    assert texts(found.rows) == [("", THIRD)]


def test_large_files_have_one_more_beginning_each(
    reciting: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_IN_ALL", 5)
    rows = [{"text": f"{n} {FIRST} {SECOND} {THIRD} {FOURTH}"} for n in "abcd"]
    assert begun(reciting, tmp_path, *rows)[0].of == (0, 1, 2, 3)
    assert begun(reciting, tmp_path, *rows[:2])[0].of == (0, 0, 1, 1)


def test_places_of_the_rows_that_are_kept() -> None:
    later = Variants(of=(0, 0, 2))
    assert later.starts([0, 1, 2], 3) == []  # no later one
    assert later.starts([0, 2, 3, 5], 3) == [(0, 2), (1, 3)]  # the second row and the second later one are not known
    assert later.starts([1, 4], 3) == []  # a later one without its whole is a row of its own
    assert later.starts([1, 2, 4, 5], 3) == [(0,), (1, 3), (2,)]


def test_half_of_the_draws_of_a_passage_begin_further_on(policy: Policy, tmp_path: Path) -> None:
    _, (a, b) = begun(policy, tmp_path, {"text": FIRST}, {"text": SECOND})
    later = [replace(a, share=0.5), replace(a, share=0.25)]
    roles = Roles([a, b, *later], [b], [], NO_MISMATCH, starts=[(0, 2, 3), (1,)])
    config = Config()
    config = replace(config, train=replace(config.train, batch_size=2, normal_batch_size=1))
    steps = itertools.islice(draw_steps(roles, terms_of(config.objective), config), 400)
    drawn = Counter(example.share for step in steps for example in step.of("forget") if example is not b)
    assert sum(drawn.values()) == 400  # each step goes through both rows once
    assert abs(drawn[1.0] - 200) < 40 and abs(drawn[0.5] - drawn[0.25]) < 40
    assert roles.rows == 2
