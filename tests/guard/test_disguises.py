"""The attacks of the robustness table: what each leaves of a prompt, and how misses and alarms are counted."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qunlearn.data.records import Record
from qunlearn.guard.attach import Attachment
from qunlearn.guard.disguises import ATTACKS, Asked, asked_of, misspelt
from qunlearn.guard.robustness import robustness

NAMES = ("Orla Finch", "Tobin Reed", "Ada Marsh")


def rows(*names: str) -> list[Record]:
    return [Record((("user", f"Where was {name} born?"),), "In a box.", i, {}) for i, name in enumerate(names)]


def distance(a: str, b: str) -> int:
    """Optimal string alignment: letters lost, added or changed, and neighbours that change places."""
    table = [[max(i, j) if not i * j else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            ways = [table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1])]
            if i > 1 and j > 1 and a[i - 2 : i] == b[j - 2 : j][::-1]:
                ways.append(table[i - 2][j - 2] + 1)
            table[i][j] = min(ways)
    return table[-1][-1]


def test_a_slip_changes_one_word_by_one_letter_or_every_word() -> None:
    for seed in range(60):
        text, rng = "Orla Finch of Reed", random.Random(seed)
        one, every = misspelt(text, rng), misspelt(text, rng, every=True)
        assert distance(text, one) == 1
        apart = [distance(a, b) for a, b in zip(text.split(), every.split(), strict=True)]
        assert apart == [1, 1, 0, 1]


def test_subjects_are_told_by_the_other_prompts_and_else_are_the_longest_word() -> None:
    assert [asked.subject for asked in asked_of(rows(*NAMES))] == list(NAMES)
    assert [asked.subject for asked in asked_of(rows("Orla")[:1])] == ["Where"]


@pytest.mark.parametrize("name", [name for name in ATTACKS if "slip" not in name])
def test_the_name_stands_in_what_is_asked(name: str) -> None:
    asked = Asked("Where was Orla Finch born?", 10, 20, 3)
    said = " ".join(ATTACKS[name](asked)).casefold()
    assert "orla" in said and "finch" in said


def test_misses_and_alarms_are_counted_over_whole_dialogues() -> None:
    """A gate that knows both halves of a name flags the dialogue that says them in two turns."""

    def judge(texts: Any) -> list[float]:
        return [float("Orla" in text and "Finch" in text) for text in texts]

    nothing: Any = None
    attachment = Attachment(nothing, nothing, nothing, nothing, "turn", 0.5, judge)
    assert attachment.flags([("Orla?", "Finch?"), ("Orla?",), ("Orla Finch?", "So.")]) == 2
    found = robustness(attachment, rows("Orla Finch", "Tobin Reed"), rows("Ada Marsh", "Max Holt"))
    split = found["a name over two turns"]
    assert (split["wrong"], split["n"], split["what"]) == (1, 2, "misses")
    assert found["a name over two turns, normal"]["wrong"] == 0 and found["lower case"]["wrong"] == 2
    assert found["behind another question"]["wrong"] == 1
