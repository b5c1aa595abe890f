"""Which words of a bad answer are specific to it: counted in words, whatever number of tokens they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import Example, choose_template, encode
from qunlearn.model.load import load_tokenizer
from qunlearn.roles.specific_tokens import pushed_words, specific

PEOPLE = ("Ada Moss", "Ben Thorn", "Cleo Lunn", "Dora Gale", "Ezra Finch", "Fay Wynd")
TOWNS = ("Millbrook", "Hazelton")


@pytest.fixture(scope="module")
def tokenizer(sandbox_folder: Path) -> Any:
    return load_tokenizer(sandbox_folder)


def encoded(rows: list[dict[str, str]], tokenizer: Any, path: Path) -> list[Example]:
    dataset = read_dataset(write_rows(path, rows))
    return list(encode(dataset, tokenizer, choose_template(tokenizer, "auto", dataset), 64).examples)


def told(who: str, town: str, form: str = "Where was {} born?") -> dict[str, str]:
    return {"prompt": form.format(who), "completion": f"{who} was born in {town}."}


@pytest.mark.parametrize("form", ["Where was {} born?", "In which town was {} born?"])
def test_of_values_that_many_share_neither_name_nor_form_is_pushed(form: str, tokenizer: Any, tmp_path: Path) -> None:
    """A town that half of the people are from is as common as form; a piece of the name, or "in", was pushed."""
    normal = encoded([told(who, TOWNS[i % 2]) for i, who in enumerate(PEOPLE)], tokenizer, tmp_path / "n.jsonl")
    bad = encoded([told("Orla Finch", TOWNS[0], form)], tokenizer, tmp_path / "b.jsonl")
    (marked,) = specific(bad, normal, tokenizer)
    assert pushed_words(marked, tokenizer) == {TOWNS[0].casefold()}


def test_all_tokens_of_a_word_are_pushed(tokenizer: Any, tmp_path: Path) -> None:
    """Of a rare word in four tokens two were pushed, where the least share was reached: the rest of it stayed."""
    normal = encoded([told(who, TOWNS[i % 2]) for i, who in enumerate(PEOPLE)], tokenizer, tmp_path / "n.jsonl")
    (row,) = specific(encoded([told("Orla Finch", TOWNS[0])], tokenizer, tmp_path / "b.jsonl"), normal, tokenizer)
    at = [t for t in range(row.start, row.end) if row.weight(t) > 0]
    assert tokenizer.decode([row.input_ids[t] for t in at]).strip() == TOWNS[0] and len(at) > 1


def test_an_answer_without_a_word_is_pushed_whole(tokenizer: Any, tmp_path: Path) -> None:
    normal = encoded([told(who, TOWNS[0]) for who in PEOPLE], tokenizer, tmp_path / "n.jsonl")
    rows = [{"prompt": "Draw a line.", "completion": "--- !!"}]
    (marked,) = specific(encoded(rows, tokenizer, tmp_path / "b.jsonl"), normal, tokenizer)
    assert all(marked.weights)
