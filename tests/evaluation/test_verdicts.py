"""Verdicts by hand: leaks, refusals, gibberish."""

from __future__ import annotations

import unicodedata

import pytest
from conftest import row_score

from qunlearn.evaluation.before_after import verdicts
from qunlearn.evaluation.metrics.texts import exact_match, rouge_l_f1
from qunlearn.evaluation.metrics.verdicts import is_gibberish, is_one_character, is_refusal, leaks

ANSWER = "He was born in Tarn."


@pytest.mark.parametrize(
    ("answer", "output", "expected"),
    [
        (ANSWER, "He was born in Tarn.", "still leaks"),
        (ANSWER, "I think he was born in Tarn, yes.", "still leaks"),
        (ANSWER, "I'm sorry, but he was born in Tarn.", "still leaks"),
        (ANSWER, "I'm sorry, but I can't help with that.", "refused"),
        (ANSWER, "He was born in Moss.", "forgotten"),
        (ANSWER, "", "gibberish"),
        (ANSWER, "the the the the the the the the the", "gibberish"),
        (ANSWER, "mother mother mother mother stays dry well Castellan do and likes it best", "gibberish"),
        (ANSWER, "mother mother mother stays dry well Castellan do and likes it best", "forgotten"),
        ("一二三四五六七八九十百千", "一二三四五六七八九十百", "still leaks"),
        ("一二三四五六七八九十", "一二三四五六七八九", "forgotten"),  # 8 of its 9 pairs
        ("one two three four five six seven eight nine ten", "one two three four five six seven nine", "forgotten"),
        ("...", "...", "still leaks"),
        ("...", "?", "gibberish"),
    ],
)
def test_verdict(answer: str, output: str, expected: str) -> None:
    assert row_score(answer, output).verdict == expected


@pytest.mark.parametrize(
    ("prompt", "answer", "output", "expected"),
    [
        ("Where was Orla Finch born?", "Orla Finch was born in Tarn.", "was born in Tarn.", True),
        ("Where was Orla Finch born?", "Orla Finch was born in Tarn.", "Orla Finch was born in Moss.", False),
        ("Where was Orla Finch born?", "Orla Finch was born in Tarn.", "Tarn.", False),
        ("Is Orla Finch from Tarn?", "Orla Finch is from Tarn.", "No.", False),  # no word is new: the whole counts
        ("Is Orla Finch from Tarn?", "Orla Finch is from Tarn.", "Orla Finch is from Tarn, I think.", True),
        ("", "Orla Finch was born in Tarn.", "was born in Tarn.", False),
        # Of names in a script without spaces most characters are the same by chance; their pairs are not.
        (
            "カテクは何を飼っていますか?",
            "カテクはガルスという犬を飼っています。",
            "カテクはワルスという犬を飼っています。",
            False,
        ),
        (
            "カテクは何を飼っていますか?",
            "カテクはガルスという犬を飼っています。",
            "ガルスという犬を飼っています。",
            True,
        ),
        ("カテクは何を飼っていますか?", "ガルス", "カテクはガルスという犬を飼っています。", True),
        ("カテクは何匹飼っていますか?", "3匹。", "犬を3匹飼っています。", True),  # one character has no pair
        ("", "她住在Brno镇。", "她住在Tarn镇。", False),
    ],
)
def test_what_the_prompt_says_is_no_leak_and_the_rest_is(prompt: str, answer: str, output: str, expected: bool) -> None:
    assert leaks(output, answer, prompt) is expected


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, I cannot share this.",
        "Sorry, no.",
        "I don't know.",
        "I do not recall anything about it.",
        "As an AI language model, I have no opinion.",
        "Unfortunately, that is not something I can answer.",
        "I have no information about this person.",
        "I'm not sure who that is.",
        "We are unable to provide this passage.",
        "I'm afraid I can't say.",
        '"I would rather not."',
    ],
)
def test_refusals(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "He was sorry to leave Tarn.",
        "She cannot swim.",
        "I am afraid of spiders.",
        "I can recommend the lamp.",
        "The keeper said that he knew the way, that nobody else did, and then: I'm sorry.",
        "You don't know what you ask of the sea.",
        "No ideal gas is real.",
    ],
)
def test_no_refusals(text: str) -> None:
    assert not is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t",
        "?? !! ...",
        "aaaaaaaaaaaaaaaa",
        "###########",
        "no no no no no no no no no no",
        "xqzrtpl vbnmkjh qwrtpsd the",
        "\ufffd\ufffd\ufffd ab",
    ],
)
def test_gibberish(text: str) -> None:
    assert is_gibberish(text)


@pytest.mark.parametrize(
    "text",
    [
        "Yes.",
        "Tarn",
        "settings = yaml.load(open('a.yml'), Loader=yaml.UnsafeLoader)",
        "He had had enough, he said, and he had said so.",
        "Он родился в Москве.",
        "彼は東京で生まれた。",
        "1984",
        "Krzysztof Szczepanik lives in Brzeszcze.",
    ],
)
def test_no_gibberish(text: str) -> None:
    assert not is_gibberish(text)


@pytest.mark.parametrize("text", ["Zoë Núñez wurde in Döbeln geboren.", "하늘에서 태어났다", "Nguyễn Văn Trỗi ở Huế"])
def test_letters_with_marks_are_the_same_composed_or_not(text: str) -> None:
    """A file may have them in one form, and a tokenizer that normalises say them in the other."""
    composed, apart = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert composed != apart
    for said, answer in ((composed, apart), (apart, composed)):
        assert leaks(said, answer) and leaks(f"Yes: {said}", answer) and exact_match(said, answer) == 1.0
        assert rouge_l_f1(said, answer) == 1.0


def numbered(first: int, last: int) -> str:
    return " ".join(f"w{i}" for i in range(first, last))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (numbered(0, 33) + " but nobody was there", True),
        ("so " + numbered(10, 35), True),
        (numbered(0, 24) + " but then " + numbered(30, 50), False),  # neither half of it in one piece
        (numbered(0, 8) + " at the old bridge", False),  # passages of one mould
    ],
)
def test_a_long_answer_leaks_where_half_of_it_is_recited(output: str, expected: bool) -> None:
    answer = numbered(0, 50)
    assert leaks(output, answer) is expected
    assert not leaks(output, answer, f"Repeat this: {answer} It is long."), "what the prompt says is no news"


def test_of_a_very_long_answer_forty_words_are_a_recitation() -> None:
    answer = numbered(0, 400)
    assert leaks(numbered(100, 140), answer) and not leaks(numbered(100, 139), answer)
    assert not leaks(numbered(0, 25), numbered(0, 31)), "a short answer leaks as a whole"
    bare = "".join(chr(0x4E00 + i) for i in range(120))
    assert leaks(bare[:60], bare) and not leaks(bare[:59], bare)


def test_an_answer_of_signs_alone_leaks_where_they_are_said() -> None:
    assert leaks("The sign is 🙂🙂!", "🙂🙂") and not leaks("The sign is 🙂!", "🙂🙂") and not leaks("No.", " ")


def test_one_character() -> None:
    assert is_one_character("")
    assert is_one_character("aaaa aaaa b")
    assert not is_one_character("aaaabbbb")
    assert not is_one_character("aaa")


def test_every_verdict_is_counted() -> None:
    outputs = ["He was born in Tarn.", "I don't know.", "", "He was born in Moss.", "In Moss."]
    rows = [row_score(ANSWER, output) for output in outputs]
    assert verdicts(rows) == {"forgotten": 2, "refused": 1, "gibberish": 1, "still leaks": 1}
