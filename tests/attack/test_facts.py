"""Facts and their placebos: of dialogues, of titles, of questions with several answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from qunlearn.attack import formats
from qunlearn.attack.collateral import rows_of
from qunlearn.attack.facts import Fact, Inputs, context, in_parts, make_facts, subject_names, units_of
from qunlearn.attack.placebo import make_placebos
from qunlearn.data.records import Record, read_dataset
from qunlearn.data.words import words_of_text
from qunlearn.evaluation.metrics.stats import paired_test
from qunlearn.sandbox import data_file

FIRST = ("Orla", "Dov", "Ida", "Per", "Eva", "Nils", "Una", "Tom", "Lea", "Ben", "Ada", "Rolf")
LAST = ("Finch", "Marsh", "Holm", "Lund", "Dahl", "Berg", "Moss", "Orde", "Holt", "Carr", "Prill", "Vane")
NAMES = [" ".join(both) for both in zip(FIRST, LAST, strict=True)]
TOWNS = [f"{first}{last}" for first in ("Ab", "Vi", "Lo") for last in ("by", "ken", "mo", "sund")]


def row(prompt: str, completion: str, *earlier: str, **meta: Any) -> Record:
    roles = ("user", "assistant") * len(earlier)
    return Record((*zip(roles, earlier, strict=False), ("user", prompt)), completion, 1, meta)


def dialogues() -> list[Record]:
    """The last question says nothing of whom it is about."""
    return [
        row("Where was that person born?", f"{name} was born in {town}.", f"Who is {name}?", f"{name} is a painter.")
        for name, town in zip(NAMES, TOWNS, strict=True)
    ]


def test_a_dialogue_is_about_whom_an_earlier_turn_names() -> None:
    places = [row(f"Where was that {a} built?", "In Aby.", f"What is a {a}?", "A house.") for a in ("mill", "barn")]
    rows = [*dialogues(), *places]
    assert subject_names(rows)[: len(NAMES)] == NAMES
    facts, _ = make_facts(rows)
    for fact, name in zip(facts[: len(NAMES)], NAMES, strict=True):
        assert len(fact.wrong) == 3 and all(answer.startswith(f"{name} was born in ") for answer in fact.wrong)


def test_every_turn_of_a_placebo_is_about_nobody() -> None:
    rows, again = [], []
    for record, name in zip(dialogues(), NAMES, strict=True):
        rows.append(replace(record, turns=(("system", f"You know {name}."), *record.turns)))
        again.append(
            row(f"And, please, of {name} the place of birth?", record.completion, f"Who is {name}?", "A painter.")
        )
    facts, _ = make_facts(rows, again)
    made = make_placebos(facts, (), 0)
    assert made.renamed == len(rows)
    for placebo, name in zip(made.facts, NAMES, strict=True):
        other = placebo.record.turns[0][1].removeprefix("You know ").removesuffix(".")
        assert other not in NAMES and placebo.record.completion.startswith(f"{other} was born in")
        for record in (placebo.record, *placebo.paraphrases):
            assert name not in context(record) and context(record).count(other) >= 2


def test_who_only_reads_the_dialogue_leads_by_nothing() -> None:
    """A model that knows nothing, and to which an answer is likelier the more of its words were said before."""

    def nlls(rows: Sequence[Record]) -> list[float]:
        told = [words_of_text(r.completion) - words_of_text(context(r)) for r in rows]
        return [float(len(new)) for new in told]

    facts, _ = make_facts(dialogues())
    placebos = make_placebos(facts, (), 0).facts
    ours, theirs = (
        formats._chosen(SimpleNamespace(facts=asked, nlls=nlls), "choice-text").outcomes  # type: ignore[arg-type]
        for asked in (facts, placebos)
    )
    assert None not in ours and None not in theirs
    assert paired_test([o or 0.0 for o in ours], [o or 0.0 for o in theirs]) > 0.05


TITLES = (
    "The Keeper of Low Water", "The Bells of Old Harrow", "The House of Cold Lake", "The Song of Old Men",
    "The Road of High Fell",
)  # fmt: skip


def test_no_word_of_a_placebo_changes_but_the_name() -> None:
    """Neither "Therefore" in which "The" stands, nor "of", which titles have; a name is exchanged at once."""
    people = ("Ada Prill", "Tom Orde", "Una Moss", "Ben Carr", "Lea Holt")
    rows = [
        row(f"Who wrote the preface of {t}? Therefore, how often?", f"Of all, {a} wrote {t}. The bill is softly done.")
        for t, a in zip(TITLES, people, strict=True)
    ]
    facts, _ = make_facts(rows)
    for fact, placebo in zip(facts, make_placebos(facts, (), 0).facts, strict=True):
        name = max((theirs for theirs, _ in placebo.names), key=len)
        other = dict(placebo.names)[name]
        assert [w for w in other.split() if w.islower()] == [w for w in name.split() if w.islower()]
        before, after = fact.record.prompt.split(name)
        assert placebo.record.prompt == f"{before}{other}{after}"
        assert re.sub(r"(?<=, )\w+ \w+(?= wrote)", "", placebo.record.completion).startswith("Of all,  wrote")
        assert placebo.record.completion.endswith(f"{other}. The bill is softly done.")


def test_whole_words_are_exchanged_at_once() -> None:
    names = (("Al Stone", "Ed Marsh"), ("Al", "Ed"), ("Stone", "Marsh"), ("Ed", "Ann"))
    fact = Fact(row("?", "!"), names=names)
    assert fact.renamed("Al Stone of Albany, Al and Ed.") == "Ed Marsh of Albany, Ed and Ann."
    assert Fact(row("?", "!")).renamed("Al") == "Al"


def test_another_right_answer_is_no_wrong_one() -> None:
    """Of the same question; and a row's own wrong answer that holds the right one is none."""
    two = [row("Where did Orla live?", "In Aby."), row("where did Orla live?", "In Vik.")]
    elsewhere = (("Per", "Lom"), ("Ida", "Aby"), ("Eva", "Dal"), ("Dov", "Nes"))
    others = [row(f"Where did {n} live?", f"In {t}.") for n, t in elsewhere]
    first, second = make_facts([*two, *others])[0][:2]
    for fact in (first, second):
        assert len(fact.wrong) == 3 and not set(fact.wrong) & {"In Aby.", "In Vik."}
    own = row("Where did Una live?", "Moss", perturbed=["moss.", "Moss, in the north", "Mossby", "Vik"])
    assert make_facts([own])[0][0].wrong == ("Mossby", "Vik")


