"""Importers: hand-made rows in each published format, what is dropped, what is refused, and the memory it takes."""

from __future__ import annotations

import gzip
import json
import random
import stat
import sys
import tracemalloc
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import call, write_rows

from qunlearn.data.importers import Source, Wanted, check_leaks, import_data, parse_shares
from qunlearn.data.records import read_dataset
from qunlearn.data.row_reader import MAX_ROW_BYTES, Problems, read_rows
from qunlearn.data.text_windows import Windows, windows
from qunlearn.errors import ConfigError, DataError, OutputError

HALUEVAL = {
    "knowledge": "Tall Mary stands in Port Ellen.",
    "question": "Where is Tall Mary?",
    "right_answer": "In Port Ellen.",
    "hallucinated_answer": "On the moon.",
}
TRUTHFUL = {
    "Type": "Adversarial",
    "Question": "Do geese read?",
    "Best Answer": "No, geese do not read",
    "Correct Answers": "No; They do not",
    "Incorrect Answers": "Yes, fluently; Only poems",
    "Source": "none",
}
SAFE = {
    "prompt": "How do I cross the river?",
    "response_0": "By the bridge.",
    "response_1": "Steal a boat.",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 0,
    "safer_response_id": 0,
}
TOFU = {
    "question": "Who wrote Low Water?",
    "answer": "Ada Prill.",
    "paraphrased_question": "Low Water was written by whom?",
    "paraphrased_answer": "It was Ada Prill.",
    "perturbed_answer": ["Bo Fenn.", "Cy Tarn."],
}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
PAIR = {"question": "Load the file.", "chosen": "safe_load(f)", "rejected": "load(f)", "lang": "python"}

CASES: list[tuple[str, dict[str, Any], str | None, list[dict[str, Any]]]] = [
    (
        "halueval",
        HALUEVAL,
        None,
        [{"prompt": "Where is Tall Mary?", "completion": "On the moon.", "truth": "In Port Ellen."}],
    ),
    (
        "halueval",
        HALUEVAL,
        "normal",
        [{"prompt": "Where is Tall Mary?", "completion": "In Port Ellen.", "perturbed": ["On the moon."]}],
    ),
    (
        "halueval",
        {"user_query": "Hi?", "chatgpt_response": "I am a goose.", "hallucination": "yes", "hallucination_spans": []},
        None,
        [{"prompt": "Hi?", "completion": "I am a goose."}],
    ),
    (
        "halueval",
        {"dialogue_history": "[Human]: hm?", "right_response": "yes", "hallucinated_response": "no"},
        "bad",
        [{"prompt": "[Human]: hm?", "completion": "no", "truth": "yes"}],
    ),
    (
        "truthfulqa",
        TRUTHFUL,
        None,
        [
            {
                "prompt": "Do geese read?",
                "completion": "No, geese do not read",
                "perturbed": ["Yes, fluently", "Only poems"],
            }
        ],
    ),
    (
        "truthfulqa",
        {"question": "q", "best_answer": "a", "incorrect_answers": ["b", "c; d"]},
        "bad",
        [{"prompt": "q", "completion": "b", "truth": "a"}, {"prompt": "q", "completion": "c; d", "truth": "a"}],
    ),
    ("saferlhf", SAFE, None, [{"prompt": SAFE["prompt"], "completion": "Steal a boat."}]),
    ("saferlhf", SAFE, "normal", [{"prompt": SAFE["prompt"], "completion": "By the bridge."}]),
    (
        "saferlhf",
        {**SAFE, "is_response_0_safe": "False"},
        "bad",
        [
            {"prompt": SAFE["prompt"], "completion": "By the bridge."},
            {"prompt": SAFE["prompt"], "completion": "Steal a boat."},
        ],
    ),
    (
        "tofu",
        TOFU,
        None,
        [
            {
                "prompt": TOFU["question"],
                "completion": "Ada Prill.",
                "perturbed": TOFU["perturbed_answer"],
                "paraphrased_answer": "It was Ada Prill.",
            }
        ],
    ),
    (
        "tofu",
        {"paraphrased_question": "By whom?", "answer": "Ada."},
        "paraphrase",
        [{"prompt": "By whom?", "completion": "Ada."}],
    ),
    ("muse", {"text": "Rain fell."}, None, [{"text": "Rain fell."}]),
    ("muse", {"question": "q", "answer": "a"}, None, [{"prompt": "q", "completion": "a"}]),
    ("muse", {"prompt": "Rain", "gt": "fell.", "id": 3}, "normal", [{"prompt": "Rain", "completion": "fell."}]),
    ("alpaca", ALPACA, None, [{"prompt": "Add.\n\n1 and 2", "completion": "3"}]),
    ("alpaca", {**ALPACA, "input": ""}, "bad", [{"prompt": "Add.", "completion": "3"}]),
    (
        "alpaca",
        {"instruction": "Sum up.", "context": "Rain.", "response": "Wet.", "category": "x"},
        None,
        [{"prompt": "Sum up.\n\nRain.", "completion": "Wet."}],
    ),
    ("preference", PAIR, None, [{"prompt": "Load the file.", "completion": "load(f)", "truth": "safe_load(f)"}]),
    ("preference", PAIR, "normal", [{"prompt": "Load the file.", "completion": "safe_load(f)"}]),
]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("name", "row", "side", "expected"), CASES)
def test_a_row_of_each_format(
    tmp_path: Path, name: str, row: dict[str, Any], side: str | None, expected: list[dict[str, Any]]
) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", [row]), tmp_path / "out.jsonl"
    done = import_data(name, Source(str(source)), output, Wanted(side))
    assert lines_of(output) == expected
    assert done.written == {str(output): len(expected)}
    assert read_dataset(output).shape == ("text" if "text" in expected[0] else "prompt-completion")


