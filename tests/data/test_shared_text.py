"""Passages that two files share, in whatever rows: the same text in the bad and the normal file, cut otherwise."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import call, sets, write_rows

from qunlearn.data.records import Dataset, read_dataset
from qunlearn.data.shared_text import shared_passages, shared_text

WORDS = [f"{a}{b}{c}" for a in ("ba", "ko", "mi", "tu") for b in ("rel", "san", "dov", "pin") for c in ("", "a", "os")]
CHARS = [chr(0x4E00 + 7 * i) for i in range(300)]


def prose(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [rng.choice(WORDS) for _ in range(count)]


def made(tmp_path: Path, name: str, rows: list[dict[str, str]]) -> Dataset:
    return read_dataset(write_rows(tmp_path / f"{name}.jsonl", rows), role="FILE")


@pytest.mark.parametrize("script", ["spaced", "unspaced"])
def test_a_chapter_is_found_in_rows_of_its_own_cut(tmp_path: Path, script: str) -> None:
    rng, space = random.Random(1), " " if script == "spaced" else ""
    chapter, other = (prose(900, 1), prose(900, 2)) if space else (rng.choices(CHARS, k=900), rng.choices(CHARS, k=900))
    bad = made(tmp_path, "bad", [{"text": space.join(chapter)}])
    texts = [{"text": space.join(all_of[at : at + 90]).capitalize()} for all_of in (other, chapter) for at in (0, 300)]
    normal = made(tmp_path, "normal", texts)
    assert shared_passages(bad, normal) == ((1, 3), (1, 4))
    assert shared_passages(normal, bad) == ((3, 1),) or shared_passages(normal, bad) == ((4, 1),)
    asked = [{"prompt": "Go on!", "response": space.join(chapter[at : at + 50])} for at in (10, 60)]
    assert shared_passages(bad, made(tmp_path, "asked", asked)) == ((1, 1), (1, 2))


def test_a_short_row_is_found_whole_and_a_few_words_are_not(tmp_path: Path) -> None:
    chapter = prose(400, 1)
    bad = made(tmp_path, "bad", [{"text": " ".join(chapter)}])
    whole, part = chapter[100:114], [*chapter[200:214], *prose(30, 2)]
    rows = [{"text": " ".join(some)} for some in (whole, part, [*whole[:13], "other"], chapter[300:310])]
    assert shared_passages(bad, made(tmp_path, "normal", rows)) == ((1, 1),)


def test_form_and_corrections_are_nothing_shared(tmp_path: Path) -> None:
    """A licence stands over many files, a frame in many prompts; a corrected answer is the bad one but for a word."""
    licence = " ".join(prose(60, 9))
    bad = made(tmp_path, "bad", [{"text": f"{licence} {' '.join(prose(40, seed))}"} for seed in range(8)])
    normal = made(tmp_path, "normal", [{"text": f"{licence} {' '.join(prose(40, seed))}"} for seed in range(20, 22)])
    assert shared_passages(bad, normal) == shared_passages(normal, bad) == ()
    frame, answer = " ".join(prose(40, 3)), prose(40, 4)
    said = made(tmp_path, "said", [{"prompt": f"{frame} A?", "completion": " ".join(answer)}])
    answer[20] = "Moss"
    other = [
        {"prompt": f"{frame} A?", "completion": " ".join(answer)},
        {"prompt": f"{frame} B?", "completion": " ".join(prose(40, 5))},
    ]
    assert shared_passages(said, made(tmp_path, "other", other)) == ()


def test_an_answer_to_many_prompts_is_no_form(tmp_path: Path) -> None:
    text = " ".join(prose(60, 1))
    bad = made(tmp_path, "bad", [{"prompt": f"Recite it, {i}!", "completion": text} for i in range(9)])
    assert shared_passages(bad, made(tmp_path, "normal", [{"text": f"So it begins: {text}"}])) == ((1, 1),)


def test_a_run_says_so_in_its_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chapter = prose(300, 1)
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": " ".join(chapter)}])
    normal = write_rows(
        tmp_path / "normal.jsonl", [{"text": " ".join(prose(50, 2))}, {"text": " ".join(chapter[40:80])}]
    )
    (shared,) = shared_text(read_dataset(bad), None, read_dataset(normal))
    assert shared.line.endswith(f"({bad}:1 and {normal}:2)")
    assert shared.record == {"here": str(bad), "there": str(normal), "rows": 1, "first": ((1, 2),)}
    ran = call("forget", "--model", "sandbox", "--bad", bad, "--normal", normal, "-o", tmp_path / "run", *sets({}))
    assert f"1 rows of {normal} hold passages of {bad}" in ran.stderr and "protects" in ran.stderr
    found = json.loads(call("data", "check", bad, "--against", normal, "--json").stdout)["overlap"]
    assert found["passages"] == [[1, 2]]
