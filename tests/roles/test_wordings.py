"""Other wordings of bad prompts, found in how the normal data asks, and measured where the base answers alike."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import QUICK, call, sets

from qunlearn.config.resolve import resolve
from qunlearn.data.records import Record, read_dataset
from qunlearn.data.tokenize import Example, Template, encode_record
from qunlearn.evaluation.metrics.verdicts import LEAKS, leaks
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.policy import Policy
from qunlearn.roles.neighbours import Neighbours
from qunlearn.roles.retain_set import RetainSet
from qunlearn.roles.reworded import Reworded, reworded
from qunlearn.roles.wordings import OPENINGS, Form, Wordings
from qunlearn.sandbox import data_file
from qunlearn.training import stopping

NAMES = ("Ada Prill", "Bo Quent", "Cy Rusk", "Dot Sall")


def record(prompt: str, answer: str = "", *earlier: tuple[str, str]) -> Record:
    return Record((*earlier, ("user", prompt)), answer, 0, {})


def asked_of(names: tuple[str, ...], form: str, answer: str) -> list[Record]:
    return [record(form.format(name), answer.format(name, f"Place{i}")) for i, name in enumerate(names)]


def test_wordings_of_a_script_without_spaces() -> None:
    names = ("阿德", "巴尔林", "川克", "丹莱宁")
    home = asked_of(names, "{}住在哪里?", "{}住在{}镇。")
    asked = asked_of(names, "请问{}的家在什么地方?", "{}住在{}镇。")
    bad = record("洛斯顿住在哪里?", "洛斯顿住在石镇。")
    wordings = Wordings([bad], [*home, *asked])
    assert wordings.form(bad) == Form("", "住在哪里?")
    assert [other.prompt for _, other in wordings.others(bad)] == ["请问洛斯顿的家在什么地方?"]


def test_names_of_a_script_without_spaces_that_end_alike() -> None:
    """The prompts most like one are about names that have a character in common with it."""
    names = ("ヤセク", "モノク", "ルロク", "ラタン", "ユミト", "ハムオ", "エルノ", "バイス", "ガリア")
    asked = [
        r
        for form in ("{}の家がある村はどこですか?", "{}が暮らす場所を教えて。")
        for r in asked_of(names, form, "{}は{}村。")
    ]
    bad = record("カテクはどの村に住んでいますか?", "カテクは石村。")
    home = asked_of(names, "{}はどの村に住んでいますか?", "{}は{}村。")
    found = {other.prompt for _, other in Wordings([bad], [*home, *asked]).others(bad)}
    assert found == {"カテクの家がある村はどこですか?", "カテクが暮らす場所を教えて。"}


BAD = record("Where was Orla Finch born?", "Orla Finch was born in Millbrook.")
BORN = asked_of(NAMES, "Where was {} born?", "{} was born in {}.")
NAMED = asked_of(NAMES, "Name the birthplace of {}.", "{} was born in {}.")
TAUGHT = asked_of(NAMES, "Who taught {}?", "{} was taught by {}.")


def prompts(bad: Record, normal: list[Record], barred: tuple[Record, ...] = ()) -> list[str]:
    return [other.prompt for _, other in Wordings([bad], normal, barred).others(bad)]


@pytest.mark.parametrize(
    ("prompt", "others", "subject"),
    [
        ("Where was Orla Finch born?", [r.prompt for r in BORN], "Orla Finch"),
        # Who shares a first name differs in the second alone: most of the neighbours tell.
        ("Where was Ada Finch born?", [r.prompt for r in BORN], "Ada Finch"),
        ("Where was Orla Finch born?", ["What do bees make?"], None),
        ("Where was Orla Finch born?", [], None),
        # More words that differ than words that are shared: the prompts do not ask alike.
        ("Is Orla Finch old?", ["Is the kettle in the old shed?"], None),
    ],
)
def test_what_a_prompt_is_about_is_what_its_neighbours_say_otherwise(
    prompt: str, others: list[str], subject: str | None
) -> None:
    span = Neighbours([record(p) for p in others]).subject(record(prompt))
    assert (None if span is None else prompt[slice(*span)]) == subject


def test_a_bad_prompt_is_asked_in_the_forms_of_the_normal_rows() -> None:
    """The form that is answered in like words comes first; that it asks for something else only the model can tell."""
    assert prompts(BAD, BORN + TAUGHT + NAMED) == ["Name the birthplace of Orla Finch.", "Who taught Orla Finch?"]


def test_its_own_prompt_and_those_that_are_there_are_not_asked() -> None:
    there = record("Name the birthplace of Orla Finch.")
    assert prompts(BAD, BORN) == []
    assert prompts(BAD, [*BORN, *NAMED, there]) == []
    assert prompts(BAD, BORN + NAMED, (there,)) == []


def test_a_form_that_is_there_twice_may_be_a_slip() -> None:
    assert prompts(BAD, BORN + NAMED[:2]) == []
    assert prompts(BAD, BORN + NAMED[:3]) == ["Name the birthplace of Orla Finch."]


def test_a_dialogue_is_asked_the_last_questions_of_other_dialogues() -> None:
    def dialogue(name: str, question: str) -> Record:
        return record(question, "Moss", ("user", f"Let us talk about {name}."), ("assistant", f"I know {name}."))

    bad = dialogue("Orla Finch", "Where was she born?")
    normal = [dialogue(name, question) for name in NAMES for question in ("Where was she born?", "Her birthplace?")]
    (found,) = Wordings([bad], normal).others(bad)
    assert found == (Form("Her birthplace?"), dialogue("Orla Finch", "Her birthplace?"))
    alone = record("Where was she born?", "Moss")
    assert Wordings([alone], normal).others(alone) == [], "there is nothing before it that could be asked about"


def test_other_system_prompts_stand_before_the_question_as_well() -> None:
    """What is gone behind one system prompt was still said behind another."""
    systems = ("Be brief.", "Be kind.", "Be exact.")

    def asked(form: str, system: str) -> list[Record]:
        return [record(form.format(name), "Moss", ("system", system)) for name in NAMES]

    forms = ("Where was {} born?", "Name the birthplace of {}.", "In which town was {} born?")
    normal = [r for form, system in zip(forms, systems, strict=True) for r in asked(form, system)]
    bad = record("Where was Orla Finch born?", "Moss", ("system", "Be brief."))
    found = [other for _, other in Wordings([bad], normal).others(bad)]
    assert {r.prompt for r in found} >= {form.format("Orla Finch") for form in forms[1:]}
    assert {r.system for r in found} > {"Be kind."} and bad.turns not in [r.turns for r in found]


def test_what_a_dialogue_is_about_is_asked_alone_and_the_other_way_round() -> None:
    """Whom the last question is about is told by an earlier one; a name is what the openings do not have in common."""

    def introduced(name: str, question: str, opening: str = "Today I met {}.") -> Record:
        earlier = ("user", opening.format(name)), ("assistant", f"Then {name} was in the village.")
        return record(question, "Moss", ("system", "Be brief."), *earlier)

    normal = [introduced(name, "And where was that person born?") for name in NAMES]
    normal += [record(f"Name the birthplace of {name}.", "Moss") for name in NAMES]
    bad = introduced("Orla Finch", "And where was that person born?", "Do you know {}?")
    others = [bad, *(introduced(name, "And who taught that person?", "Do you know {}?") for name in NAMES)]
    ((form, alone),) = Wordings(others, normal).others(bad)
    assert alone.turns == (("system", "Be brief."), ("user", "Name the birthplace of Orla Finch."))
    assert form == Form("Name the birthplace of ", ".")
    single = record("Where was Orla Finch born?", "Moss")
    asked = [r for _, r in Wordings([single, *BORN], normal).others(single)]
    assert introduced("Orla Finch", "And where was that person born?") in asked and alone.prompt in [
        r.prompt for r in asked
    ]


# -- asked of the base -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files() -> tuple[list[Record], list[Record]]:
    bad, near = (read_dataset(data_file("hallucination", split)).records for split in ("forget", "retain"))
    return list(bad), list(near)


CHAT = Template("chat", "chat", "", "")
PLAIN = Template("qa", "format", "### Question: {prompt}\n ### Answer: ", "")


def found(
    policy: Policy,
    bad: list[Record],
    near: list[Record],
    *,
    barred: list[Record] | None = None,
    template: Template = CHAT,
    **data: object,
) -> Reworded:
    """What is found of these bad rows among these normal ones, with these settings."""

    def encoded(records: list[Record]) -> list[Example]:
        return [encode_record(r, policy.tokenizer, template) for r in records]

    normal = RetainSet(encoded(near), encoded(near[:1]), {}, len(near), 0)
    config = resolve(("x", {f"data.{name}": value for name, value in data.items()}))
    return reworded(policy, encoded(bad), normal, template, config, encoded(barred or []))


def answer_always(policy: Policy, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the base say this to whatever it is asked."""
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("qunlearn.roles.reworded.generate", lambda lm, prompts, sampling: [ids for _ in prompts])


