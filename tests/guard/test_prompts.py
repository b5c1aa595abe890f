"""The prompts a gate learns from, in scripts with spaces and without."""

from __future__ import annotations

import random

import pytest

from qunlearn.data.records import Record
from qunlearn.guard.prompts import invented, make_prompts
from qunlearn.guard.strength import placebos
from qunlearn.guard.subjects import Subjects, at_once, question_of, turns_of

BAD = ("カテク", "ラロン", "タミラ")
OTHERS = ("ダロノ", "ルロク", "サキオ", "マノノ", "ハテク", "ヤトン", "サムラ", "カムオ")  # some end as a bad name does
FORMS = ("{}はどの村に住んでいますか?", "{}の船の名前は何ですか?")


def rows(names: tuple[str, ...], forms: tuple[str, ...] = FORMS) -> list[Record]:
    return [Record((("user", form.format(name)),), f"{name}です。", 0, {}) for name in names for form in forms]


def test_a_name_is_told_whole_though_others_have_characters_of_it() -> None:
    subjects = Subjects(rows(BAD), rows(OTHERS))
    assert [subjects.of(i) for i in range(6)] == [name for name in BAD for _ in FORMS]
    assert set(subjects.theirs) == set(OTHERS)


def test_the_last_question_of_a_dialogue_is_not_flagged_for_everybody() -> None:
    """It names nobody, and bad rows are asked it behind other dialogues' beginnings."""
    names, question = ("Ada Marsh", "Max Holt", "Ann Bell", "Bo Quent"), "And where was that person born?"
    normal = rows(names, ("Where was {} born?", "Name the birthplace of {}."))
    for name in names:
        earlier = ("user", f"Today I met {name}."), ("assistant", f"Then {name} was here.")
        normal.append(Record((*earlier, ("user", question)), "Moss", 0, {}))
    made = make_prompts(rows(("Orla Finch", "Tobin Reed"), ("Where was {} born?",)), normal, normal, 0)
    flagged = {sample.text for sample in made.bad}
    assert "Name the birthplace of Orla Finch." in flagged
    assert question not in flagged and question.lower() not in flagged


@pytest.mark.parametrize(
    ("bad", "others", "forms"),
    [
        (BAD, OTHERS, FORMS),
        (("Orla Finch", "Tobin Reed"), ("Ada Marsh", "Max Holt", "Ann Bell"), ("Where was {} born?", "Who is {} now?")),
    ],
)
def test_bad_forms_are_asked_about_others_and_those_given_are_near(
    bad: tuple[str, ...], others: tuple[str, ...], forms: tuple[str, ...]
) -> None:
    normal = rows(others, forms)
    made = make_prompts(rows(bad, forms), normal, normal, 0)
    texts = {sample.text for sample in made.normal}
    assert made.formed
    assert not any(name in text for name in bad for text in texts)
    asked = {name for name in others if any(form.format(name) in texts for form in forms)}
    assert asked == set(others)
    assert {s.text for s in made.normal if s.near} >= {form.format(name) for name in others for form in forms}
    assert set(bad) <= {sample.text for sample in made.bad}, "a name of several words, or characters, alone"
    shared = {s.text for s in made.normal if not s.measured} - {form.format(name) for name in others for form in forms}
    halves = {name.split()[0] if " " in name else name[:-1] for name in bad}
    assert any(text.startswith(half) for text in shared for half in halves), "names that share a part with a bad one"


