"""The files of a run, found again: other bytes at the same path are not the run's rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from qunlearn.data.records import read_dataset
from qunlearn.errors import DataError
from qunlearn.evaluation.request import EvalRequest, _own_files
from qunlearn.merging.request import MergeOptions, MergeRequest, merge_source
from qunlearn.runs.folder import open_run
from qunlearn.runs.recorded_files import recorded

ROWS = '{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A run folder without weights, and its bad file."""
    bad, folder = tmp_path / "bad.jsonl.gz", tmp_path / "run"
    bad.write_bytes(gzip.compress(ROWS.encode()))
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    said = {"path": str(bad), "sha256": read_dataset(bad).sha256}
    (folder / "record.json").write_text(json.dumps({"data": {"bad": said}}), encoding="utf-8")
    return folder, bad


def test_the_same_bytes_are_used_and_others_are_not(made: tuple[Path, Path]) -> None:
    folder, bad = made
    run = open_run(folder)
    assert recorded(run, "bad").usable == bad
    bad.write_bytes(gzip.compress(ROWS.encode(), compresslevel=1))  # packed otherwise: the same rows
    assert recorded(run, "bad").usable == bad
    bad.write_bytes(ROWS.replace("b", "c").encode())
    assert (recorded(run, "bad").usable, recorded(run, "bad").why) == (None, "has changed since the run")
    bad.write_bytes(b"")
    assert recorded(run, "bad").why.startswith("cannot be read")
    bad.unlink()
    assert recorded(run, "bad").why == "is not where the run found it"
    assert recorded(run, "holdout").why == "is not known"


def test_merge_does_not_measure_the_next_batch(made: tuple[Path, Path]) -> None:
    folder, bad = made
    assert merge_source(folder, MergeOptions()).forget_rows == read_dataset(bad)
    bad.write_text(ROWS + ROWS.replace("a", "z"), encoding="utf-8")
    source = merge_source(folder, MergeOptions())
    assert (source.forget_rows, source.no_bad) == (None, "has changed since the run")
    source = merge_source(folder, MergeOptions(bad=bad))  # asked for
    assert source.forget_rows is not None and len(source.forget_rows.records) == 2


def test_a_gate_that_was_asked_for_needs_rows(made: tuple[Path, Path]) -> None:
    """It let a merge pass that nothing had been measured of."""
    folder, bad = made
    bad.unlink()

    def request(*gate: str) -> MergeRequest:
        return MergeRequest((merge_source(folder, MergeOptions()),), None, "original", folder, True, gate)  # type: ignore[arg-type]

    request().check_gate()
    with pytest.raises(DataError, match="nothing to measure"):
        request("nf4").check_gate()


def test_what_is_not_measured_is_not_read(made: tuple[Path, Path]) -> None:
    folder, bad = made
    bad.write_text("{no json", encoding="utf-8")
    source = merge_source(folder, MergeOptions(measure=False))
    assert (source.forget_rows, source.retain_rows) == (None, None)


def test_eval_of_a_run_refuses_other_rows(made: tuple[Path, Path]) -> None:
    folder, bad = made
    bad.write_text(ROWS.replace("a", "A"), encoding="utf-8")
    with pytest.raises(DataError, match="has changed since the run") as caught:
        EvalRequest.check(folder, None, {})
    assert f"--forget {bad}" in str(caught.value.hint)


def test_eval_of_a_run_says_which_of_its_files_has_moved(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """With a holdout beside it nothing had said that what should be gone was not asked for."""
    folder, bad = made
    record, holdout = json.loads((folder / "record.json").read_text()), bad.with_name("holdout.jsonl")
    holdout.write_text(ROWS, encoding="utf-8")
    record["data"]["holdout"] = {"path": str(holdout), "sha256": None}
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    bad.rename(bad.with_name("moved"))
    assert _own_files(open_run(folder)) == {"holdout": holdout}
    assert f"{bad} is not where the run found it" in capsys.readouterr().err
