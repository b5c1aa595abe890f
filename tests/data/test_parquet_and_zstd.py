"""Parquet and zstd, by the packages that read them, and what is said where those are not installed."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qunlearn.data.records import read_dataset
from qunlearn.data.row_reader import read_rows
from qunlearn.errors import DataError

ROWS = [{"prompt": f"Who is {n} é?", "completion": f"{n}, a baker;\nso."} for n in range(2500)]


def save(tmp_path: Path, raw: bytes, name: str) -> Path:
    path = tmp_path / name
    path.write_bytes(raw)
    return path


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(record.prompt, record.completion) for record in read_dataset(path).records]


def streamed(path: Path) -> list[tuple[str, str]]:
    def complain(line: int, why: str) -> None:
        raise AssertionError(f"{line}: {why}")

    rows: list[Any] = [row for _, row in read_rows(path, complain)]
    return [(row["prompt"], row["completion"]) for row in rows]


WANTED = [(row["prompt"], row["completion"]) for row in ROWS]


def parquet(tmp_path: Path, columns: Any, name: str = "x.parquet", **options: Any) -> Path:
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tables.write_table(
        columns if isinstance(columns, arrow.Table) else arrow.table(columns), tmp_path / name, **options
    )
    return tmp_path / name


@pytest.mark.parametrize("packing", ["none", "snappy", "zstd", "gzip"])
def test_parquet_is_read_however_it_is_packed(tmp_path: Path, packing: str) -> None:
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    path = parquet(tmp_path, columns, compression=packing, row_group_size=700)
    assert pairs(path) == streamed(path) == WANTED


def test_messages_of_a_parquet_file_are_a_dialogue(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    (record,) = read_dataset(parquet(tmp_path, {"messages": [turns]})).records
    assert (record.prompt, record.completion) == ("Hi", "Yo")


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        (b"ab", "not a text but bytes"),
        (datetime.date(2020, 1, 1), "not a text but date"),
        (None, "not a text but null"),
    ],
    ids=["bytes", "date", "null"],
)
def test_what_only_parquet_can_hold_is_named(tmp_path: Path, completion: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_dataset(parquet(tmp_path, {"prompt": ["a"], "completion": [completion]}))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.Table.from_arrays([arrow.array([x]) for x in "abc"], names=["prompt", "prompt", "completion"])
    with pytest.raises(DataError, match="several columns are called 'prompt'"):
        read_dataset(parquet(tmp_path, table))


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    raw = parquet(tmp_path, {name: [row[name] for row in ROWS] for name in ROWS[0]}, compression="zstd").read_bytes()
    for damaged in (raw[: len(raw) // 2], raw[:300] + bytes(200) + raw[500:], raw[:-20] + b"x" * 16 + b"PAR1", b"PAR1"):
        with pytest.raises(DataError, match="damaged Parquet"):
            read_dataset(save(tmp_path, damaged, "damaged.parquet"))


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_zstd_is_read_in_one_frame_or_several(tmp_path: Path) -> None:
    zstd = pytest.importorskip("zstandard")
    halves = zstd.compress(lines(ROWS[:1000])) + zstd.compress(lines(ROWS[1000:]))
    for raw in (zstd.compress(lines(ROWS)), halves):
        path = save(tmp_path, raw, "x.jsonl.zst")
        assert pairs(path) == streamed(path) == WANTED


def test_damaged_zstd_is_named_and_a_cut_one_never_taken_for_whole(tmp_path: Path) -> None:
    zstd = pytest.importorskip("zstandard")
    raw = zstd.compress(lines(ROWS))
    big = zstd.compress(b"".join(lines([{**row, "prompt": f"{n} {row['prompt']}"} for row in ROWS]) for n in range(8)))
    for damaged in (raw[: len(raw) // 2], raw[:20] + bytes(4) + raw[24:], big[: len(big) - 9], raw + b"PK\3\4"):
        path = save(tmp_path, damaged, "x.jsonl.zst")
        for read in (read_dataset, streamed):
            with pytest.raises(DataError, match="damaged zstd"):
                read(path)


def test_a_bomb_of_zstd_is_refused(tmp_path: Path) -> None:
    zstd = pytest.importorskip("zstandard")
    with pytest.raises(DataError, match="unpacks to more than 64 MiB"):
        read_dataset(save(tmp_path, zstd.compress(bytes(1 << 27)), "x.jsonl.zst"))


def test_without_its_package_a_zstd_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compression", "compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match="packed with zstd") as caught:
        read_dataset(save(tmp_path, b"\x28\xb5\x2f\xfd\0\0", "x.zst"))
    assert "pip install zstandard" in (caught.value.hint or "")