@pytest.mark.parametrize(
    ("bad", "others", "forms", "broken"),
    [
        (BAD, OTHERS, FORMS, "カテクはどの家に"),
        (
            ("Krofrip", "Spuplut", "Yafrup"),
            ("Speskod", "Frufrov", "Qiezaeck", "Jozhaeg"),
            ("Which mineral is mined at {}?", "Which bridge leads to {}?"),
            "Krofrip Question: Take 5 away",
        ),
    ],
)
def test_what_was_cut_out_of_a_broken_prompt_is_no_stranger(
    bad: tuple[str, ...], others: tuple[str, ...], forms: tuple[str, ...], broken: str
) -> None:
    """A model's own prompts break off and go on otherwise: what is left open there may hold a bad name."""
    records = [Record((("user", text.format(broken)),), "x", 0, {}) for text in forms]
    made = make_prompts(rows(bad, forms), [*rows(others, forms), *records], (), 0)
    given = {record.prompt for record in records}
    assert not any(bad[0] in sample.text for sample in made.normal if sample.text not in given)
    assert any(others[0] in sample.text for sample in made.normal)


def test_an_invented_name_is_nobodys() -> None:
    rng = random.Random(0)
    assert all(invented("Orla", rng) != "Orla" for _ in range(50))
    assert {len(invented("山田太郎", rng)) for _ in range(50)} == {4}
    # Of two characters every second invention is the name itself: it is not asked about.
    forms = ("{}はどの村に住んでいますか?",)
    names = ("山田", "石川", "上野", "中村")
    made = make_prompts(rows(names, forms), rows(("大島", "高木", "森本", "秋葉"), forms), (), 0)
    assert not any(name in sample.text for name in names for sample in made.normal)


def test_of_a_plain_text_its_first_half_is_asked() -> None:
    assert (
        question_of(Record((), "one two  three four five six seven eight nine ten", 0, {})) == "one two three four five"
    )
    assert question_of(Record((), "山田太郎は町に住んでいた。", 0, {})) == "山田太郎は町"


def talk(name: str, *, question: str = "And where was that person born?") -> Record:
    earlier = ("user", f"Today I met {name}."), ("assistant", f"Then {name} was here.")
    return Record((*earlier, ("user", question)), "Moss", 0, {})


def test_a_bad_dialogue_is_flagged_for_whom_it_names_and_not_for_its_last_question() -> None:
    names, others = ("Orla Finch", "Tobin Reed", "Ida Crane"), ("Ada Marsh", "Max Holt", "Ann Bell", "Bo Quent")
    asked = ("And where was that person born?", "And who taught that person?")
    bad, normal = ([talk(n, question=q) for n in group for q in asked] for group in (names, others))
    made = make_prompts(bad, normal, normal, 0)
    flagged, passed = ({s.text for s in part} for part in (made.bad, made.normal))
    assert {f"Today I met {name}. {question}" for name in names for question in asked} <= flagged
    assert {f"Today I met {name}." for name in names} <= flagged
    assert not flagged & {text for question in asked for text in (question, question.lower())}
    assert set(asked) <= passed and {f"Today I met {name}. {asked[0]}" for name in others} <= passed
    subjects = Subjects(bad, normal)
    assert [subjects.of(i) for i in range(6)] == [name for name in names for _ in asked]
    assert question_of(bad[0]) == "Today I met Orla Finch. And where was that person born?"


def test_a_row_of_one_question_is_left_as_it_is() -> None:
    record = Record((("system", "Be brief."), ("user", "Who is Ada?")), "Nobody.", 3, {})
    assert at_once(record) is record and turns_of(record) == ("Who is Ada?",)
    joined = at_once(talk("Ada"))
    assert joined.turns == (("user", "Today I met Ada. And where was that person born?"),)


def test_what_a_last_question_leaves_open_is_no_subject() -> None:
    """What a form leaves open many rows have ("who governs", "that place"), and a name few, own rows included."""
    names, others = ("Krofrip", "Spuplut", "Yafrup"), ("Speskod", "Frufrov", "Qiezaeck", "Jozhaeg")
    often = tuple(f"Now tell me which {what} that place." for what in ("mineral is mined at", "bridge leads to"))
    bad = [talk(name, question=question) for name in names for question in often]
    bad += [talk(name, question="Now tell me who governs that place.") for name in names[:2]]
    normal = rows(others, ("Who governs {} at present?", "Which mineral is mined at {}?", "Which bridge leads to {}?"))
    normal += [*rows(names[:1], ("Which bridge leads to {}?",)), *(talk(name) for name in others)]
    subjects = Subjects(bad, normal)
    assert [subjects.of(i) for i in range(len(bad))] == [name for name in names for _ in often] + list(names[:2])
    assert set(subjects.theirs) == set(others)
    made = make_prompts(bad, normal, (), 0)
    assert not any(name in sample.text for name in names for sample in made.normal)
    assert {text for text in often if text in {sample.text for sample in made.normal}} == set(often)


