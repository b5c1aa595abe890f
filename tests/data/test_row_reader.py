"""The files that people have: each is read, or it is said what it is and what to do."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import call, write_rows

from qunlearn.data.local_path import local_path
from qunlearn.data.paths import data_path
from qunlearn.data.records import Dataset, FieldNames, read_dataset
from qunlearn.data.row_reader import Row, read_rows
from qunlearn.errors import ConfigError, DataError

ROWS = [{"prompt": f"Who is {n}?", "completion": f"{n}, a baker; so."} for n in ("Ann", "Bob", "Cy")]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def save(tmp_path: Path, raw: bytes | str, name: str) -> Path:
    path = tmp_path / name
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return path


def pairs(dataset: Dataset) -> list[tuple[str, str]]:
    return [(r.prompt, r.completion) for r in dataset.records]


def imported(path: Path) -> list[str]:
    def complain(line: int, why: str) -> None:
        raise AssertionError(f"{line}: {why}")

    return [str(row["prompt"]) for _, row in read_rows(path, complain) if not isinstance(row, str)]


WANTED = [(row["prompt"], row["completion"]) for row in ROWS]


def table(separator: str, *, before: str = "", names: str = "prompt,completion") -> str:
    quoted = "".join(f'{row["prompt"]}{separator}"{row["completion"]}"\n' for row in ROWS)
    return f"{before}{names.replace(',', separator)}\n{quoted}"


FILES: dict[str, tuple[str, str | bytes]] = {
    "semicolons": ("x.csv", table(";")),
    "tabs": ("x.csv", table("\t")),
    "bars": ("x.csv", table("|")),
    "tsv": ("x.tsv", table("\t")),
    "a sep line": ("x.csv", table(";", before="sep=;\n")),
    "a blank first line": ("x.csv", table(",", before="\n  \n")),
    "spaced names": ("x.csv", table(",", names=" prompt , completion")),
    "a column without a name": ("x.csv", "prompt,completion,\n" + "".join(f'{p},"{c}",\n' for p, c in WANTED)),
    "a text that is a table": ("x.txt", table("\t")),
    "JSON lines as a text": ("x.txt", LINES),
    "a list under .jsonl": ("x.jsonl", json.dumps(ROWS)),
    "a printed list under .jsonl": ("x.jsonl", json.dumps(ROWS, indent=2)),
    "printed objects": ("x.json", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
    "printed objects under .jsonl": ("x.jsonl", "\n\n".join(json.dumps(row, indent=2) for row in ROWS)),
    "objects on one line": ("x.json", " ".join(map(json.dumps, ROWS))),
    "a split": ("x.json", json.dumps({"train": ROWS})),
    "a list of any name": ("x.json", json.dumps({"version": 2, "people": ROWS})),
    "served": (
        "x.json",
        json.dumps(
            {
                "features": [{"name": "prompt"}],
                "rows": [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(ROWS)],
                "num_rows_total": 3,
            }
        ),
    ),
    "columns": ("x.json", json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]})),
    "columns by number": ("x.json", json.dumps({k: {str(i): r[k] for i, r in enumerate(ROWS)} for k in ROWS[0]})),
    "bzip2": ("x.jsonl.bz2", bz2.compress(LINES.encode())),
    "xz": ("x.jsonl.xz", lzma.compress(LINES.encode())),
    "packed CSV": ("x.csv.xz", lzma.compress(table(";").encode())),
    "packed without saying so": ("x.jsonl", bz2.compress(LINES.encode())),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read(tmp_path: Path, name: str) -> None:
    file, raw = FILES[name]
    assert pairs(read_dataset(save(tmp_path, raw, file))) == WANTED


@pytest.mark.parametrize("name", FILES)
def test_imports_read_them_too(tmp_path: Path, name: str) -> None:
    file, raw = FILES[name]
    assert imported(save(tmp_path, raw, file)) == [prompt for prompt, _ in WANTED]


def test_names_with_capitals(tmp_path: Path) -> None:
    dataset = read_dataset(save(tmp_path, table(";", names="Prompt,Completion"), "x.csv"))
    assert pairs(dataset) == WANTED and dataset.fields == ("Prompt", "Completion")


def _zip(*names: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return packed.getvalue()


def _tar() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as file:
        file.addfile(tarfile.TarInfo("x.jsonl"))
    return packed.getvalue()


FOREIGN: list[tuple[str, bytes, str]] = [
    ("x.xlsx", _zip("[Content_Types].xml", "xl/workbook.xml"), "Excel workbook"),
    ("x.zip", _zip("x.jsonl"), "zip archive"),
    ("x.tar", _tar(), "tar archive"),
    ("x.tar.gz", gzip.compress(_tar(), mtime=0), "tar archive"),
    ("x.pdf", b"%PDF-1.7\n", "a PDF"),
    ("x.jsonl", b"%PDF-1.7\n", "a PDF"),
    ("x.arrow", b"ARROW1\0\0", "Arrow"),
    ("x.db", b"SQLite format 3\0", "SQLite"),
    ("x.html", b"\n<!DOCTYPE html><html>", "web page"),
    ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ("x.zst", b"\x28\xb5\x2f\xfd\0\0", "zst"),
    ("x.xz", b"\xfd7zXZ\0\0\0", "damaged xz"),
    ("x.bz2", b"BZh9\0\0", "damaged bzip2"),
    ("x.txt", b"Once upon a time, there was a baker.\nAnd so on.\n", "data import text"),
]


@pytest.mark.parametrize(("name", "raw", "said"), FOREIGN, ids=[f"{name} {said}" for name, _, said in FOREIGN])
def test_what_holds_no_rows_is_named(tmp_path: Path, name: str, raw: bytes, said: str) -> None:
    path = save(tmp_path, raw, name)
    with pytest.raises(DataError) as caught:
        read_dataset(path)
    assert said in f"{caught.value} {caught.value.hint}"
    assert "no rows" not in str(caught.value)
    if said != "data import text":
        with pytest.raises(DataError) as caught:
            list(read_rows(path, lambda *_: None))
        assert said in f"{caught.value} {caught.value.hint}"


def test_parquet_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, b"PAR1....PAR1", "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="a Parquet file") as caught:
        read_dataset(path)
    assert "qunlearn[hub]" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"train": ROWS, "test": ROWS}, "several lists of rows: 'train', 'test'"),
        ({"prompt": ["a", "b"], "completion": ["c"]}, r"columns of different lengths: \[1, 2\]"),
        ({"rows": [{"row_idx": 0, "row": ROWS[0], "truncated_cells": ["prompt"]}]}, "the server has cut cells"),
    ],
)
def test_what_is_not_taken_silently(tmp_path: Path, value: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_dataset(save(tmp_path, json.dumps(value), "x.json"))


# -- what is said ------------------------------------------------------------------------------------------


def test_one_row_of_other_fields_is_one_line(tmp_path: Path) -> None:
    """The shape is that of most rows, wherever the odd one stands."""
    for at in (0, 700):
        rows = [{"prompt": f"a{i}", "completion": f"b{i}"} for i in range(1500)]
        rows[at] = {"prompt": "a", "answer": "b"}
        with pytest.raises(DataError) as caught:
            read_dataset(write_rows(tmp_path / "x.jsonl", rows))
        assert str(caught.value).endswith(f":{at + 1}: no field 'completion'; its fields are 'prompt', 'answer'")
        assert "\n" not in str(caught.value)


def test_rows_of_no_shape_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(write_rows(tmp_path / "x.jsonl", [{"foo": "a"}] * 1500))
    assert str(caught.value).endswith(":1: no known shape; its fields are 'foo' (and in 1499 more lines)")


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("x.jsonl", '{"prompt": "a", "completion": "b",}\n', "one JSON object a line"),
        ("x.csv", "prompt,completion\na,b,c\n", "the first line of a CSV"),
        ("x.jsonl", '{"prompt": "a", "completion": 3}', "mend the rows"),
        ("x.jsonl", '{"foo": "a"}', "--completion-field"),
        ("x.csv", "Who?,Nobody.\nWhere?,There.\n", "--completion-field"),
        ("book.txt", "[Illustration]\n\nIt was late.\n", "data import text"),
        ("book.txt", "{1} It was late.\n", "data import text"),
    ],
)
def test_hints_fit_the_fault(tmp_path: Path, name: str, text: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(save(tmp_path, text, name))
    assert hint in (caught.value.hint or "")


# -- paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["https://example.org/x.jsonl", "https:/example.org/x.jsonl", "hf://a/b", "s3://a/b"])
def test_an_address_is_no_file(text: str) -> None:
    with pytest.raises(ConfigError, match="is an address, not a file"):
        data_path(text)
    with pytest.raises(ConfigError, match="is an address, not a file"):
        read_dataset(Path(text))


def test_home_and_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/x.jsonl") == tmp_path / "x.jsonl"
    assert data_path("-", stdin=True) == Path("/dev/stdin")
    with pytest.raises(ConfigError, match="a pipe cannot be"):
        data_path("-")


# -- fields ------------------------------------------------------------------------------------------------


def test_a_named_answer_keeps_its_known_prompt(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "Who?", "reply": "Nobody."}])
    dataset = read_dataset(path, FieldNames(completion="reply"))
    assert (dataset.shape, pairs(dataset)) == ("prompt-completion", [("Who?", "Nobody.")])
    alone = read_dataset(write_rows(tmp_path / "y.jsonl", [{"reply": "Nobody."}]), FieldNames(completion="reply"))
    assert alone.shape == "text"


def test_files_with_different_names_can_be_mixed(tmp_path: Path) -> None:
    names = FieldNames("q,frage", "a,antwort")
    for row in ({"q": "Who?", "a": "Nobody."}, {"frage": "Who?", "antwort": "Nobody."}):
        assert pairs(read_dataset(write_rows(tmp_path / "x.jsonl", [row]), names)) == [("Who?", "Nobody.")]


def said(*turns: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


ANSWER = [{"role": "assistant", "content": "Nobody."}]
PARTS = [{"type": "text", "text": "Nobo"}, {"type": "text", "text": "dy."}]
SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"input": "Who?", "output": "Nobody."}, "input-output"),
    ({"query": "Who?", "response": "Nobody."}, "query-response"),
    ({"query": "Who?", "answer": "Nobody.", "level": "2", "type": "simple question"}, "query-response"),
    ({"goal": "Who?", "target": "Nobody."}, "goal-target"),
    ({"prompt": "Who?", "chosen": "Somebody.", "rejected": "Nobody."}, "preference"),
    ({"prompt": "Who?", "chosen": said("Who?", "Somebody."), "rejected": said("Who?", "Nobody.")}, "preference"),
    ({"chosen": said("Who?", "Somebody."), "rejected": said("Who?", "Nobody.")}, "preference"),
    ({"prompt": said("Who?"), "chosen": ANSWER, "rejected": ANSWER}, "preference"),
    ({"prompt": said("Who?"), "completion": ANSWER}, "prompt-completion"),
    ({"prompt": "Who?", "completion": ANSWER}, "prompt-completion"),
    ({"question": "Who?", "choices": ["All.", "Nobody."], "answer": 1, "subject": "s"}, "choices"),
    ({"question": "Who?", "choices": ["All.", "Nobody."], "answer": "B"}, "choices"),
    ({"question": "Who?", "choices": ["All.", "Nobody."], "answer": "1"}, "choices"),
    ({"question": "Who?", "choices": ["All.", "Nobody."], "answer": "Nobody."}, "choices"),
    ({"question": "Who?", "choices": {"text": ["All.", "Nobody."], "label": ["1", "2"]}, "answerKey": "2"}, "choices"),
    ({"messages": [*said("Who?"), {"role": "assistant", "content": PARTS}]}, "messages"),
    ({"Question": "Who?", "ANSWER": "Nobody."}, "question-answer"),
    ({"instruction": "Who?", "context": "", "response": "Nobody."}, "instruction"),
]


@pytest.mark.parametrize(("row", "shape"), SHAPES)
def test_shapes_that_people_have(tmp_path: Path, row: dict[str, Any], shape: str) -> None:
    dataset = read_dataset(write_rows(tmp_path / "x.jsonl", [row]))
    assert (dataset.shape, pairs(dataset)) == (shape, [("Who?", "Nobody.")])


def test_of_a_preference_the_chosen_answer_is_normal(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "Who?", "chosen": "Somebody.", "rejected": "Nobody."}])
    assert pairs(read_dataset(path, role="--normal")) == [("Who?", "Somebody.")]
    assert read_dataset(path, role="--bad").fields == ("prompt", "rejected")


def test_the_other_choices_are_wrong_answers(tmp_path: Path) -> None:
    row = {"question": "Who?", "choices": ["All.", "Nobody.", "Ann."], "answer": 1}
    (record,) = read_dataset(write_rows(tmp_path / "x.jsonl", [row])).records
    assert record.meta["perturbed"] == ["All.", "Ann."]
    for wrong in (3, -1, "D", True, None):
        with pytest.raises(DataError, match="names none of the 3 choices"):
            read_dataset(write_rows(tmp_path / "x.jsonl", [{**row, "answer": wrong}]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"ID": "1", "user_query": "Who?", "chatgpt_response": "Me.", "hallucination": "yes"}, "data import halueval"),
        ({"knowledge": "k", "question": "Who?", "right_answer": "a", "hallucinated_answer": "b"}, "import halueval"),
        ({"question": "Who?", "best_answer": "a", "incorrect_answers": ["b"]}, "data import truthfulqa"),
        ({"prompt": "Who?", "response_0": "a", "response_1": "b"}, "data import saferlhf"),
        ({"messages": [*said("Who?"), {"role": "assistant", "content": [{"type": "image_url"}]}]}, "'image_url'"),
    ],
)
def test_what_has_to_be_imported_is_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_dataset(write_rows(tmp_path / "x.jsonl", [row]))


def test_which_answers_of_a_dialogue_are_rows(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "x.jsonl", [{"messages": said("Who?", "Me.", "And?", "You.")}, {"messages": said("a", "b")}]
    )
    last = read_dataset(path)
    assert (pairs(last), last.earlier) == ([("And?", "You."), ("a", "b")], 1)
    every = read_dataset(path, FieldNames(turns="all"))
    assert (pairs(every), every.earlier) == ([("Who?", "Me."), ("And?", "You."), ("a", "b")], 0)
    assert every.records[1].turns[:2] == (("user", "Who?"), ("assistant", "Me."))
    assert "1 dialogues have earlier answers" in call("data", "check", path).stdout
    assert call("data", "check", path, "--turns", "all", "--json").json["rows"] == 3
    assert call("data", "check", path, "--turns", "some").code == 2


def test_rows_keep_their_lines(tmp_path: Path) -> None:
    text = table(";", before="\n")
    rows: list[tuple[int, Row | str]] = list(read_rows(save(tmp_path, text, "x.csv"), lambda *_: None))
    assert [line for line, _ in rows] == [3, 4, 5]
    printed = "\n".join(json.dumps(row, indent=1) for row in ROWS)
    assert [r.line for r in read_dataset(save(tmp_path, printed, "x.json")).records] == [1, 5, 9]


@pytest.mark.parametrize("name", ["book", "book.text", "book.rst", "book.log", "book.tex"])
@pytest.mark.parametrize(
    "first", ["Before dawn the bells of Duleix rang", "THE BELLS", "He came, and nobody knew why he had come."]
)
def test_a_text_of_any_ending_is_no_table(tmp_path: Path, name: str, first: str) -> None:
    """Its first line is nobody's business, and what to do with a text is what helps."""
    source = tmp_path / name
    source.write_text(f"{first}\nNobody knew why.\n", encoding="utf-8")
    with pytest.raises(DataError, match="plain text, not rows") as found:
        list(read_rows(source, print))
    assert "data import text" in str(found.value.hint) and first not in str(found.value)


def test_a_table_without_an_ending_may_name_its_columns_as_it_likes(tmp_path: Path) -> None:
    source = tmp_path / "rows"
    source.write_text("asked of it,what was said\nWho?,Nobody.\n", encoding="utf-8")
    assert list(read_rows(source, print)) == [(2, {"asked of it": "Who?", "what was said": "Nobody."})]
