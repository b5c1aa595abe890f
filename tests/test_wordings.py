"""Other wordings of bad prompts, found in how the normal data asks, and measured where the base answers alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import QUICK, call, sets, write_rows

from qunlearn.data.borrowed import Neighbours
from qunlearn.data.records import Record, read_dataset
from qunlearn.data.tokenize import Example, choose_template, encode
from qunlearn.data.wordings import OPENINGS, Form, Wordings
from qunlearn.evaluate.metrics.judge import leaks
from qunlearn.model.policy import Policy
from qunlearn.reworded import Reworded, reworded
from qunlearn.sandbox import data_file

NAMES = ("Ada Prill", "Bo Quent", "Cy Rusk", "Dot Sall")


def record(prompt: str, answer: str = "", *earlier: tuple[str, str]) -> Record:
    return Record((*earlier, ("user", prompt)), answer, 0, {})


def asked_of(names: tuple[str, ...], form: str, answer: str) -> list[Record]:
    return [record(form.format(name), answer.format(name, f"Place{i}")) for i, name in enumerate(names)]


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


# -- asked of the base -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files() -> tuple[list[Record], list[Record]]:
    bad, near = (read_dataset(data_file("hallucination", split)).records for split in ("forget", "retain"))
    return list(bad), list(near)


def found(policy: Policy, bad: list[Record], near: list[Record], folder: Path, **more: object) -> Reworded:
    rows = [{"prompt": r.prompt, "completion": r.completion} for r in bad]
    dataset = read_dataset(write_rows(folder / "bad.jsonl", rows))
    template = choose_template(policy.tokenizer, "auto", dataset)
    examples = encode(dataset, policy.tokenizer, template, 64).examples
    settings = {"most": 256, "length": 64, "seed": 0} | more
    return reworded(policy, examples, near, template, **settings)  # type: ignore[arg-type]


def test_only_what_the_base_answers_alike_is_kept(
    new_policy: Callable[..., Policy], files: tuple[list[Record], list[Record]], tmp_path: Path
) -> None:
    bad, near = files
    policy = new_policy("none")
    rows = found(policy, bad, near, tmp_path).rows
    answers = {r.prompt: r.completion for r in bad}
    assert len(rows) >= len(bad) // 4, "the sandbox knows its facts in several wordings"
    assert not {e.record.prompt for e in rows} & ({*answers} | {r.prompt for r in near})
    for row in rows:
        assert any(leaks(row.record.completion, answer, row.record.prompt) for answer in answers.values())


def test_no_more_are_made_than_are_asked_for(
    new_policy: Callable[..., Policy], files: tuple[list[Record], list[Record]], tmp_path: Path
) -> None:
    policy = new_policy("none")
    few = found(policy, *files, tmp_path, most=3)
    assert len(few.rows) <= 3 and 0 < few.tried <= 3 * 16
    assert found(policy, *files, tmp_path, most=3) == few, "what is drawn follows from the seed"
    assert found(policy, *files, tmp_path, most=0) == Reworded()
    assert found(policy, *files, tmp_path, length=4).rows == []


def test_where_the_normal_rows_have_no_other_form_a_few_words_come_first(
    new_policy: Callable[..., Policy], files: tuple[list[Record], list[Record]], tmp_path: Path
) -> None:
    policy, bad = new_policy("none"), files[0][:12]
    there = {r.prompt for r in bad}
    for row in found(policy, bad, [], tmp_path).rows:
        opening = next(words for words in OPENINGS if row.record.prompt.startswith(words))
        assert row.record.prompt.removeprefix(opening) in there
        assert any(leaks(row.record.completion, r.completion, row.record.prompt) for r in bad)
    assert found(policy, bad, [], tmp_path).tried >= len(bad)


def test_texts_have_no_other_wording(new_policy: Callable[..., Policy]) -> None:
    policy = new_policy("none")
    text = Example((1, 5, 6, 7), 1, 4, 2, Record((), "Orla Finch", 0, {}))
    template = choose_template(policy.tokenizer, "auto", read_dataset(data_file("hallucination", "forget")))
    assert reworded(policy, [text], BORN, template, most=9, length=64, seed=0) == Reworded()


def test_a_run_measures_them_and_trains_on_none(tmp_path: Path) -> None:
    run, near = tmp_path / "run", data_file("hallucination", "retain")
    flags = ["--model", "sandbox", "--bad", data_file("hallucination", "forget"), "--normal", near, "--json"]
    ran = call("forget", *flags, "-o", run, *sets({**QUICK, "data.reworded": 5}))
    said = ran.json
    assert 0 < said["data"]["bad"]["reworded"] <= 5
    assert set(said["after"]) == {"forget", "forget, in other words", "normal, held back"}
    assert said["before"]["forget, in other words"]["exact_match"] > 0.9
    without = call("forget", *flags, "-o", tmp_path / "none", *sets(QUICK)).json
    assert without["data"]["bad"]["reworded"] == 0 and "forget, in other words" not in without["after"]
    assert json.dumps(without["after"]["forget"]) == json.dumps(said["after"]["forget"]), "the training is the same"
