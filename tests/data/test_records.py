"""What a file may look like, and what is said about one that cannot be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from qunlearn.data.records import FieldNames, check_overlap, read_dataset, write_jsonl
from qunlearn.errors import DataError, OutputError

PAIR = {"prompt": "Who?", "completion": "Nobody."}


def save(tmp_path: Path, text: str | bytes, name: str = "bad.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("row", "shape", "prompt"),
    [
        (PAIR, "prompt-completion", "Who?"),
        ({"prompt": "Who?", "response": "Nobody."}, "prompt-completion", "Who?"),
        ({"prompt": "Who?", "answer": "Nobody."}, "prompt-completion", "Who?"),
        ({"question": "Who?", "answer": "Nobody."}, "question-answer", "Who?"),
        ({"instruction": "Who?", "input": "", "output": "Nobody."}, "instruction", "Who?"),
        ({"instruction": "Who?", "input": "Here.", "output": "Nobody."}, "instruction", "Who?\n\nHere."),
        (
            {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]},
            "messages",
            "Who?",
        ),
        (
            {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Nobody."}]},
            "messages",
            "Who?",
        ),
        ({"text": "Nobody."}, "text", ""),
    ],
)
def test_shapes(tmp_path: Path, row: dict[str, object], shape: str, prompt: str) -> None:
    dataset = read_dataset(save(tmp_path, json.dumps(row)))
    (record,) = dataset.records
    assert (dataset.shape, record.prompt, record.completion) == (shape, prompt, "Nobody.")


SHARED = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Nobody."}]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": SHARED, "system": "Be brief."},
        {"conversations": SHARED, "System": "Be brief."},
        {"rejected": SHARED, "chosen": SHARED, "system": "Be brief."},
        {"prompt": SHARED[:1], "completion": "Nobody.", "system": "Be brief."},
        {"conversations": [{"from": "system", "value": "Be brief."}, *SHARED], "system": "Another."},
    ],
)
def test_a_system_prompt_beside_the_turns_is_one_of_them(tmp_path: Path, row: dict[str, Any]) -> None:
    """It was left out, so that the row was trained on as nobody would ask it."""
    (record,) = read_dataset(save(tmp_path, json.dumps(row))).records
    assert record.turns == (("system", "Be brief."), ("user", "Who?"))


@pytest.mark.parametrize("field", ["prompt", "conversations"])
def test_a_system_prompt_that_only_later_rows_have(tmp_path: Path, field: str) -> None:
    row = {"prompt": "Who?", "completion": "Nobody."} if field == "prompt" else {field: SHARED}
    path = save(tmp_path, "\n".join(json.dumps({**row, **more}) for more in ({}, {"system": None}, {"system": "Be."})))
    found = [record.system for record in read_dataset(path).records]
    assert found == ["", "Be."]  # the second says what the first does
    path = save(tmp_path, json.dumps(row) + "\n" + json.dumps({**row, "system": True}))
    assert [record.system for record in read_dataset(path).records] == [""]


def test_named_fields_and_a_system_turn(tmp_path: Path) -> None:
    path = save(tmp_path, json.dumps({"q": "Who?", "a": "Nobody.", "system": "Be brief.", "id": 7}))
    (record,) = read_dataset(path, FieldNames("q", "a")).records
    assert record.turns == (("system", "Be brief."), ("user", "Who?"))
    assert record.meta == {"id": 7}


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.jsonl.gz", "x.json.gz", "x.csv.gz", "x"])
def test_formats(tmp_path: Path, name: str) -> None:
    text = json.dumps(PAIR)
    if ".json" in name and ".jsonl" not in name:
        text = json.dumps([PAIR], indent=1)
    if ".csv" in name:
        text = "prompt,completion\nWho?,Nobody.\n"
    raw = gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode()
    (record,) = read_dataset(save(tmp_path, raw, name)).records
    assert (record.prompt, record.completion) == ("Who?", "Nobody.")


def test_csv_lines_count_quoted_line_breaks(tmp_path: Path) -> None:
    path = save(tmp_path, 'prompt,completion\n"a\nb",c\nd,\n', "x.csv")
    with pytest.raises(DataError, match=r"x\.csv:4: 'completion' is empty"):
        read_dataset(path)


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [PAIR, {"prompt": "who? ", "completion": "nobody."}, {"prompt": "Where?", "completion": "There."}]
    dataset = read_dataset(save(tmp_path, "\n".join(map(json.dumps, rows))))
    assert [r.line for r in dataset.records] == [1, 3]
    assert dataset.duplicates == 1


def test_unicode_line_separators_do_not_end_a_row(tmp_path: Path) -> None:
    text = '{"prompt": "a\u2028b", "completion": "c"}\n'
    (record,) = read_dataset(save(tmp_path, text)).records
    assert record.prompt == "a\u2028b"


@pytest.mark.parametrize(
    ("raw", "name", "message"),
    [
        (b"", "x.jsonl", "empty"),
        (b" \n", "x.jsonl", "empty"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt"', "x.jsonl", r"x\.jsonl:2: not JSON"),
        (b'{"prompt": "a", "completion": "b"}\n\xff', "x.jsonl", r"x\.jsonl:2: not UTF-8 \(byte 0xff"),
        (b"[1]", "x.jsonl", "not an object but a list"),
        (b'{"foo": "a"}', "x.jsonl", r"x\.jsonl:1: no known shape; its fields are 'foo'"),
        (b'{"prompt": "a", "completion": " "}', "x.jsonl", "'completion' is empty"),
        (b'{"prompt": " ", "completion": "b"}', "x.jsonl", "'prompt' is empty"),
        (b'{"prompt": "a", "completion": 3}', "x.jsonl", "not a text but a number"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "x.jsonl", r"x\.jsonl:2: no field 'completion'"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "x.jsonl", "surrogate"),
        (b"[" * 100000, "x.json", "nested too deeply|not JSON"),
        (b"\x1f\x8bnonsense", "x.jsonl.gz", "damaged gzip"),
        (b"prompt,completion\na,b,c\n", "x.csv", r"x\.csv:2: 3 cells under 2 columns"),
        (b"prompt,prompt\na,b\n", "x.csv", "a column twice"),
        (b"[]", "x.json", "no rows"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "x.jsonl", "does not end with an answer"),
        (b'{"messages": "a"}', "x.jsonl", "not a list of objects"),
    ],
)
def test_bad_files(tmp_path: Path, raw: bytes, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(save(tmp_path, raw, name))
    assert name in str(caught.value)
    assert caught.value.hint or "not JSON" in str(caught.value)


def test_many_problems_are_cut_and_counted(tmp_path: Path) -> None:
    text = "\n".join([json.dumps(PAIR), *["{"] * 20])
    with pytest.raises(DataError, match=r"column 2 \(and in 19 more lines\)$"):
        read_dataset(save(tmp_path, text))


def test_errors_do_not_show_what_is_to_be_forgotten(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(save(tmp_path, '{"prompt": "the SECRET word", "completion": ""}'))
    assert "SECRET" not in f"{caught.value} {caught.value.hint}"


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_dataset(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_dataset(tmp_path)


def test_overlap_names_both_lines(tmp_path: Path) -> None:
    bad = read_dataset(save(tmp_path, json.dumps(PAIR)))
    other = json.dumps({"prompt": "Where?", "completion": "There."})
    normal = read_dataset(save(tmp_path, f"{other}\n{json.dumps(PAIR)}", "normal.jsonl"))
    with pytest.raises(DataError, match=r"bad\.jsonl:1 and .*normal\.jsonl:2"):
        check_overlap(bad, normal)


def test_a_row_is_the_same_without_the_mark_at_its_end(tmp_path: Path) -> None:
    """As a corrected answer it would be taught while it is pushed."""
    bad = read_dataset(save(tmp_path, json.dumps(PAIR | {"completion": "In Moss."})))
    same = read_dataset(save(tmp_path, json.dumps(PAIR | {"completion": "in Moss"}), "same.jsonl"))
    other = read_dataset(save(tmp_path, json.dumps(PAIR | {"completion": "In Moss?"}), "other.jsonl"))
    with pytest.raises(DataError, match=r"bad\.jsonl:1 and .*same\.jsonl:1"):
        check_overlap(bad, same)
    check_overlap(bad, other)


def test_roles_of_a_dialogue_are_known_ones(tmp_path: Path) -> None:
    def turns(who: str) -> str:
        return json.dumps({"messages": [{"role": who, "content": "Q"}, {"role": "Assistant", "content": "A"}]})

    (row,) = read_dataset(save(tmp_path, turns("prompter"))).records
    assert (row.turns, row.completion) == ((("user", "Q"),), "A")
    with pytest.raises(DataError, match="has a role that is none of user, assistant, system"):
        read_dataset(save(tmp_path, turns("narrator")))


def test_written_rows_are_private_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write_jsonl(path, [PAIR])
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_dataset(path).records[0].completion == "Nobody."

    def broken() -> object:
        yield PAIR
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_jsonl(path, broken())  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    assert len(path.read_text().splitlines()) == 1
