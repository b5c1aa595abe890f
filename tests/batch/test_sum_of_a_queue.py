"""The runs of a queue merged into one model, and that model audited with all of their bad rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import call, write_rows

from qunlearn.sandbox import ASSETS, data_file

ROWS = 16


@pytest.mark.slow
def test_a_queue_is_merged_and_the_sum_audited(tmp_path: Path) -> None:
    """Both requests' rows are asked of the merged model, and of the base they were gone into."""
    rows = [json.loads(line) for line in data_file("hallucination", "forget").read_text(encoding="utf-8").splitlines()]
    bad = {
        name: write_rows(tmp_path / f"{name}.jsonl", part)
        for name, part in {"first": rows[:ROWS], "second": rows[ROWS : 2 * ROWS]}.items()
    }
    queue = write_rows(tmp_path / "requests.jsonl", [{"bad": str(file)} for file in bad.values()])
    flags = ("--model", "sandbox", "--device", "cpu", "--normal", data_file("hallucination", "retain"))
    flags += ("--normal-count", "64", "--reworded", "0")
    assert call("batch", queue, *flags, "-o", tmp_path / "queue").code in (0, 5)

    merged = tmp_path / "merged"
    runs = [tmp_path / "queue" / name for name in bad]
    assert call("merge", *runs, "-o", merged, "--device", "cpu").code in (0, 5)

    every = write_rows(tmp_path / "every.jsonl", rows[: 2 * ROWS])
    asked = ("--forget", every, "--original", ASSETS / "model", "--budget", "quick", "--only", "formats.open")
    ran = call("audit", merged, *asked, "-o", tmp_path / "audit", "--device", "cpu", "--json")
    assert ran.code in (0, 5), ran.stderr
    assert ran.json["facts"] == 2 * ROWS
    (row,) = (row for row in ran.json["rows"] if row["format"] == "open")
    shares = {subject: share["mean"] for subject, share in row["shares"].items()}
    assert shares["original"] >= 0.9 and shares["unlearned"] <= 0.1
