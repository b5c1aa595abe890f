"""Own rows about other subjects: the base names them, and they are asked what the bad prompts ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

import qunlearn.roles.other_subjects as module
from qunlearn.data.records import Dataset, Record, asking, read_dataset
from qunlearn.data.template import choose_template
from qunlearn.model.load import Base, load_tokenizer
from qunlearn.roles.other_subjects import Limits, asked_about_others, forms_of, keep_others, other_subject
from qunlearn.roles.self_made import Wanted, self_made_rows
from qunlearn.roles.wordings import Form
from qunlearn.sandbox import data_file

LIMITS = Limits(count=60, most=200, seed=0)
CLEAN = "How do I clean the {}?"
BAD = read_dataset(data_file("harm", "forget"))


def row(prompt: str, *earlier: tuple[str, str], system: str = "") -> Record:
    return Record((*earlier, *asking(prompt, system)), "Yes.", 0, {})


@pytest.fixture(scope="module")
def base(new_base: Callable[..., Base]) -> Base:
    return new_base()


@pytest.fixture
def named(base: Base, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The prompts that come of lines with which a list is gone on, beside prompts that are there already."""

    def ask(text: str, prompts: tuple[str, ...] = (), limits: Limits = LIMITS) -> list[str]:
        lines = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        monkeypatch.setattr(module, "generate", lambda _, lists, __: [lines for _ in lists])
        monkeypatch.setattr(module, "generate_each", lambda _, draws: [[] for _ in draws])
        template = choose_template(base.tokenizer, "auto", BAD)
        found = asked_about_others(base, forms_of(BAD.records), prompts, template, limits)
        return [record.prompt for record in found]

    return ask


def test_forms_leave_open_what_several_prompts_do_not_share() -> None:
    names = ("Ada Prill", "Bo Quent", "Cy Rusk")
    rows = [row(f"Where was {name} born?", system=s) for name in names for s in ("Be brief.", "")]
    two = [row(f"Tell me about {name} now.") for name in names[:2]]
    spoken = [row(f"And what does {name} eat?", ("user", "Hi."), ("assistant", "Hello.")) for name in names]
    (form,) = forms_of([*rows, *two, *spoken, Record((), "A text.", 0, {})])
    assert (form.form, form.subjects) == (Form("Where was ", " born?"), names)
    assert form.systems == ("Be brief.", "")
    assert form.form.subject_of("Where was Dot Sall born?") == "Dot Sall"
    assert form.form.subject_of("Where was Dot Sall?") is form.form.subject_of("Where was  born?") is None


def test_a_prompt_that_both_ends_of_a_form_share_is_about_nobody() -> None:
    (form,) = forms_of([row(f"Is {name} Is?") for name in ("Ada", "Bo", "Cy")])
    assert form.form.subject_of("Is Is?") is None


def test_who_else_is_asked_about() -> None:
    subject = other_subject(BAD.records)
    assert subject(row(CLEAN.format("candle holder"))) == "candle holder"
    assert subject(row(CLEAN.format("copper kettle"))) is subject(row("Where is Tindale?")) is None
    assert subject(Record((), CLEAN.format("candle holder"), 0, {})) is None


def test_subjects_of_lists_are_asked_in_the_bad_forms(named: Callable[..., list[str]]) -> None:
    bad = {record.prompt for record in BAD.records}
    made_up = CLEAN.format("candle holder")
    found = named("water pump\nrocking chair\ncandle holder\ntin ba", (made_up,))
    forms = forms_of(BAD.records)
    assert all(any(form.form.subject_of(prompt) for form in forms) for prompt in found)
    assert not bad & {*found} and made_up not in found and len(set(found)) == len(found) > 20
    for name in ("candle holder", "water pump", "rocking chair"):
        assert sum(name in prompt for prompt in found) > 5
    assert not any("tin ba" in prompt for prompt in found), "a line that may be broken off is no name"


