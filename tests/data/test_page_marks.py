"""What pages add to a text is left out, and what looks like it stays: in both directions."""

from __future__ import annotations

import io
import json
import random
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import call

from qunlearn.data.page_marks import without_page_marks

WORDS = ["the", "river", "ran", "slow", "beneath", "old", "stones", "and", "nobody", "had", "seen", "them", "before"]
NAMES = ("Ada", "Moss", "I")


def sentences(count: int, seed: int) -> str:
    rng = random.Random(seed)
    made = [rng.choices([*WORDS, *NAMES], k=rng.randint(8, 20)) for _ in range(count)]
    return " ".join(" ".join(words)[0].upper() + " ".join(words)[1:] + rng.choice(".?!") for words in made)


def verse(lines: int, seed: int) -> str:
    rng = random.Random(seed)
    return "".join(
        " ".join(rng.choices(WORDS, k=7)).capitalize() + rng.choice(("", ",", ";")) + "\n" for _ in range(lines)
    )


def cleaned(text: str) -> tuple[str, int]:
    dropped = Counter[str]()
    lines = io.StringIO(text, newline="\n").readlines()
    return "".join(without_page_marks(lambda: lines, dropped)), dropped.total()


BOOK = textwrap.wrap(sentences(200, 1), 68)
PAGES: dict[str, tuple[int, Callable[[int, str], str]]] = {
    "number below": (1, lambda n, page: f"{page}\n\n{n}\n\n\f"),
    "no form feeds": (1, lambda n, page: f"{page}\n{n}\n"),
    "decorated": (1, lambda n, page: f"{page}\n\n- {n} -\n\n"),
    "counted": (1, lambda n, page: f"{page}\n\nPage {n} of 300\n\n"),
    "form feeds alone": (0, lambda n, page: f"{page}\n\f"),
    "head above its number": (2, lambda n, page: f"The Keeper\n{n}\n{page}\n"),
    "head and number, in turns": (
        1,
        lambda n, page: f"\f{f'THE KEEPER {n}' if n % 2 else f'{n}  ADA PRILL'}\n\n{page}\n\n",
    ),
    "foot, number and head": (3, lambda n, page: f"\fThe Keeper\n\n{page}\n\nSome Press\n{n}\n"),
}


@pytest.mark.parametrize("kind", PAGES)
def test_pages_leave_no_trace_in_a_sentence(kind: str) -> None:
    each, page = PAGES[kind]
    parts = ["\n".join(BOOK[at : at + 28]) for at in range(0, len(BOOK), 28)]
    text, count = cleaned("".join(page(n, part) for n, part in enumerate(parts, 7)))
    assert count == each * len(parts)
    assert text.split() == " ".join(BOOK).split()
    cut = [part for part in parts[:-1] if part[-1] not in ".?!"]
    assert len(cut) > 3
    if kind != "foot, number and head":  # which ends with its last page's
        assert text.count("\n\n") + text.count("\f") <= 2 * (len(parts) - len(cut)) + 2
    assert all(f"{part[-20:]}\n" in text for part in cut)


def test_numbers_of_chapters_stay_where_pages_have_numbers_too() -> None:
    lines, page, out = 0, 1, ""
    for chapter in range(1, 8):
        out += f"\n{chapter}\n\n"
        for line in textwrap.wrap(sentences(60, chapter), 68):
            out += f"{line}\n"
            lines += 1
            if lines % 30 == 0:
                out += f"\n{page}\n\n"
                page += 1
    text, count = cleaned(out)
    assert count == page - 1 > 8
    assert [line for line in text.splitlines() if line.strip().isdecimal()] == [str(n) for n in range(1, 8)]


STAY = {
    "sonnets": "\n".join(f"{n}\n\n{verse(14, n)}" for n in range(1, 30)),
    "sonnets on pages": "".join(f"{n}\n\n{verse(14, n)}\f" for n in range(1, 30)),
    "chapters": "\n\n".join(f"{n}\n\n" + textwrap.fill(sentences(30, n), 68) for n in range(1, 12)),
    "named chapters": "\f".join(f"Chapter {n}\n\n" + textwrap.fill(sentences(30, n), 68) + "\n" for n in range(1, 12)),
    "a list": "\n".join(f"{n}\n{' '.join(WORDS[n % 9 :][:4])}" for n in range(1, 40)),
    "longer items": "\n".join(f"{n}\n{textwrap.fill(' '.join((WORDS * 4)[n % 9 :][:30]), 40)}" for n in range(1, 40)),
    "numbered sentences": "\n".join(f"{n}. {sentences(1, n)}" for n in range(1, 40)),
    "verses of a bible": "\n".join(f"{n}\n{sentences(2, n)}" for n in range(1, 40)),
    "a refrain": "\n\n".join(f"{verse(8, n)}\nAnd the river ran\n" for n in range(1, 30)),
    "songs on slides": "".join(f"{verse(4, 0 if n % 2 else n)}\n{n}\n\f{verse(6, n)}\f" for n in range(1, 30)),
    "choruses on pages": "".join(f"{verse(12, n)}\n{verse(3, 0)}\f" for n in range(1, 30)),
    "numbers": "\n".join(str(n % 90) for n in range(4000)),
    "years": "\n\n".join(f"{year}\n\n{sentences(12, year)}" for year in range(1901, 1920)),
}


@pytest.mark.parametrize("kind", STAY)
def test_what_is_no_pages_stays(kind: str) -> None:
    assert cleaned(STAY[kind]) == (STAY[kind], 0)


def test_pages_in_a_script_without_spaces_or_capitals() -> None:
    rng = random.Random(4)
    book = ["".join(rng.choices("山水人大小日月木火土。", k=30)) for _ in range(300)]
    parts = ["\r\n".join(book[at : at + 25]) for at in range(0, len(book), 25)]
    text, count = cleaned("".join(f"{part}\r\n\r\n- {n} -\r\n\f" for n, part in enumerate(parts, 1)))
    assert count == len(parts) and text.split() == book


def test_pages_of_verse_lose_heads_and_their_numbers() -> None:
    """No sentence is cut there by which a number were known; a head above it is. The first stands by itself, as a
    title."""
    pages = [verse(20, n) for n in range(12)]
    text, count = cleaned("".join(f"\fSongs of Water\n\n{page}\n{n}\n" for n, page in enumerate(pages, 3)))
    assert count == 2 * len(pages) - 1
    assert [line for line in text.splitlines() if line.strip()] == ["Songs of Water", *"".join(pages).splitlines()]


def test_an_import_tells_how_many(tmp_path: Path) -> None:
    parts = ["\n".join(BOOK[at : at + 28]) for at in range(0, len(BOOK), 28)]
    book = tmp_path / "book.txt"
    book.write_text("".join(f"{part}\n\n{n}\n\n\f" for n, part in enumerate(parts, 7)), encoding="utf-8")
    ran = call("data", "import", "text", book, "-o", tmp_path / "bad.jsonl")
    assert ran.code == 0 and f"{len(parts)}   dropped: page numbers and running heads" in ran.stderr
    rows = [json.loads(line)["completion"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert not any(str.isdigit(c) for row in rows for c in row)