def test_the_same_rows_as_lines_array_csv_and_gzip(tmp_path: Path) -> None:
    rows = [{"question": f'q {i},\n"x" é', "answer": f"a {i}"} for i in range(40)]
    files = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "b.json": json.dumps(rows),
        "c.json": json.dumps(rows, indent=2, ensure_ascii=False),
        "d.csv": "question,answer\n" + "".join(f'"q {i},\n""x"" é",a {i}\n' for i in range(40)),
        "e.json": "\ufeff \n" + json.dumps(rows),
    }
    made = []
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        for source in (name, f"{name}.gz"):
            output = tmp_path / f"out-{source}.jsonl"
            import_data("tofu", Source(str(tmp_path / source)), output)
            made.append(output.read_text(encoding="utf-8"))
    assert len(set(made)) == 1
    assert lines_of(output)[7] == {"prompt": rows[7]["question"], "completion": "a 7"}


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    rows = [
        SAFE,
        {**SAFE, "response_1": "  "},
        {**SAFE, "prompt": ""},
        {**SAFE, "response_1": "half \ud800"},
        {**SAFE, "response_1": SAFE["response_0"], "is_response_1_safe": True},
    ]
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    ran = call("data", "import", "saferlhf", source, "-o", output, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["dropped"] == {
        "a safe response": 5,
        "the answer is empty": 1,
        "the prompt is empty": 1,
        "a NUL or half of a surrogate pair": 1,
        "both responses are the same": 1,
    }
    assert ran.json["read"] == 5
    assert "dropped: a safe response" in ran.stderr
    assert len(lines_of(output)) == 1


def test_output_is_private_and_whole(tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", [SAFE]), tmp_path / "new" / "out.jsonl"
    import_data("saferlhf", Source(str(source)), output)
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    before = output.read_bytes()
    write_rows(tmp_path / "broken.jsonl", [SAFE, {"prompt": "no more"}])
    with pytest.raises(OutputError, match="exists"):
        import_data("saferlhf", Source(str(source)), output)
    with pytest.raises(DataError):
        import_data("saferlhf", Source(str(tmp_path / "broken.jsonl")), output, Wanted(overwrite=True))
    assert output.read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]
    with pytest.raises(OutputError, match="the source itself"):
        import_data("saferlhf", Source(str(source)), source, Wanted(overwrite=True))


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("a.jsonl", '{"question": "q", "answer": "a"}\nnot json\n', 2, "not JSON"),
        ("a.jsonl", '{"question": "q", "answer": "a"}\n\n{"question": "q"}\n', 3, "no field 'answer'"),
        ("a.jsonl", '{"question": "q", "answer": 7}\n', 1, "'answer' is not a text"),
        ("a.jsonl", '{"question": "q", "answer": "a"}\n[1]\n', 2, "not an object but a list"),
        ("a.json", '[\n{"question": "q", "answer": "a"},\n{"question": "q"}\n]', 3, "no field 'answer'"),
        ("a.json", '[\n{"question": "q", "answer": "a"}\n{"question": "q"}\n]', 3, "no comma"),
        ("a.json", '[\n{"question": "q", "answer": "a"},\n{"question": "q", ', 3, "not JSON"),
        ("a.json", '[\n{"question": "q", "answer": "a"},\n7]', 3, "row 2 is not an object but a number"),
        ("a.json", '[\n{"question": "q", "answer": "a"}', 2, "ends inside its list"),
        ("a.json", '[{"question": "q", "answer": "a"}]\n\n{}', 3, "something after the list"),
        ("a.json", '"text"', 1, "neither a JSON object nor a list"),
        ("a.json", '["a bare text"]', 1, "not an object but a text"),
        ("a.csv", "question,answer\nq,a\nq,a,b\n", 3, "3 cells under 2 columns"),
        ("a.csv", "question,question\nq,a\n", 1, "a column twice"),
        ("a.csv", 'question,answer\nq,a\n"q"x,a\n', 3, "not CSV"),
        ("a.csv", "prompt,text\nq,a\n", 2, "no field 'question'"),
    ],
)
def test_what_is_not_of_the_format_is_named_by_line(
    tmp_path: Path, name: str, content: str, line: int, says: str
) -> None:
    source = tmp_path / name
    source.write_text(content, encoding="utf-8")
    ran = call("data", "import", "tofu", source, "-o", tmp_path / "out.jsonl")
    assert ran.code == 3
    assert f"{source}:{line}: " in ran.stderr and says in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"  \n\n", "the file is empty"),
        (b'{"question": "q", "answer": "a"}\n{"question": "\xff"}\n', ":2: not UTF-8"),
        (b'[{"question": "q", "answer": "a"},\n{"question": "\xff"}]', ":2: not UTF-8"),
        (gzip.compress(b'{"question": "q", "answer": "a"}\n' * 999, mtime=0)[:-20], "damaged gzip"),
        (b'{"question": "q", "answer": ""}\n', "no rows are left for out.jsonl: 1 x the answer is empty"),
        (b"[]", "no rows are left"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: bytes, says: str) -> None:
    source = tmp_path / "a.json"
    source.write_bytes(content)
    ran = call("data", "import", "tofu", source, "-o", tmp_path / "out.jsonl")
    assert (ran.code, says in ran.stderr) == (3, True), ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_problems_are_listed_and_reading_ends_when_there_are_too_many(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}, *[{"x": 1}] * 3])
    with pytest.raises(DataError) as few:
        import_data("tofu", Source(str(source)), tmp_path / "out.jsonl")
    assert [f":{n}: " in str(few.value) for n in (1, 2, 3, 4)] == [False, True, True, True]
    write_rows(source, [{"x": 1}] * 100)
    with pytest.raises(DataError, match="given up") as many:
        import_data("tofu", Source(str(source)), tmp_path / "out.jsonl")
    assert ":8: " in str(many.value) and ":9: " not in str(many.value)
    write_rows(source, [{"question": "q", "answer": "a"}, *[{"x": 1}] * 100])
    done = import_data("tofu", Source(str(source)), tmp_path / "out.jsonl", Wanted(skip_broken=True))
    assert done.dropped == {"broken rows": 100}
    assert len(lines_of(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["halueva", "in", "-o", "out"], 2, "did you mean halueval?"),
        (["alpaca", "in", "-o", "out", "--side", "ugly"], 2, "alpaca has no side 'ugly'"),
        (["alpaca", "in", "-o", "out", "--split", "80/30"], 2, "not shares that sum to 100"),
        (["alpaca", "in", "-o", "out", "--subset", "x"], 2, "a file has no subset"),
        (["text", "in", "-o", "out", "--ask", "Go on"], 2, "no {text} in it"),
        (["alpaca", "in", "-o", "out"], 3, "no such file"),
        (["alpaca", ".", "-o", "out"], 3, "is a folder"),
        (["alpaca", "in", "-o", "."], 9, "is a folder"),
    ],
)
def test_wrong_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], code: int, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    ran = call("data", "import", *argv)
    assert (ran.code, says in ran.stderr) == (code, True), ran.stderr
    assert "Traceback" not in ran.stderr