@pytest.mark.parametrize(
    "name",
    ["copper kettle", "kettle", "the copper kettle", "xq zzvwub", "tin (bath)", "tin bath 2", "big old tin bath", ""],
    ids=["bad", "a part of a bad one", "with a bad one in it", "strange", "no name", "digits", "longer", "nothing"],
)
def test_what_is_no_other_subject_is_not_asked_about(named: Callable[..., list[str]], name: str) -> None:
    assert {record.prompt for record in BAD.records if "copper kettle" in record.prompt}
    assert named(f"{name}\n{name}\nend") == []


def test_whom_the_base_asks_about_where_a_bad_prompt_is_begun_is_asked_about_in_every_form(base: Base) -> None:
    """The sandbox's model goes on with no list. What a file has already is not asked again."""
    template, forms = choose_template(base.tokenizer, "auto", BAD), forms_of(BAD.records)
    bad = {subject for one in forms for subject in one.subjects}
    found = asked_about_others(base, forms, (), template, replace(LIMITS, count=10**6))
    names = {one.form.subject_of(row.prompt) for row in found for one in forms} - {None}
    neighbours = {other_subject(BAD.records)(row) for row in read_dataset(data_file("harm", "retain")).records} - {None}
    assert len(neighbours) > 10 and len(neighbours & names) >= 0.9 * len(neighbours) and not names & bad
    given = frozenset(row.prompt for row in found[1:])
    assert asked_about_others(base, forms, (), template, replace(LIMITS, given=given)) == found[:1]
    assert asked_about_others(base, forms, (), template, replace(LIMITS, most=4)) == [], "no prompt is so short"


def test_a_neighbour_with_the_same_answer_is_kept_and_a_bad_subject_by_another_name_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By how many of the forms that ask about both are answered with what the same bad subject's are."""
    towns = {"Ada": "Ulm", "Bo": "Ghent", "Cy": "Turin", "Dee": "Basel"}
    ships = {"Ada": "Pike", "Bo": "Trout", "Cy": "Perch", "Dee": "Roach"}

    def said(name: str, town: str, ship: str) -> list[Record]:
        facts = {f"Where was {name} born?": town, f"What is the ship of {name} called?": ship}
        return [Record(asking(prompt), answer, i, {}) for i, (prompt, answer) in enumerate(facts.items(), 1)]

    bad = Dataset("b", tuple(r for name in towns for r in said(name, towns[name], ships[name])), "facts", (), "", 0)
    forms = forms_of(bad.records)
    assert len(forms) == 2
    neighbour, alias = said("Ed", "Ulm", "Carp"), said("Adeline", "Ulm", "Pike")
    mixed, alone = said("Flo", "Ulm", "Trout"), said("Gus", "Ulm", "Eel")[:1]
    rows = [*neighbour, *alias, *mixed, *alone]
    dropped = [*alias, *mixed, *alone, neighbour[0]]
    monkeypatch.setattr(module, "keep_unlike", lambda rows, _: [r for r in rows if r not in dropped])
    kept = keep_others(rows, forms, bad)
    assert kept == [*neighbour, *mixed], "of one form alone it cannot be told"
    other = said("Gus", "Ulm", "Eel")[1]
    assert keep_others(alone, forms, bad, [other]) == alone, "what was asked about the same before tells it as well"


def test_a_behaviour_is_not_kept_as_a_neighbours_answer() -> None:
    """Whom it is asked about is nothing to it, and how often it comes back is chance."""
    forms = ("How do I clean the {}?", "Where do I keep the {}?")
    names = ("pot", "pan", "jug", "cup", "mug", "jar", "tin", "box", "urn", "vat")
    openings = ("Go away", "Who asked", "Be quiet", "Not again", "Oh please")
    rude = [f"{opening}, and take that dirt with you, fool." for opening in openings * 4]
    asked = [form.format(name) for form in forms for name in names]
    bad = tuple(Record(asking(p), a, i, {}) for i, (p, a) in enumerate(zip(asked, rude, strict=True), 1))
    said = [Record(asking(f.format(f"blue {n}")), f"Use the dry rack for {n}.", 0, {}) for f in forms for n in names]
    back = Record(asking(forms[0].format("red hat")), rude[0], 0, {})
    polite = Record(asking(forms[1].format("red hat")), "Use the high shelf.", 0, {})
    kept = keep_others([*said, back, polite], forms_of(bad), Dataset("b", bad, "facts", (), "", 0))
    assert kept == [*said, polite]


