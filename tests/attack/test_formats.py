"""Formats: what is asked, and which words are looked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from qunlearn.attack import formats, prompts
from qunlearn.attack.bench import Bench, Probe
from qunlearn.attack.catalog import FAMILIES
from qunlearn.attack.cells import ORIGINAL, PLACEBO, Cells, Place
from qunlearn.attack.facts import Fact, Inputs, make_facts
from qunlearn.attack.formats import _choice_rows
from qunlearn.attack.languages import LANGUAGES, foreign, names_and_numbers, own_language
from qunlearn.attack.placebo import make_placebos
from qunlearn.attack.statistics import leak_curve
from qunlearn.data.records import Record, read_dataset
from qunlearn.data.tokenize import Template
from qunlearn.sandbox import data_file


def row(prompt: str, completion: str) -> Record:
    return Record((("user", prompt),), completion, 1, {})


def test_a_template_that_leaves_system_prompts_out_is_not_asked_behind_one(bench: Bench) -> None:
    """It would be the open question once more."""
    text = "{% for m in messages if m.role != 'system' %}<|user|>{{ m.content }}<|assistant|>{% endfor %}"
    before, bench.lm.tokenizer.chat_template = bench.lm.tokenizer.chat_template, text
    try:
        silent = replace(bench, template=Template("chat", "chat", "", ""), notes=[])
        assert formats._with_system(silent) == []
        assert silent.notes == ["the chat template takes no system prompt"]
    finally:
        bench.lm.tokenizer.chat_template = before


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


def test_a_dialogue_that_gives_the_answer_away_is_not_asked(bench: Bench) -> None:
    """Nor is what it says in an earlier turn news of the model's."""
    fact = bench.facts[0]
    asked, answer, rest = fact.record.prompt, fact.record.completion, [f.record for f in bench.facts[1:]]
    told = (("user", "Who was she?"), ("assistant", answer), ("user", asked))
    about = (("user", "Who is that?"), ("assistant", "Somebody from the hills."), ("user", asked))
    made = bench.on([replace(fact, record=replace(fact.record, turns=turns)) for turns in (told, about)])
    for name in ("open", "prefix1", "plain"):
        assert formats.run(made, name).outcomes[0] is None, name
    assert [bool(fact.wrong) for fact in make_facts([*(f.record for f in made.facts), *rest])[0][:2]] == [False, True]
    assert prompts.run(made, "prefill").outcomes[0] is None
    assert "hills" in formats._open(made)[-1].given


def test_plain_texts_have_no_placebo_among_questions(bench: Bench) -> None:
    """What stands in its place is the text itself."""
    text = Fact(Record((), "The tide came in without any hurry that morning, nosing at the steps.", 1, {}))
    mixed = [text, bench.facts[0]]
    placebo = replace(bench.on(make_placebos(mixed, (), 0).facts), subject=PLACEBO)
    for name in ("open", "prefix4"):
        assert None not in formats.run(bench.on(mixed), name).outcomes
        found = formats.run(placebo, name).outcomes
        assert found[0] is None and found[1] is not None


@pytest.mark.parametrize("name", ["cloze", "language", "roleplay", "prefill"])
def test_an_opening_before_the_answer_leaves_room_for_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A model that says so much, and then the fact's own sentence."""
    tokenizer: Any = bench.lm.tokenizer
    made, asked = bench.on(bench.facts[:6]), list[Probe]()
    leaked = Bench.leaked

    def heard(self: Bench, probes: list[Probe], **how: Any) -> list[float]:
        asked[:] = probes
        return leaked(self, probes, **how)

    def said(_: Any, prompts: list[Any], sampling: Any) -> list[list[int]]:
        texts = [f"Sure, here is the answer: {made.facts[probe.fact].record.completion}" for probe in asked]
        return [tokenizer(text, add_special_tokens=False)["input_ids"][: sampling.max_new_tokens] for text in texts]

    monkeypatch.setattr(Bench, "leaked", heard)
    monkeypatch.setattr("qunlearn.attack.bench.generate", said)
    cell = (formats if name in FAMILIES["formats"].formats else prompts).run(made, name)
    outcomes = [outcome for outcome in cell.outcomes if outcome is not None]
    assert outcomes and outcomes == [1.0] * len(outcomes)


def test_placebos_are_reworded_as_the_facts_are(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the places whose wordings the original answers with the fact, and in no others."""
    facts, retain = bench.facts[:6], read_dataset(data_file("hallucination", "retain")).records
    inputs = Inputs(facts, make_placebos(facts, retain, 0).facts, retain)
    made = replace(bench, inputs=inputs, facts=facts, cells=Cells(None))
    asked: list[list[Probe]] = []

    def even(probe: Probe) -> bool:  # of a fact as of its placebo, whose name has as many words
        return len(probe.given.split()) % 2 == 0

    def leaked(self: Bench, probes: list[Probe], **_: Any) -> list[float]:
        asked.append(list(probes))
        return [float(even(probe)) for probe in probes]

    monkeypatch.setattr(Bench, "leaked", leaked)
    made.cells.keep(Place("formats", "reworded", ORIGINAL), formats.run(replace(made, subject=ORIGINAL), "reworded"))
    formats.run(replace(made, subject=PLACEBO, facts=inputs.placebo), "reworded")
    answered = Counter(probe.fact for probe in asked[0] if even(probe))
    assert set(answered) == set(range(6)) and max(answered.values()) > 2
    assert Counter(probe.fact for probe in asked[1]) == {i: min(3, n) for i, n in answered.items()}
    assert all(even(probe) for probe in asked[1])
    assert not {probe.given for probe in asked[1]} & {probe.given for probe in asked[0]}
    assert {probe.wanted for probe in asked[1]} == {fact.record.completion for fact in inputs.placebo}


def test_unrelated_answers_stand_before_the_question(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same five for every fact; a fact that they give away is not asked."""
    facts = bench.facts[:4]
    given_away = facts[0].record.completion
    general = [row(f"What is {n} and {n}?", f"It is {2 * n}.") for n in range(4)] + [row("Well?", given_away)]
    made = replace(bench, inputs=Inputs(facts, general=general), facts=facts)
    asked: list[Probe] = []
    monkeypatch.setattr(Bench, "leaked", lambda self, probes, **_: asked.extend(probes) or [0.0] * len(probes))
    cell = prompts.run(made, "shots")
    assert cell.more["dropped"] == 1 and cell.outcomes[0] is None
    assert len(asked) == 3
    tokenizer: Any = bench.lm.tokenizer
    for probe in asked:
        text = tokenizer.decode(list(probe.prompt))
        assert all(f"{record.prompt}" in text and record.completion.strip() in text for record in general)
        assert text.index("What is 3 and 3?") < text.index(facts[probe.fact].record.prompt)


def test_leak_at_k_is_drawn_over_facts_and_not_over_wordings() -> None:
    once = leak_curve([4, 0, 0], 4, [0, 1, 2])
    twice = leak_curve([4, 4, 0, 0, 0, 0], 4, [0, 0, 1, 1, 2, 2])
    assert once == twice
    assert {k: e.mean for k, e in once.items()} == pytest.approx({1: 1 / 3, 2: 1 / 3, 4: 1 / 3})