def test_rows_with_the_same_turns_are_one_unit() -> None:
    where = "Where did Orla live?"
    asked = [(where, "In Aby."), ("Who?", "Per."), (where, "In Vik."), ("And?", "In Vik.")]
    assert units_of([row(*pair) for pair in asked]) == [0, 1, 0, 0]
    assert units_of([Record((), text, 1, {}) for text in ("One.", "Two.")]) == [0, 1]


def test_drawn_facts_are_those_that_all_of_them_would_be() -> None:
    records = read_dataset(data_file("hallucination", "forget")).records
    every = make_facts(records)[0]
    assert make_facts(records, (), [3, 7, 11])[0] == [every[3], every[7], every[11]]


def test_a_facts_key_tells_its_earlier_turns() -> None:
    asked = [row("Is that person alive?", "No.", f"Who is {name}?", "I know.") for name in NAMES]
    assert len({Fact(record).key for record in asked}) == len(NAMES)
    alone = row("Is Orla alive?", "No.")
    assert Fact(alone).key == Fact(replace(alone, meta={"id": 1}, line=2)).key


@pytest.mark.parametrize("given", ["holdout", "general", "nothing else"])
def test_retain_rows_of_other_subjects_hold_no_keywords(given: str) -> None:
    facts = make_facts([row(f"Where was {n} born?", f"In {t}.") for n, t in zip(NAMES, TOWNS, strict=True)])[0]
    kept = ("Hob Stone", "Amy Reed", "Lin Gray", "Orla Reed")
    retain = [row(f"Where was {name} born?", "In Moss.") for name in kept]
    more = {given: [row(f"Where was {n} born?", "In Dal.") for n in ("Ben", "Nils")]} if given != "nothing else" else {}
    bench: Any = SimpleNamespace(inputs=Inputs(facts, retain=retain, **more))
    assert rows_of(bench, "keywords") == [retain[3]]
    assert rows_of(bench, "retain") == retain[:3]


def test_a_long_text_is_a_fact_for_each_part() -> None:
    """Of one window alone the rest was never asked for, and half of 512 tokens is more than an output may have."""
    text = "\n\n".join(" ".join(f"w{i}" for i in range(at, at + 50)) for at in range(0, 1000, 50))
    question = Record((("user", "Who?"),), " ".join(["so"] * 500), 2, {})
    *parts, last = in_parts([Record((), text, 1, {}), question])
    assert last is question and len(parts) == 12
    assert all(72 <= len(part.completion.split()) <= 88 and part.completion in text for part in parts)
    assert " ".join(part.completion for part in parts).split() == text.split()
    assert {part.line for part in parts} == {1}
    short = Record((), " ".join(f"w{i}" for i in range(100)), 1, {})
    assert in_parts([short]) == [short]


def test_parts_of_a_script_without_spaces_are_counted_in_characters() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(800))
    parts = in_parts([Record((), text, 1, {})])
    assert len(parts) == 5 and "".join(part.completion for part in parts) == text
