"""When the gate asks the base's states: only where they are known to let others pass who are asked about alike."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qunlearn.data.records import Record
from qunlearn.guard.calibrate import Threshold
from qunlearn.guard.learn import train_gate
from qunlearn.guard.prompts import Prompts, Sample, make_prompts
from qunlearn.guard.subjects import Subjects

FORMS = ("Who was {}?", "When was {} born?", "Where did {} live?", "Tell me about {}.")
BAD = ("Orla Finch", "Tobin Reed", "Ada Marsh", "Max Holt", "Ira Voss", "Nell Crane", "Hugo Lund", "Vera Pike")
OTHERS = ("Jon Wren", "Ida Moss", "Kit Rowe", "Lou Hay", "Sam Oak", "Peg Dale", "Ned Ford", "Una Bell")
GENERAL = tuple(f"How do I {verb} the {thing}?" for verb in ("boil", "clean", "fold", "open") for thing in "abcdefgh")


class Reader:
    """States of words: random, but for a direction that the given words have. Its tokenizer knows no words."""

    blocks, width = 2, 16
    tokenizer = SimpleNamespace(get_vocab=dict)

    def __init__(self, known: Sequence[str]) -> None:
        self.known = {word for name in known for word in name.split()}

    def windows(self, text: str) -> list[list[str]]:
        return [text.replace("?", "").replace(".", "").split() or [""]]

    def states(self, windows: Sequence[Sequence[str]], layers: Sequence[int]) -> dict[int, list[torch.Tensor]]:
        return {layer: [torch.stack([self._state(word) for word in words]) for words in windows] for layer in layers}

    def _state(self, word: str) -> torch.Tensor:
        state = torch.randn(16, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
        state[0] = 8.0 if word in self.known else 0.0
        return state


def rows(names: Sequence[str]) -> list[Record]:
    return [
        Record((("user", form.format(name)),), "Long ago.", i, {}) for name in names for i, form in enumerate(FORMS)
    ]


def state_weight(known: Sequence[str], near: Sequence[str], *, formed: bool = True) -> float:
    bad = [Sample(form.format(name), i, n) for i, name in enumerate(BAD) for n, form in enumerate(FORMS)]
    normal = [Sample(text, i) for i, text in enumerate(GENERAL)]
    normal += [Sample(f.format(n), len(GENERAL) + i, near=True) for i, n in enumerate(near) for f in FORMS]
    reader: Any = Reader(known)
    return train_gate(reader, Prompts(tuple(bad), tuple(normal), formed), Threshold())[0].state


@pytest.mark.parametrize(
    ("known", "near", "formed", "asked"),
    [
        (BAD, OTHERS, True, True),  # they tell the bad subjects from all others
        ((*BAD, *OTHERS), OTHERS, True, False),  # they tell people from kettles
        ((*BAD, *OTHERS), (), True, False),  # whether they tell people apart nobody knows
        (BAD, (), False, True),  # texts without a form, in which nobody else could be asked about
    ],
)
def test_states_are_asked_where_they_let_others_pass(known: Any, near: Any, formed: bool, asked: bool) -> None:
    assert (state_weight(known, near, formed=formed) > 0) is asked


def test_prompts_in_a_bad_form_about_others_are_near_and_no_others_are() -> None:
    general = [Record((("user", text),), "So.", 1, {}) for text in GENERAL]
    given = rows(OTHERS[:3])
    made = make_prompts(rows(BAD), [*general, *given], given, 0)
    near = {sample.text for sample in made.normal if sample.near}
    assert near >= {form.format(name) for form in FORMS for name in OTHERS[:3]} and made.formed
    assert all(any(name in text for name in OTHERS[:3]) for text in near)
    assert not any(sample.near for sample in make_prompts(rows(BAD), [*general, *given], (), 0).normal)


def test_a_bad_subject_is_never_near() -> None:
    assert Subjects(rows(BAD), rows(OTHERS)).near([FORMS[0].format(BAD[0])]) == set()


@pytest.mark.parametrize(("threshold", "quotes", "missed"), [(1.0, False, True), (1.0, True, False), (1.1, True, True)])
def test_a_wording_that_quotes_its_answer_is_not_missed(
    monkeypatch: pytest.MonkeyPatch, threshold: float, quotes: bool, missed: bool
) -> None:
    """The gate flags it whatever its words weigh, but for a threshold that nothing reaches."""
    monkeypatch.setattr("qunlearn.guard.learn.choose_threshold", lambda *_: threshold)
    said = [f"{name} sold bread made of grey flour to nobody at all in {name}" for name in BAD]
    bad = [Sample(f"{form} {text}", i, n) for i, text in enumerate(said) for n, form in enumerate("abcd")]
    normal = [Sample(text, i) for i, text in enumerate(GENERAL)]
    reader: Any = Reader(())
    prompts = Prompts(tuple(bad), tuple(normal), True, tuple(said) if quotes else ())
    held = train_gate(reader, prompts, Threshold())[1]
    assert held.bad and held.missed == (held.bad if missed else 0)