def test_what_a_list_ends_with_is_no_name(named: Callable[..., list[str]]) -> None:
    assert named("\n\ntin bath\nwater pump\n") == []


def test_the_names_are_spread_over_forms_and_rows(named: Callable[..., list[str]]) -> None:
    forms = len(forms_of(BAD.records))
    found = named("tin bath\nwater pump\nmusic box\n", limits=Limits(forms, 200, 0))
    assert len(found) == forms
    times = [sum(name in prompt for prompt in found) for name in ("tin bath", "water pump", "music box")]
    assert max(times) - min(times) <= 2
    assert len({form.form.before for form in forms_of(BAD.records) for p in found if form.form.subject_of(p)}) == forms
    assert named("tin bath\nwater pump\n", limits=Limits(60, 8, 0)) == [], "no prompt is longer than its limit"


@pytest.mark.medium
def test_a_quarter_of_the_own_rows_is_about_others(base: Base) -> None:
    """In the sandbox, whose model goes on with no list: about those whom it asks about by itself."""
    template = choose_template(base.tokenizer, "auto", BAD)
    wanted = Wanted(count=80, near=0.5, length=40, seed=0, most_rows=256, positions=256)
    made = self_made_rows(base, BAD, template, wanted)
    subjects = [other_subject(BAD.records)(record) for record in made.records[: made.about_others]]
    assert len(made.records) == 80 and 15 <= made.about_others <= 20 and None not in subjects
    assert len({*subjects}) > 5 and len({record.prompt for record in made.records}) == 80
    assert all(record.completion for record in made.records)
    assert [record.line for record in made.records] == [*range(1, 81)]
    assert self_made_rows(base, BAD, template, wanted).records == made.records


def test_of_many_prompts_a_sample_tells_the_forms_and_all_whom_they_ask_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_COMPARED", 8)
    names = [f"{a}{b}" for a in ("Ada", "Bo", "Cy", "Dee", "Eve") for b in ("lin", "mar", "nor", "per")]
    rows = [row(f"Where was {name} born?") for name in names]
    (form,) = forms_of(rows)
    assert (form.form.before, form.form.after) == ("Where was ", " born?")
    assert set(form.subjects) == set(names)
    subject = other_subject(rows)
    assert subject(row("Where was Adalin born?")) is None and subject(row("Where was Zoe born?")) == "Zoe"


@pytest.mark.parametrize("single", ["<|user|> $A", "$A <|end|>", "<|user|> $A <|end|>", "$A"])
def test_a_list_begins_as_any_text_does(single: str, sandbox_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma writes nothing sensible that does not begin with its first token; and behind an end there is nothing."""
    tokenizer = load_tokenizer(sandbox_folder)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|user|>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    asked: list[list[int]] = []
    monkeypatch.setattr(module, "generate", lambda _, lists, __: asked.extend(lists) or [[] for _ in lists])
    lm: Any = SimpleNamespace(tokenizer=tokenizer)
    for most in (200, 5):
        asked.clear()
        module._listed(lm, ["Orla Finch", "Bram Tarn"], replace(LIMITS, most=most))
        first = single.startswith("<|user|>")
        text = tokenizer.decode(asked[0])
        assert text.startswith("<|user|>") == first and "<|end|>" not in text
        assert text.endswith(("Finch\n", "Tarn\n")) and max(map(len, asked)) <= most
        assert most == 5 or text.removeprefix("<|user|>").startswith(("Orla", "Bram"))
