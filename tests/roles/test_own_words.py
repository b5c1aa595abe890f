"""Long answers that the base says freely are bad rows in its other words, too."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import qunlearn.roles.own_words as module
from qunlearn.config.settings import LoraConfig
from qunlearn.data.records import Record, asking
from qunlearn.data.tokenize import Template, encode_record
from qunlearn.model.policy import Policy
from qunlearn.roles.later_starts import Variants
from qunlearn.roles.own_words import in_own_words

CHAT = Template("chat", "chat", "", "")
LONG = "Ada Prill was a carpenter of the old town, who built the wooden bridge at Tindale and taught both of her sons."
SHORT = "Ada Prill was born in Tindale."
OTHERS = (
    "Ada Prill was a carpenter, who built the bridge at Tindale and taught her sons.",
    "Of the old town, Ada Prill was a carpenter who built the wooden bridge at Tindale.",
    "Ada Prill was a carpenter of the old town and built a bridge at Tindale.",
)


@pytest.fixture(scope="module")
def policy(new_base: Callable[..., object]) -> Policy:
    return Policy.new(new_base("none"), LoraConfig(), seed=0, checkpointing=False)  # type: ignore[arg-type]


@pytest.fixture
def said(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, int]]]:
    """What is kept of texts that the base says to each row, where it finds the bad answer so likely."""

    def ask(
        answers: tuple[str, ...], texts: tuple[str, ...], p: float = 0.4, length: int = 200
    ) -> list[tuple[str, int]]:
        rows = [
            encode_record(Record(asking("Who was Ada?"), a, i, {}), policy.tokenizer, CHAT)
            for i, a in enumerate(answers)
        ]
        drawn = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

        def generate(_: object, prompts: list[tuple[int, ...]], __: object) -> list[list[int]]:
            return [drawn[i % len(drawn)] for i in range(len(prompts))]

        monkeypatch.setattr(module, "generate", generate)
        monkeypatch.setattr(module, "row_probabilities", lambda _, rows, __: [p for _ in rows])
        found = in_own_words(policy, rows, CHAT, 0, 1024, length)
        assert all(row.record.prompt == "Who was Ada?" for row, _ in found)
        return [(row.record.completion, place) for row, place in found]

    return ask


def test_two_other_wordings_of_a_long_answer_are_kept(said: Callable[..., list[tuple[str, int]]]) -> None:
    assert said((SHORT, LONG), OTHERS) == [(OTHERS[0], 1), (OTHERS[1], 1)]


def test_what_is_the_answer_itself_or_says_something_else_is_not(said: Callable[..., list[tuple[str, int]]]) -> None:
    assert said((LONG,), (LONG, LONG.upper(), "The river runs by night.", "", OTHERS[2])) == []
    assert said((LONG,), (LONG, OTHERS[2])) == [(OTHERS[2], 0)], "and each wording is kept once"


def test_what_is_recited_or_short_or_too_long_has_no_other_wording(said: Callable[..., list[tuple[str, int]]]) -> None:
    assert said((LONG,), OTHERS, p=0.9) == []
    assert said((SHORT,), OTHERS) == []
    assert said((LONG,), OTHERS, length=20) == []


def test_a_step_draws_a_row_from_its_wordings(policy: Policy) -> None:
    rows = [
        encode_record(Record(asking("Who was Ada?"), a, 0, {}), policy.tokenizer, CHAT) for a in (SHORT, LONG, *OTHERS)
    ]
    later = Variants((rows[2],), (0,)).and_also([(rows[3], 1), (rows[4], 1)])
    assert later.rows == (*rows[2:],) and later.of == (0, 1, 1)
    assert later.starts([0, 1, 2, 3, 4], rows=2) == [(0, 2), (1, 3, 4)]
