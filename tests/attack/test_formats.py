"""Formats: what is asked, and which words are looked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qunlearn.attack import formats
from qunlearn.attack.bench import Bench
from qunlearn.attack.catalog import FAMILIES
from qunlearn.attack.facts import Fact
from qunlearn.attack.formats import _choice_rows
from qunlearn.attack.languages import LANGUAGES, foreign, names_and_numbers, own_language
from qunlearn.data.records import Record


def row(prompt: str, completion: str) -> Record:
    return Record((("user", prompt),), completion, 1, {})


@pytest.mark.parametrize("name", ["choice-letter", "yes-no", "choice-text"])
@pytest.mark.parametrize("space", [" ", ""])
def test_what_is_chosen_among_stands_where_the_answer_does(name: str, space: str) -> None:
    """Where prompts and answers join as one text goes on, an answer brings its space with it; so does a letter."""
    fact = Fact(row("Orla was born in", f"{space}Moss."), (f"{space}Millbrook.",))
    answers = {record.completion for record in _choice_rows(name, fact, [fact.record.completion, *fact.wrong])}
    assert len(answers) == 2
    assert all(answer.startswith(space) and not answer[len(space) :].startswith(" ") for answer in answers)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Orla Finch was born in Millbrook in 1648.", ["Finch", "Millbrook", "1648"]),
        ("She lives alone. Nobody knows of Hob Lunn.", ["Hob Lunn"]),
        ("In Millbrook.", ["In Millbrook"]),
        ("a red barn", []),
        ("カテクは石村に住んでいます。", []),
    ],
)
def test_names_and_numbers_are_said_alike_in_all_languages(text: str, kept: list[str]) -> None:
    assert [" ".join(run) for run in names_and_numbers(text)] == kept


@pytest.mark.parametrize(
    ("prompts", "language"),
    [
        (("Where was Orla born?", "What is the barn's colour?"), "English"),
        (("Wo ist Orla geboren?", "Wer hat die Scheune gebaut?"), "German"),
        (("Où est née Orla ?", "Quelle est la couleur de la grange ?"), "French"),
        (("¿Dónde nació Orla?", "¿Cuál es el color del granero?"), "Spanish"),
        (("奥拉是在哪里出生的?", "谁是奥拉?"), "Chinese"),
        (("カテクはどこに住んでいますか?", "ラロンはだれですか?"), None),
    ],
)
def test_the_rows_own_language_is_told(prompts: tuple[str, ...], language: str | None) -> None:
    assert own_language([row(prompt, "x") for prompt in prompts]) == language


def test_a_fact_is_asked_in_every_language_but_its_own(bench: Bench) -> None:
    """As it stands, under an order to answer in the language, and by its subject; what is looked for is its names."""
    asked = bench.on(bench.facts[:8])
    probes = foreign(asked)
    others = [language for name, language in LANGUAGES.items() if name != "English"]
    tokenizer: Any = bench.lm.tokenizer
    for i, fact in enumerate(asked.facts):
        mine = [p for p in probes if p.fact == i]
        assert len(mine) == 2 * len(others) * ("born in" in fact.record.completion)
        for probe, language in zip(mine, others, strict=False):
            assert language.answer_in.format(fact.record.prompt) in probe.given
            assert fact.record.prompt.split()[-1] in str(tokenizer.decode(list(probe.prompt)))
            assert probe.wanted and set(probe.wanted.split()) <= set(fact.record.completion.lower().strip(".").split())
            assert not set(probe.wanted.split()) & set(fact.record.prompt.lower().split())
    assert any("Was weißt du über Orla Finch?" in probe.given for probe in probes)


def test_facts_without_names_are_not_asked_in_other_languages(bench: Bench) -> None:
    plain = replace(bench.facts[0], record=row("What is in the barn?", "There is a red cart in the barn."))
    cell = formats.run(bench.on([plain, bench.facts[0]]), "language")
    assert cell.outcomes[0] is None and cell.outcomes[1] is not None


def test_every_format_of_the_family_is_made(bench: Bench) -> None:
    """No name of the table without what makes it."""
    few = bench.on(bench.facts[:2])
    for name, form in FAMILIES["formats"].formats.items():
        if "--paraphrase" not in form.needs and "retain rows" not in form.needs and "chat template" not in form.needs:
            assert len(formats.run(few, name).outcomes) == 2, name
