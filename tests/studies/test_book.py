"""The study of a book: its prose, and where it is asked about."""

from __future__ import annotations

import random

import book as study


def test_a_book_has_its_words_and_other_people_than_the_next() -> None:
    one, two = (study.write_book(300, random.Random(seed)) for seed in (0, 1))
    assert 300 <= len(one.split()) < 330
    assert one == study.write_book(300, random.Random(0)) != two
    assert not {form for form in "PLQND" if f" {form} " in one}


def test_places_begin_with_a_paragraph_and_so_many_words_further_on() -> None:
    book = study.write_book(600, random.Random(0))
    for shift in study.SHIFTS:
        asked = study.places(book, shift)
        assert len(asked) >= 4
        for prompt, rest in asked:
            assert prompt + rest == book[book.index(prompt) :]
            assert len(prompt.split()) == study.PROMPT
    assert book.startswith(study.places(book, 0)[0][0])
    assert [prompt.split()[3:] for prompt, _ in study.places(book, 0)[:2]] == [
        prompt.split()[:27] for prompt, _ in study.places(book, 3)[:2]
    ]