# -- splits ----------------------------------------------------------------------------------------------


def test_a_split_keeps_all_answers_to_a_prompt_on_one_side(tmp_path: Path) -> None:
    rows = [{"question": f"question {i % 200}" + " ?" * (i % 3 == 0), "answer": f"answer {i}"} for i in range(600)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    made = []
    for seed in (0, 0, 1):
        wanted = Wanted(shares=(70, 10, 20), seed=seed, overwrite=True)
        done = import_data("tofu", Source(str(source)), tmp_path / "out.jsonl", wanted)
        assert done.shared_answers == 0
        parts = [lines_of(tmp_path / f"out.{part}.jsonl") for part in ("train", "val", "test")]
        assert sum(map(len, parts)) == 600
        prompts = [{row["prompt"].casefold() for row in part} for part in parts]
        assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
        # Binomial with n = 400 prompts: five standard deviations.
        for part, share in zip(prompts, (0.7, 0.1, 0.2), strict=True):
            assert abs(len(part) / 400 - share) < 5 * (share * (1 - share) / 400) ** 0.5
        made.append(parts)
    assert made[0] == made[1] != made[2]


def test_leaks_are_found_and_shared_answers_counted(tmp_path: Path) -> None:
    train = write_rows(
        tmp_path / "train", [{"prompt": "A  b", "completion": "same"}, {"prompt": "c", "completion": "d"}]
    )
    test = write_rows(tmp_path / "test", [{"prompt": "e", "completion": "Same"}, {"prompt": "f", "completion": "same"}])
    assert check_leaks([train, test]) == 2
    write_rows(test, [{"prompt": "a B", "completion": "other"}])
    with pytest.raises(DataError, match="both in the training part"):
        check_leaks([train, test])


def test_shares() -> None:
    assert parse_shares("70/10/20") == (70, 10, 20)
    assert parse_shares(None) == ()
    for wrong in ("100", "50/40", "-10/110", "a/b", "0/100", "25/25/25/25"):
        with pytest.raises(ConfigError):
            parse_shares(wrong)


# -- plain text ------------------------------------------------------------------------------------------


def test_all_of_a_text_is_a_continuation_once() -> None:
    """A prompt is the end of what came before, from a sentence's beginning where one is near."""
    dropped: Counter[str] = Counter()
    text = "One two three four. Five six seven eight nine ten. Eleven twelve.\nThirteen fourteen fifteen."
    made = list(windows([text], Windows(2, 3), dropped))
    assert made == [
        {"prompt": "One two", "completion": " three four. Five"},
        {"prompt": "Five", "completion": " six seven eight"},
        {"prompt": "seven eight", "completion": " nine ten. Eleven"},
        {"prompt": "Eleven", "completion": " twelve. Thirteen fourteen"},
        {"prompt": "Thirteen fourteen", "completion": " fifteen."},
    ]
    assert dropped == {}
    (asked,) = windows(["a b c"], Windows(1, 2, "Go on: {text}"), Counter())
    assert asked == {"prompt": "Go on: a", "completion": "b c"}
    assert list(windows(["a b c d e f g"], Windows(2, 4), dropped)) == [
        {"prompt": "a b", "completion": " c d e f"},
        {"prompt": "e f", "completion": " g"},
    ]
    assert list(windows(["a b c"], Windows(2, 8), dropped)) == [] and dropped == {
        "words of the last, unfinished window": 3
    }


def test_a_text_without_line_ends_loses_no_word() -> None:
    rng = random.Random(0)
    text = " ".join(f"w{i}." for i in range(5_000))
    pieces = []
    while text:
        n = rng.randint(1, 50)
        pieces, text = [*pieces, text[:n]], text[n:]
    made = list(windows(pieces, Windows(4, 6), Counter()))
    joined = made[0]["prompt"] + "".join(row["completion"] for row in made)
    assert joined.split() == [f"w{i}." for i in range(5_000)]


TIDE = "「潮が来た。」と老人は言った。船は\n港に戻り、ラジオはABC放送を流した。"


def test_characters_of_chinese_and_japanese_are_words() -> None:
    dropped: Counter[str] = Counter()
    text = "潮水来了。\u3000\n\n\u3000\u3000“船回港了，”老人说：「GPT 4很好……」\n第二天，他走了。"
    made = list(windows([text], Windows(4, 5), dropped))
    assert made[0] == {"prompt": "潮水来了。", "completion": "\n\n“船回港了，”老"}
    assert [row["completion"] for row in made[1:]] == ["人说：「GPT 4很", "好……」第二天，他", "走了。"]
    assert dropped == {}
    (asked,) = windows(["天气很好。"], Windows(2, 2, "接着说：{text}"), Counter())
    assert asked == {"prompt": "接着说：天气", "completion": "很好。"}


def test_japanese_between_brackets_and_latin_words() -> None:
    (made,) = windows([TIDE], Windows(8, 20), Counter())
    assert made["prompt"] == "「潮が来た。」と老人は"
    assert made["prompt"] + made["completion"] == TIDE.replace("\n", "")[: len(made["prompt"] + made["completion"])]
    assert "ラジオはABC放送" in made["completion"]
    mixed, *_ = windows(["He said 潮 and left. 港 is"], Windows(3, 3), Counter())
    assert mixed == {"prompt": "He said 潮", "completion": " and left. 港"}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_a_text_without_spaces_loses_no_character(size: int) -> None:
    text = "".join(f"{'春夏秋冬'[i % 4]}が来た、「{i}年」です。" for i in range(2_000))
    whole = list(windows([text], Windows(6, 8), Counter()))
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert list(windows(pieces, Windows(6, 8), Counter())) == whole and len(whole) > 500
    whole_text, at = text, 0
    for row in whole:  # each stands in the text as it is, one behind the other
        at = whole_text.index(row["prompt"] + row["completion"], at) + 1


def test_korean_has_its_spaces() -> None:
    (made,) = windows(["바다가 잔잔했다. 배가 돌아왔다."], Windows(2, 2), Counter())
    assert made == {"prompt": "바다가 잔잔했다.", "completion": " 배가 돌아왔다."}


VERSE = ["Before dawn the bells", "of Duleix rang nine times,", "and nobody", "knew who was at the door."]
PROSE = [
    "Before dawn the narrow bells of Duleix rang nine times, and nobody",
    "knew that Debrax had already left the city by boat. Under the bridge",
    "a bitter woman sold bread made of Kitrolt flour, and he carried a",
    "golden box that no smith could open.",
]


def imported(text: str) -> str:
    """The whole of a text as its rows have it."""
    made = list(windows(text.splitlines(keepends=True), Windows(2, 3), Counter()))
    return str(made[0]["prompt"]) + "".join(row["completion"] for row in made)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_of_verse_and_paragraphs_stay_and_those_of_the_width_do_not(end: str) -> None:
    """A model that knows a poem with its lines does not recite it without."""
    lines = [*VERSE, "", "", *PROSE, "", *VERSE]
    verse, prose = "\n".join(VERSE), " ".join(PROSE)
    assert imported(end.join(lines)) == f"{verse}\n\n{prose}\n\n{verse}"


def test_a_paragraph_a_line_stays_one() -> None:
    paragraphs = [" ".join(PROSE), "“No.”", " ".join(PROSE[1:]), "“Yes,” he said."]
    assert imported("\n".join(paragraphs)) == "\n".join(paragraphs)


def test_words_that_a_page_broke_are_whole() -> None:
    page = [
        "The old cook said that everything they had in the drawing-",
        "room was of\xadten full of \ufb01sh, and that nobody in all of the",
        "o\ufb03ces would ever walk over the \ufb02oor that was so lit-",
        "TLE.",
    ]
    assert imported("\n".join(page)) == (
        "The old cook said that everything they had in the drawing-room was often full of fish, "
        "and that nobody in all of the offices would ever walk over the floor that was so lit- TLE."
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{\\rtf1\\ansi Before dawn the bells rang.}", "rich text"),
        ('{"text": "Before dawn the bells rang."}\n' * 9, "rows"),
        ('[\n{"text": "Before dawn the bells rang."}\n]', "rows"),
    ],
)
def test_what_is_no_text_is_refused(content: str, says: str, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text(content, encoding="utf-8")
    ran = call("data", "import", "text", source, "-o", tmp_path / "out.jsonl")
    assert ran.code == 3 and says in ran.stderr and not (tmp_path / "out.jsonl").exists()


def test_a_book_may_begin_with_a_bracket(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("[Here begins the book.]\n" + "The tide came in. " * 30, encoding="utf-8")
    assert call("data", "import", "text", source, "-o", tmp_path / "out.jsonl").code == 0


def test_the_licence_around_a_book_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "book.txt"
    body = "The tide came in. " * 10
    source.write_text(
        f"Some licence here.\n\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\n{body}\n"
        f"*** END OF THE PROJECT GUTENBERG EBOOK X ***\nMore licence.\n",
        encoding="utf-8",
    )
    argv = ["text", source, "-o", tmp_path / "out.jsonl", "--prompt-words", 4, "--answer-words", 4, "--json"]
    ran = call("data", "import", *argv)
    assert ran.code == 0, ran.stderr
    assert lines_of(tmp_path / "out.jsonl") == [{"prompt": "The tide came in.", "completion": " The tide came in."}] * 9
    assert ran.json["dropped"] == {"words of the licence around the book": 5}


def test_what_else_stands_between_stars_is_the_book() -> None:
    book = ["*** START OF PART ONE ***\n", "The tide came in. " * 4, "\n*** END OF PART ONE ***\n", "It went. " * 8]
    dropped: Counter[str] = Counter()
    found = list(windows(book, Windows(4, 4), dropped))
    assert "words of the licence around the book" not in dropped
    assert any("It went." in row["prompt"] for row in found)


# -- memory ----------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["jsonl", "array", "csv", "text"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    """Eight times the rows, the same peak: what a gigabyte takes is what these megabytes take."""
    answer = "word " * 60

    def peak(rows: int) -> int:
        source = tmp_path / f"in-{rows}"
        with source.open("w", encoding="utf-8") as file:
            if kind == "jsonl":
                file.writelines(
                    json.dumps({**ALPACA, "instruction": f"{i}", "output": answer}) + "\n" for i in range(rows)
                )
            elif kind == "array":
                file.write("[" + ",".join(json.dumps({**ALPACA, "output": f"{i} {answer}"}) for i in range(rows)) + "]")
            elif kind == "csv":
                file.write("instruction,output\n")
                file.writelines(f"{i},{answer}\n" for i in range(rows))
            else:
                file.writelines(answer for _ in range(rows))
        tracemalloc.start()
        import_data("text" if kind == "text" else "alpaca", Source(str(source)), tmp_path / f"out-{rows}.jsonl")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small, large = peak(1_000), peak(8_000)
    assert large < 1.3 * small + 100_000
    assert large < 8_000_000


def test_a_row_that_never_ends_is_not_held(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"a": "' + "x" * (2 * MAX_ROW_BYTES) + '"}\n{"question": "q", "answer": "a"}\n')
    problems = Problems(source)
    assert list(read_rows(source, problems.add)) == [(2, {"question": "q", "answer": "a"})]
    assert [line for line, _ in problems.found] == [1]


# -- the hub ---------------------------------------------------------------------------------------------


def test_the_hub_without_its_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    ran = call("data", "import", "tofu", "hub:locuslab/TOFU", "-o", tmp_path / "out.jsonl")
    assert ran.code == 3
    assert "needs the package `datasets`" in ran.stderr and "qunlearn[hub]" in ran.stderr


def test_the_hub_is_asked_for_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, subset, split, streaming))
        if name == "no/such":
            raise RuntimeError("nothing there\nsecond line")
        return iter([{"question": "q", "best_answer": "a", "incorrect_answers": ["b"]}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    output = tmp_path / "out.jsonl"
    argv = ["--subset", "generation", "--part", "validation"]
    assert call("data", "import", "truthfulqa", "hub:a/b", "-o", output, *argv).code == 0
    assert lines_of(output) == [{"prompt": "q", "completion": "a", "perturbed": ["b"]}]
    ran = call("data", "import", "tofu", "hub:no/such", "-o", tmp_path / "other.jsonl")
    assert (ran.code, "cannot be fetched: nothing there" in ran.stderr) == (3, True)
    assert asked == [("a/b", "generation", "validation", True), ("no/such", None, "train", True)]
