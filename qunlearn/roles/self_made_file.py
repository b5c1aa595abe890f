"""Read and write the rows that a base has generated (`normal.jsonl`)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from qunlearn.data.records import Dataset, Record, asking, write_jsonl
from qunlearn.utils.json_files import LARGE_BYTES, read_text


def write_self_made(path: Path, records: Iterable[Record]) -> None:
    """Write rows for their owner's eyes only, whole or not at all. Raises OutputError."""
    write_jsonl(path, map(_row, records))


def _row(record: Record) -> dict[str, str]:
    if not record.turns:
        return {"text": record.completion}
    system = {"system": record.system} if record.system else {}
    return {**system, "prompt": record.prompt, "completion": record.completion}


def read_self_made(path: Path) -> Dataset:
    """The rows as the run had them. A model may say what no file of a user's should hold, a NUL for one.

    Raises OSError, ValueError, KeyError, TypeError for a file that is none of ours.
    """
    rows = [json.loads(line) for line in read_text(path, LARGE_BYTES).split("\n") if line]
    records = tuple(
        Record((), str(row["text"]), i, {})
        if "text" in row
        else Record(asking(str(row["prompt"]), str(row.get("system", ""))), str(row["completion"]), i, {})
        for i, row in enumerate(rows, 1)
    )
    return Dataset(str(path), records, "", (), "", 0)
