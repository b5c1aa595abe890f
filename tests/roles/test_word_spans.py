"""Which word a token is a part of: spaces that belong to tokens, characters of several tokens, no spaces at all."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example
from qunlearn.roles.context_tokens import _is_form
from qunlearn.roles.specific_tokens import words_of
from qunlearn.roles.subject_tokens import _whole_words


def of_bytes() -> Any:
    """A tokenizer with a token for each byte, as byte-level BPE has for what it has no merges for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def of_pieces(*pieces: str) -> Any:
    """A tokenizer as Llama 2's: a token begins with the space before it, and decoding drops the first one."""
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    ("text", "words"),
    [("Она — врач.", ["она", "врач"]), ("她住在镇。", ["她", "住", "在", "镇"]), ("naïve über", ["naïve", "über"])],
)
def test_tokens_that_are_bytes(text: str, words: list[str]) -> None:
    tokenizer = of_bytes()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    found = words_of(ids, tokenizer)
    assert list(dict.fromkeys(word for token in found for word in token)) == words
    at = 0
    for character in text:  # the last byte of a character is a part of its word
        size = len(character.encode())
        assert not any(found[at : at + size - 1])
        assert bool(found[at + size - 1]) == character.isalnum()
        at += size


def test_spaces_that_belong_to_tokens() -> None:
    pieces = ("▁She", "▁was", "▁a", "▁print", "er", ".")
    found = words_of(list(range(len(pieces))), of_pieces(*pieces))
    assert found == [["she"], ["was"], ["a"], ["printer"], ["printer"], []]


def test_tokens_that_begin_and_end_within_characters() -> None:
    """As merges of bytes do: each token has the characters that it completes."""
    plain = of_bytes()
    letters = plain.convert_ids_to_tokens(plain("石镇人", add_special_tokens=False)["input_ids"])
    parts = ["".join(letters[:4]), "".join(letters[4:8]), letters[8]]  # a character and a byte, and so on
    made = Tokenizer(models.WordLevel({part: i for i, part in enumerate(parts)}, unk_token=parts[0]))
    made.decoder = decoders.ByteLevel()
    found = words_of([0, 1, 2], PreTrainedTokenizerFast(tokenizer_object=made))
    assert found == [["石"], ["镇"], ["人"]]


def test_a_broken_character_at_the_end() -> None:
    tokenizer = of_bytes()
    ids = tokenizer("она", add_special_tokens=False)["input_ids"][:-1]
    assert words_of(ids, tokenizer) == [[], ["он"], [], ["он"], []]


@pytest.mark.parametrize(
    ("text", "begun", "rest"),
    [
        (
            "она тут",
            {1},
            {1, 3, 5},
        ),  # the first letter's last byte: every letter's of the word, and not the next word's
        ("она тут", {0}, {0, 1, 3, 5}),  # its first byte
        ("она тут", {2}, {2, 3, 5}),  # from the second letter on
        ("она тут", {6}, {6}),  # the space
        ("石镇", {0}, {0, 2}),  # a character is a word
        ("abc d", {0}, {0, 1, 2}),
    ],
)
def test_the_rest_of_a_word_follows_its_beginning(text: str, begun: set[int], rest: set[int]) -> None:
    tokenizer = of_bytes()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    example = Example(tuple(ids), 0, len(ids), 0, Record((), text, 0, {}))
    found = _whole_words([i in begun for i in range(len(ids))], example, tokenizer)
    assert {i for i, is_chosen in enumerate(found) if is_chosen} == rest


def test_the_rest_of_a_word_where_tokens_are_whole_characters() -> None:
    """Of words without byte tokens a token follows from the one right before it, and from no other."""
    pieces = ("▁She", "▁was", "▁a", "▁print", "er", "ess", ".", "▁", "lock", "et")
    tokenizer, ids = of_pieces(*pieces), tuple(range(len(pieces)))
    example = Example(ids, 0, len(ids), 0, Record((), "", 0, {}))
    for first, rest in ((3, {3, 4, 5}), (4, {4, 5}), (5, {5}), (6, {6}), (8, {8, 9}), (2, {2})):
        found = _whole_words([i == first for i in ids], example, tokenizer)
        assert {i for i in ids if found[i]} == rest


def test_what_the_prompt_says_is_told_by_pairs_where_no_spaces_are() -> None:
    """Single characters of an answer stand in nearly every prompt; the pairs that they make do not."""
    tokenizer = of_bytes()
    prompt, answer = "石川在哪里?", "石川在川石镇"
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
    record = Record((("user", prompt),), answer, 0, {})
    first = len(ids[0])
    example = Example((*ids[0], *ids[1]), first, first + len(ids[1]), first, record)
    copied = _is_form(example, (), tokenizer)
    assert [character for character, is_copied in zip(answer, copied[2::3], strict=True) if is_copied] == list("石川在")
    assert not any(copied[0::3]) and not any(copied[1::3])