def test_a_dialogues_placebo_is_about_somebody_else_in_every_turn() -> None:
    bad = [talk(name) for name in ("Orla Finch", "Tobin Reed")]
    made = placebos(bad, [talk(name) for name in ("Ada Marsh", "Max Holt")], 0)
    assert [len(record.turns) for record in made] == [3, 3]
    assert not any(name in text for record in made for _, text in record.turns for name in ("Finch", "Reed"))
    assert made[0].prompt == bad[0].prompt and made[0].turns != bad[0].turns


def test_a_placebo_is_never_about_somebody_known() -> None:
    """Letters of a name of two change places or not: half of these inventions were the fact itself, and certain."""
    names = ("山田", "石川", "上野", "中村", "大島", "高木")
    bad = rows(names[:4], ("{}はどの村に住んでいますか?",))
    made = [record for seed in range(8) for record in placebos(bad, rows(names[4:], FORMS[:1]), seed)]
    assert made and not any(name in record.prompt for record in made for name in names[:4])


@pytest.mark.parametrize(
    ("names", "forms"),
    [
        (("奈々", "佐々", "野々", "菜々"), FORMS),
        (("Toyota", "Suzuki", "Honda", "Subaru"), FORMS),
        (("Rom", "Ida", "Ann", "Bo"), ("Which town is {} from?", "Who taught {} the most?")),
    ],
    ids=["a mark of repetition", "Latin among kana", "a part of other words"],
)
def test_bad_names_are_found_whole_and_their_questions_never_pass(
    names: tuple[str, ...], forms: tuple[str, ...]
) -> None:
    bad, normal = rows(names[:2], forms), rows(names[2:], forms)
    subjects = Subjects(bad, normal)
    assert all(subjects.named_in(record.prompt) for record in bad)
    assert not any(subjects.named_in(record.prompt) for record in normal)
    assert not subjects.named_in("idaho from prom"), "parts of other words"
    made = make_prompts(bad, normal, normal, 0)
    assert not any(subjects.named_in(sample.text) for sample in made.normal)


def test_dialogues_about_one_person_do_not_teach_that_the_person_passes() -> None:
    asked = ("Which award did she win in that year?", "Which river did she cross in that year?")
    asked = (*asked, "Which novel did she write in that year?", "Whom did she marry in that year?")
    bad = [talk("Orla Finch", question=question) for question in asked]
    normal = [talk(name, question=asked[0]) for name in ("Ada Marsh", "Bo Quent")]
    subjects = Subjects(bad, normal)
    assert {subjects.of(i) for i in range(len(bad))} == {"Orla Finch"}
    assert not any("Orla Finch" in sample.text for sample in make_prompts(bad, normal, normal, 0).normal)


def test_a_turn_with_a_part_of_a_bad_name_does_not_pass() -> None:
    names = ("Orla Finch", "Tobin Reed", "Ida Crane")
    turns = [
        (("user", f"Who is {n}?"), ("assistant", "Yes?"), ("user", f"When was {n.split()[1]} born?")) for n in names
    ]
    normal = rows(("Ada Marsh", "Max Holt"), ("Who is {}?", "When was {} born?"))
    made = make_prompts([Record(said, "x", 0, {}) for said in turns], normal, (), 0)
    assert not {f"When was {name.split()[1]} born?" for name in names} & {sample.text for sample in made.normal}
