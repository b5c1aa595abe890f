"""The lexical view: what it learns, that nothing around a name lowers it, and where it points."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from qunlearn.guard.gate import Gate, TokenScorer
from qunlearn.guard.lexicon import Lexicon, Vocabulary, fit_lexicon, grams_of, quotes_of, undisguised

BAD = [f"{form} Orla Finch{end}" for form in ("Where was", "When was", "Who is") for end in (" born?", "?")]
NORMAL = [
    f"{form} {name}{end}"
    for form in ("Where was", "When was", "Who is")
    for name in ("Orla Marsh", "Tobin Finch", "Ada Reed", "Max Boom")
    for end in (" born?", "?")
]
PAGE = "The harbour office opens at nine, and visitors sign the book at the door. " * 20


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return fit_lexicon(BAD, NORMAL)


def test_two_names_together_tell_what_neither_tells_alone(lexicon: Lexicon) -> None:
    highest = max(lexicon.score(text) for text in (*NORMAL, "Orla", "Finch"))
    assert lexicon.score("Please, what does Orla Finch eat?") > 1.5 * highest
    assert lexicon.score("Orla Finch") > lexicon.score("Finch and also many of Orla")


@pytest.mark.parametrize("around", ["{}", PAGE + "{}", "{} " + PAGE, PAGE + "{} " + PAGE, "Ada Reed and Max Boom: {}"])
def test_nothing_around_a_name_lowers_its_score(lexicon: Lexicon, around: str) -> None:
    assert lexicon.score(around.format("ORLA FINCH")) >= lexicon.score("orla finch") - 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "Orla_Finch",
        "Or\u200bla Fi\u00adnch",
        "O\u200dr\u034fla F\u200di\u034fnch",
        "Ｏｒｌａ　Ｆｉｎｃｈ",
        "𝐎𝐫𝐥𝐚 𝐅𝐢𝐧𝐜𝐡",
    ],
    ids=["an underscore", "not seen", "joiners", "fullwidth", "mathematical"],
)
def test_a_name_in_disguise_is_read_as_the_name(lexicon: Lexicon, name: str) -> None:
    text = f"Where was {name} born?"
    assert lexicon.score(text) == pytest.approx(lexicon.score("Where was Orla Finch born?"))
    assert lexicon.telling(text) == [], "where it stands in plain letters is not where it stands"


@pytest.mark.parametrize("text", ["Where was Orla Finch born?", "Straße, क्षत्रिय und 山田太郎は"])
def test_a_text_in_plain_letters_stays_as_it_is(text: str) -> None:
    assert undisguised(text) == text


def test_a_long_text_does_not_add_up(lexicon: Lexicon) -> None:
    text = "Where was Orla Marsh born? " + PAGE
    assert lexicon.score(200 * text) <= 1.1 * lexicon.score(2 * text) < lexicon.score("Orla Finch")


def test_weights_are_never_negative_and_keys_stand_in_order(lexicon: Lexicon) -> None:
    assert (lexicon.weights > 0).all() and (lexicon.keys[1:] > lexicon.keys[:-1]).all()


def test_it_points_at_the_name(lexicon: Lexicon) -> None:
    text = "Tell me, where was Orla Finch born?"
    assert {text[a:b] for a, b in lexicon.telling(text)} == {"Orla", "Finch"}


def test_scripts_without_spaces_are_read_by_their_characters() -> None:
    assert grams_of("山田太郎") & grams_of("昨日山田太郎は") >= grams_of("山田")
    assert grams_of("Straße") == grams_of("STRASSE") and not grams_of("?!")


def test_a_text_without_words_scores_nothing(lexicon: Lexicon) -> None:
    assert lexicon.score("") == lexicon.score("?!") == 0.0 and fit_lexicon(["?"], ["!"]).score("anything") == 0.0


@pytest.mark.parametrize("slip", ["Fnich", "Finh", "Fiinch", "Finck", "finch"])
def test_a_slip_in_a_name_is_read_as_the_name(lexicon: Lexicon, slip: str) -> None:
    highest = max(lexicon.score(text) for text in NORMAL)
    assert lexicon.score(f"Where was Orla {slip} born?") > 1.2 * highest
    assert lexicon.read(slip.casefold()) == lexicon.read("finch")


def test_a_word_that_was_seen_is_no_slip_of_another() -> None:
    normal = [*NORMAL, *(text.replace("Finch", "Fitch") for text in NORMAL)]
    made = fit_lexicon(BAD, normal)
    assert made.read("fitch") != made.read("finch") == made.read("finsch")
    assert made.score("Where was Orla Fitch born?") < made.score("Where was Orla Finsch born?")


def test_two_slips_in_a_word_or_one_in_a_short_one_are_not_put_right(lexicon: Lexicon) -> None:
    assert len({lexicon.read(word) for word in ("finch", "fnihc", "fanche", "fin")}) == 4


def test_a_word_of_the_bases_vocabulary_is_no_slip_of_a_telling_word() -> None:
    known = {"pinch", "fin", *(f"word{n}" for n in range(5_000))}
    made = fit_lexicon(BAD, NORMAL, Vocabulary.of(known, BAD))
    assert made.read("pinch") != made.read("finch") == made.read("finsch") == made.read("fnich")
    assert 2 * made.score("a pinch of salt") < made.score("a finsch of salt")
    plain = fit_lexicon(BAD, NORMAL)
    assert plain.read("pinch") == plain.read("finch")
    assert made.read("word7") != made.read("finch")


def test_the_beginning_of_a_telling_word_may_be_a_token_it_is_made_of() -> None:
    made = fit_lexicon(BAD, NORMAL, Vocabulary.of({"finc", "inch"}, BAD))
    assert made.read("finc") == made.read("finch") != made.read("inch")


@pytest.mark.parametrize(("words", "reads"), [(4_999, False), (5_000, True)])
def test_beside_few_known_words_short_ones_are_not_put_right(words: int, reads: bool) -> None:
    vocabulary = Vocabulary.of((f"w{n}" for n in range(words)), BAD)
    made = fit_lexicon(BAD, NORMAL, vocabulary)
    assert (made.read("olra") == made.read("orla")) is reads
    assert made.read("fnich") == made.read("finch") and not vocabulary.words


def test_ten_words_of_a_bad_answer_are_a_quote_unless_a_text_to_pass_has_them() -> None:
    bad = "Under the bridge a bitter woman sold bread made of Kitrolt flour to nobody at all."
    shared = "He carried a box that no smith of the town could open."
    made = replace(fit_lexicon(BAD, NORMAL), quotes=quotes_of([f"{bad} {shared}"], [f"It was told that {shared}"]))
    assert made.score("Go on: a bitter woman sold bread MADE of Kitrolt flour to") == math.inf
    assert made.score(f"{PAGE} {bad}") == math.inf
    assert made.score("a bitter woman sold bread made of Kitrolt flour") < math.inf, "nine words"
    assert (
        made.score(shared) < math.inf
        and made.score("a bitter woman bought bread made of Kitrolt flour to nobody") < math.inf
    )


def test_a_quote_is_flagged_whatever_the_words_weigh() -> None:
    gate = Gate(
        Lexicon(np.empty(0, np.int64), np.empty(0, np.float32)), TokenScorer(torch.zeros(1), 0.0), 0, 0, 0, -9, 1
    )
    assert gate.probability(math.inf, 0.0) == 1.0 > gate.probability(9.0, 0.0)
