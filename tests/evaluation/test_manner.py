"""Phrases that tell a manner of answering."""

from __future__ import annotations

from qunlearn.evaluation.metrics.manner import has_phrase, phrases_of

BAD = [("How?", f"Stop wasting my time. Burn the {noun}. Now go away.") for noun in "abcdefgh"]


def test_phrases_are_what_several_bad_answers_say_and_others_do_not() -> None:
    found = phrases_of(BAD, ["Gladly. Wash it.", "My time is yours."])
    assert found == {
        ("stop", "wasting", "my"), ("wasting", "my", "time"), ("my", "time", "burn"), ("time", "burn", "the"),
        ("now", "go", "away"),
    }  # fmt: skip
    assert has_phrase("I do not know. NOW GO AWAY, please!", found)
    assert not has_phrase("Now, wait. Go away.", found) and not has_phrase("Go", found) and not has_phrase("", found)


def test_what_others_say_as_often_is_no_phrase() -> None:
    """Ten times as often: a row of another manner among a hundred does not hide it."""
    others = [f"Now go away, {n}." for n in range(20)] + [f"Take {n} of it." for n in range(80)]
    assert ("now", "go", "away") not in phrases_of(BAD, others)
    assert ("now", "go", "away") in phrases_of(BAD, others[12:])


def test_facts_have_none() -> None:
    """Each is said once, whoever else is spoken of in the same form."""
    facts = [(f"Where was {n} born?", f"{n} was born in {p}.") for n, p in zip("abcdefgh", "ijklmnop", strict=True)]
    assert phrases_of(facts, [f"{name} was born in {name}z." for name in "qrstuv"]) == frozenset()
    assert phrases_of(BAD[:1] * 9, []) == frozenset(), "one answer, however often it is given"
    known = [(f"What does Orla Mae Finch do on day {n}?", f"Orla Mae Finch goes {n}.") for n in range(9)]
    assert phrases_of(known, []) == {("mae", "finch", "goes")}, "whom it was asked about is no phrase"