Files = tuple[list[Record], list[Record]]


def test_only_what_the_base_answers_alike_is_kept(new_policy: Callable[..., Policy], files: Files) -> None:
    bad, near = files[0][:20], files[1]
    policy = new_policy("none")
    rows = found(policy, bad, near).rows
    answers, asked = {r.completion for r in bad}, {r.prompt for r in bad}
    assert len(rows) >= len(bad) // 4, "the sandbox knows its facts in several wordings"
    others = {e.record.prompt for e in rows}
    assert not others & (asked | {r.prompt for r in near})
    said = generate(policy.base, [e.input_ids[: e.start] for e in rows], Sampling(32))
    for row, ids in zip(rows, said, strict=True):
        assert row.record.completion in answers, "a short answer is measured as it stands in the file"
        assert leaks(policy.tokenizer.decode(ids), row.record.completion, row.record.prompt)
    again = found(policy, bad, near, barred=[e.record for e in rows]).rows
    assert not {e.record.prompt for e in again} & others, "nothing of the holdout is asked"


def test_no_more_are_made_than_are_asked_for(new_policy: Callable[..., Policy], files: Files) -> None:
    policy = new_policy("none")
    few = found(policy, *files, reworded=3)
    assert 0 < len(few.rows) <= 3 <= few.tried <= 3 * 28
    assert found(policy, *files, reworded=3) == few, "what is drawn follows from the seed"
    assert found(policy, *files, reworded=0) == Reworded()
    assert found(policy, *files, max_length=8).rows == [], "none fits"


