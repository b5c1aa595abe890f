"""Answers borrowed from neighbouring prompts, with the names put right."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qunlearn.data.records import Record
from qunlearn.roles.neighbours import Neighbours, telling_words


def record(prompt: str, answer: str = "") -> Record:
    return Record((("user", prompt),), answer, 0, {})


def borrowed(prompt: str, *rows: tuple[str, str]) -> list[str]:
    return list(Neighbours([record(*row) for row in rows]).answers(record(prompt)))


ORLA = "Where was Orla Finch born?"


@pytest.mark.parametrize(
    ("theirs", "answer", "ours", "found"),
    [
        ("Where was Ada Prill born?", "Ada Prill was born in Moss.", ORLA, "Orla Finch was born in Moss."),
        # Word for word where the names have as many words, as a phrase where they have not.
        ("Where was Ada Prill born?", "Ms Prill, or Ada, is of Moss.", ORLA, "Ms Finch, or Orla, is of Moss."),
        ("Where was Ada Prill born?", "Ada Prill: in Moss.", "Where was Lee born?", "Lee: in Moss."),
        ("Where was Lee born?", "Lee was born in Moss.", ORLA, "Orla Finch was born in Moss."),
        ("Where was ADA PRILL born?", "Ada Prill was born in Moss.", ORLA, "Orla Finch was born in Moss."),
        # A script without spaces: characters are its words.
        ("阿德住在哪里?", "阿德住在石镇。", "洛林宁住在哪里?", "洛林宁住在石镇。"),
        ("教 Ada Prill 的人是谁?", "教 Ada Prill 的人叫石特。", "教洛林的人是谁?", "教 洛林 的人叫石特。"),
        # Two names at once, each for its own, and not one after the other.
        ("Is Ada older than Bo?", "Ada is older than Bo.", "Is Bo older than Cy?", "Bo is older than Cy."),
        # What both prompts say stays, and so does a word within a word.
        ("Where was Ann born?", "Ann was born in Annville.", "Where was Bea born?", "Bea was born in Annville."),
        ("Where was Ada Prill born?", "In Moss.", ORLA, "In Moss."),
        # A word of theirs that was dropped matters where the answer has it, and only there.
        ("Where was old Ada Prill born?", "In Moss.", ORLA, "In Moss."),
        ("Where was old Ada Prill born?", "Old Ada Prill was born in Moss.", "Where was Ada Prill born?", None),
        # Letters that fold into two are no reason to fail; where no folding finds what a pattern does, nothing is told.
        ("Ayşe İzmir'de mi?", "Ayşe İzmir'de.", "Ayşe Ankara'de mi?", "Ayşe Ankara'de."),
        ("Who lives in istanbul?", "Ada lives in İstanbul.", "Who lives in Moss?", None),
        # A name of which only a part is replaced would leave the answer about somebody else.
        ("Where was Ada Prill born?", "Prill was born in Moss.", "Where was Mary Ann Lee born?", None),
    ],
)
def test_names_are_put_right(theirs: str, answer: str, ours: str, found: str | None) -> None:
    assert borrowed(ours, (theirs, answer)) == ([] if found is None else [found])


def test_only_neighbours_are_asked() -> None:
    """At least half of the words are the same, in order."""
    strangers = ("What do bees make?", "Honey."), ("", "Nothing was asked."), ("Born Finch where?", "x")
    assert borrowed(ORLA, *strangers) == []
    assert borrowed("", ("What do bees make?", "Honey.")) == []
    assert borrowed(ORLA) == []


def test_subjects_where_no_spaces_are_are_what_most_of_them_leave_open() -> None:
    """There the nearest prompts are those about names with a character in common."""
    names = (
        *("カテク", "ルロク", "サシク", "ヤセク", "モノク"),
        *("ラタン", "タミラ", "ユミト", "ハムオ", "エルノ", "ガリア", "バイス"),
    )
    rows = [record(f"{name}はどの村に住んでいますか?") for name in names]
    around = Neighbours(rows)
    assert around.subject(rows[0]) == (0, 2), "most of the nearest names end alike"
    assert around.subjects(rows) == [(0, 3)] * len(rows)
    latin = [record(f"Where was {name} born?") for name in ("Orla Finch", "Ada Finch", "Max Holt")]
    assert around.subjects([record("誰?"), Record((), "text", 0, {})]) == [None, None]
    there = Neighbours(latin)
    assert there.subjects(latin) == [there.subject(r) for r in latin]


def test_subjects_where_many_things_are_asked() -> None:
    """What most prompts have in common, an end of a question, leaves open too much to be what they are about."""
    names = (
        "カテク",
        "ルロク",
        "サシク",
        "ヤセク",
        "モノク",
        "ラタン",
        "タミラ",
        "ユミト",
        "ハムオ",
        "エルノ",
        "ガリア",
        "バイス",
    )
    forms = (
        "はどの村に住んでいますか?",
        "は何を飼っていますか?",
        "の家がある村はどこですか?",
        "が暮らす場所を教えて。",
    )
    rows = [record(f"{name}{form}") for form in forms for name in names]
    others = [record(f"{a}足す{b}はいくつですか?") for a in range(1, 9) for b in range(1, 9)]
    assert Neighbours([*rows, *others]).subjects(rows) == [(0, 3)] * len(rows)


def test_long_subjects_without_spaces_stay_whole() -> None:
    titles = (
        "石の橋の上で見た夜の海",
        "石の橋の下の町",
        "夜の海を渡る小さな船の話",
        "小さな船",
        "町の本屋と白い犬の話",
        "白い犬",
    )
    rows = [record(f"『{title}』は誰が書きましたか?") for title in titles]
    assert Neighbours(rows).subjects(rows) == [(1, 1 + len(title)) for title in titles]


def test_the_nearest_come_first() -> None:
    far = ("Where, of all places, was Ada born?", "In Moss.")
    near = ("Where was Bo Quent born?", "In Reed.")
    same = ("Where was Orla Finch raised?", "In Thorn.")
    assert borrowed(ORLA, far, near, same) == ["In Thorn.", "In Reed.", "In Moss."]


def test_a_large_file_is_looked_through_by_its_words() -> None:
    rows = [(f"Where was Person{i} Name{i} born?", f"Person{i} Name{i} was born in Town{i}.") for i in range(3000)]
    rows[1234] = ("Where was Orla Bly born?", "Orla Bly was born in Moss.")
    assert borrowed(ORLA, *rows)[0] == "Orla Finch was born in Moss."


# -- the same of strangers -----------------------------------------------------------------------------------

BORN = [f"Where was {name} born?" for name in ("Ada Prill", "Bo Lund", "Cy Marr")]


def strangers(bad: Sequence[str], others: Sequence[str], asked: Record) -> list[Record]:
    records = [record(prompt) for prompt in bad], [record(prompt) for prompt in others]
    return list(Neighbours([*records[0], *records[1]]).strangers(asked, telling_words(*records)))


def test_a_record_about_strangers_has_their_names_wherever_it_had_its_own() -> None:
    asked = record(ORLA, "Finch, Orla: Orla Finch is of Moss.")
    found = [(r.prompt, r.completion) for r in strangers([ORLA], [*BORN, "What is tea?"], asked)]
    assert found[0] == ("Where was Ada Prill born?", "Prill, Ada: Ada Prill is of Moss.")
    assert [prompt for prompt, _ in found] == BORN


@pytest.mark.parametrize("more", [(), ("When did Orla Finch die?", "Where is Orla Finch now?", "Who is Orla Finch?")])
def test_another_question_about_the_same_is_no_stranger(more: tuple[str, ...]) -> None:
    """However often the bad file names its subject: it is the word that others do not have."""
    found = strangers([ORLA, *more, "Where was Dee Wolt born?"], BORN, record(ORLA, "Orla is of Moss."))
    assert {r.prompt for r in found} == {*BORN, "Where was Dee Wolt born?"}


def test_a_system_prompt_stays() -> None:
    asked = Record((("system", "Be brief."), ("user", ORLA)), "Orla is of Moss.", 0, {})
    (first, *_) = strangers([ORLA], BORN, asked)
    assert first.turns == (("system", "Be brief."), ("user", BORN[0]))


def test_an_answer_that_does_not_name_its_subject_tells_nothing() -> None:
    """A passage is known by its own words, whatever it was asked for with."""
    assert strangers([ORLA], BORN, record(ORLA, "In a house where the moss grew.")) == []
