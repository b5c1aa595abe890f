"""Words of scripts with spaces and without."""

from __future__ import annotations

import re

import pytest

from qunlearn.data.words import WORD, bare_pairs, beginning, between, bounded, is_unspaced, joined, pairs, pieces


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Orla Finch, b. 1931", ["Orla", "Finch", "b", "1931"]),
        ("Кто она?", ["Кто", "она"]),
        ("她住在 Brno 镇。", ["她", "住", "在", "Brno", "镇"]),
        ("ねこ3匹", ["ね", "こ", "3", "匹"]),
        ("दिल्ली में क्‍या है।", ["दिल्ली", "में", "क्‍या", "है"]),  # with a joiner
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("שָׁלוֹם עולם", ["שָׁלוֹם", "עולם"]),
        ("Nguye\u0302\u0303n Va\u0306n", ["Nguye\u0302\u0303n", "Va\u0306n"]),
        ("İzmir'de".casefold(), ["i\u0307zmir", "de"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert WORD.findall(text) == words
    assert re.sub(r"[^\w]", "", joined(words)) == re.sub(r"[^\w]", "", text)


def test_words_are_the_same_folded_before_or_after() -> None:
    for text in ("Ayşe İzmir'de, Μαΐου, Straße", "दिल्ली", "ŉ ǰ ΐ"):
        assert [w.casefold() for w in WORD.findall(text)] == WORD.findall(text.casefold())


def test_pairs_of_characters_stand_side_by_side() -> None:
    assert bare_pairs(["她", "住", "在", "Brno", "镇", "里"]) == [("她", "住"), ("住", "在"), ("镇", "里")]
    assert bare_pairs(["the", "red", "fox"]) == bare_pairs(["犬"]) == []


def test_joined_sets_spaces_only_where_a_script_does() -> None:
    assert joined(["the", "red", "fox"]) == "the red fox"
    assert joined(["她", "住", "在", "Brno", "镇"]) == "她住在 Brno 镇"
    assert joined([]) == ""


def test_bounded() -> None:
    assert not re.search(bounded("or"), "Orla or".replace(" or", "")) and re.search(bounded("or"), "this or that")
    assert re.sub(bounded("她"), "他", "问她住在") == "问他住在"
    assert re.sub(bounded("दिल्ल"), "x", "दिल्ली") == "दिल्ली" and re.sub(bounded("दिल्ली"), "x", "दिल्ली।") == "x।"


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Where was  Orla born?", ["Where", "was"]),
        ("她住在哪里?", ["她", "住"]),
        ("她(Orla)住在哪里?", ["她", "(Orla)"]),
    ],
)
def test_pieces_put_together_are_the_beginning_of_the_text(text: str, first: list[str]) -> None:
    assert pieces(text)[:2] == first
    assert text.startswith(beginning(text, 2))
    assert between(text) == ("" if text[0] == "她" else " ")
    assert is_unspaced(text) == (text[0] == "她")
    assert pieces("") == [] and beginning("", 3) == ""


def test_a_character_is_told_by_the_pairs_it_makes() -> None:
    assert pairs(["in", "moss"]) == [("in",), ("moss",)]
    assert pairs(["住", "在", "石"]) == [("住在",), ("住在", "在石"), ("在石",)]
    assert pairs(["石", "in", "镇"]) == [("石",), ("in",), ("镇",)]
    assert pairs([]) == []