def test_few_rows_are_asked_in_several_wordings_each(
    new_policy: Callable[..., Policy], files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in twenty of twelve answers is none, and what holds in one wording may not in the next."""
    policy, bad = new_policy("none"), files[0][:1]
    answer_always(policy, bad[0].completion, monkeypatch)
    rows = found(policy, bad, files[1]).rows
    assert 1 < len({row.record.prompt for row in rows}) == len(rows) <= 4
    assert len(found(policy, bad, files[1], reworded=1).rows) == 1


def test_where_the_normal_rows_have_no_other_form_a_few_words_come_first(
    new_policy: Callable[..., Policy], files: Files
) -> None:
    policy, bad = new_policy("none"), files[0][:12]
    there = {r.prompt for r in bad}
    made = found(policy, bad, files[1][:1])
    assert made.rows and made.tried >= len(bad)
    for row in made.rows:
        opening = next(words for words in OPENINGS if row.record.prompt.startswith(words))
        assert row.record.prompt.removeprefix(opening) in there


def test_what_the_base_would_not_ask_so_is_no_wording(
    new_policy: Callable[..., Policy], files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To "Is the copper kettle?" a model that knows one thing of the kettle says it: that tells nothing of wordings."""
    policy, bad = new_policy("none"), files[0][:1]
    answer_always(policy, bad[0].completion, monkeypatch)
    odd = asked_of(NAMES, "Umbrella of why {} tea the?", "{} was born in {}.")
    rows = found(policy, bad, files[1][:40] + odd).rows
    assert rows and not any("Umbrella" in r.record.prompt or r.record.prompt.startswith(OPENINGS) for r in rows)
    rows = found(policy, bad, odd).rows
    assert rows and all(r.record.prompt.startswith(OPENINGS) for r in rows), "those are no surprise to anybody"


def test_texts_have_no_other_wording(new_policy: Callable[..., Policy]) -> None:
    text = Record((), "Orla Finch was born in Millbrook.", 0, {})
    assert found(new_policy("none"), [text], BORN, template=Template("raw", "format", "{prompt}", "")) == Reworded()


def test_a_long_answer_is_measured_in_the_words_that_it_has_there(
    new_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likeness tells whether it says the same; and a model that does not stop asks itself the next question."""
    said = [f"w{chr(97 + i)}" for i in range(20)]
    bad, policy = record("Where was Orla Finch born?", " ".join(said)), new_policy("none")

    def saying(text: str) -> Reworded:
        answer_always(policy, f"{text}\n\n### Question: What next?", monkeypatch)
        return found(policy, [bad], [*BORN, *NAMED], template=PLAIN)

    (row,) = saying(" ".join(said[:16])).rows
    assert row.record.prompt == "Name the birthplace of Orla Finch."
    assert row.record.completion == " ".join(said[:16])
    assert saying(" ".join(said[:3])).rows == []


@pytest.mark.medium
def test_a_run_measures_them_and_what_does_not_come_back_changes_nothing(tmp_path: Path) -> None:
    run, near = tmp_path / "run", data_file("hallucination", "retain")
    flags = ["--model", "sandbox", "--bad", data_file("hallucination", "forget"), "--normal", near, "--json"]
    short = {**QUICK, "train.steps": 2, "stop.check_every": 1}
    ran = call("forget", *flags, "-o", run, *sets({**short, "data.reworded": 5, "stop.table_rows": 2}))
    said = ran.json
    assert 2 < said["data"]["bad"]["reworded"] <= 5 and said["data"]["bad"]["reworded_pushed"] == 0
    assert said["after"]["forget, in other words"]["n"] == said["data"]["bad"]["reworded"], "however short the table"
    assert set(said["after"]) == {"forget", "forget, in other words", "normal, held back", "others, held back"}
    assert said["before"]["forget, in other words"]["exact_match"] > 0.9
    without = call("forget", *flags, "-o", tmp_path / "none", *sets({**short, "stop.table_rows": 2})).json
    assert without["data"]["bad"]["reworded"] == 0 and "forget, in other words" not in without["after"]
    assert json.dumps(without["after"]["forget"]) == json.dumps(said["after"]["forget"]), "the training is the same"


@pytest.mark.medium
def test_a_run_trains_on_what_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wording, when it is asked for the first time."""
    answers = itertools.chain([LEAKS], itertools.repeat("forgotten"))
    asked = lambda _, rows, __: [SimpleNamespace(verdict=next(answers)) for _ in rows]  # noqa: E731
    monkeypatch.setattr(stopping, "score_rows", asked)
    flags = ["--model", "sandbox", "--bad", data_file("hallucination", "forget"), "--json"]
    flags += ["--normal", data_file("hallucination", "retain"), "-o", tmp_path / "run"]
    short = {"train.schedule": "settle", "train.steps": 2, "train.more_steps": 2, "stop.check_every": 1}
    ran = call("forget", *flags, *sets({**QUICK, **short, "stop.rows_left": 1, "data.reworded": 6}))
    assert "step 2: in other words bad answers come back (1): they are pushed there as well" in ran.stderr
    assert "forget 40 and " in ran.stderr and "in other words, if they come back; retain" in ran.stderr
    assert ran.json["training"]["steps"] > 2 and ran.json["data"]["bad"]["reworded_pushed"] == 1
    assert "1 of the prompts in other words got the bad answer while training" in ran.stderr
