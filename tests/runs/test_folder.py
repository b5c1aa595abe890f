"""What is said of a path that is no run: what is there, and which run may have been meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import call

from qunlearn.errors import AdapterError
from qunlearn.runs.folder import open_run
from qunlearn.utils.staging import staging_folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a run in it, an empty folder and a model."""
    for name in ("llama-bad", "model"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "llama-bad" / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "runs" / "llama-bad" / "record.json").write_text("{}", encoding="utf-8")
    (tmp_path / "runs" / "llama-bad" / "audit").mkdir()
    (tmp_path / "runs" / "model" / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("name", "what", "meant"),
    [
        (".", "but runs", "give one of them: {run}"),
        ("llama-bat", "no such folder", "did you mean {run}?"),
        ("other", "no such folder", "give the folder that `qunlearn forget` wrote"),
        ("llama-bad/record.json", "is a file", "the run is {run}"),
        ("llama-bad/audit", "the folder is empty", "the run is {run}"),
        ("model", "which is a model", "give the folder that `qunlearn forget` wrote"),
    ],
)
def test_what_is_there_is_said_and_what_to_give(runs: Path, name: str, what: str, meant: str) -> None:
    with pytest.raises(AdapterError) as caught:
        open_run(runs / name)
    assert what in caught.value.message and caught.value.hint == meant.format(run=runs / "llama-bad")


def test_an_unfinished_run_says_how_it_goes_on(runs: Path) -> None:
    stage = staging_folder(runs / "new")
    stage.mkdir()
    (stage / "unfinished.json").write_text("{}", encoding="utf-8")
    with pytest.raises(AdapterError, match="not finished") as caught:
        open_run(runs / "new")
    assert f"--resume -o {runs / 'new'}" in str(caught.value.hint)


def test_every_command_says_so(runs: Path) -> None:
    for command in (
        ["merge", runs, "-o", "x"],
        ["report", runs],
        ["compare", runs, runs / "llama-bad"],
        ["eval", runs],
    ):
        assert f"give one of them: {runs / 'llama-bad'}" in call(*command).stderr
    ran = call("eval", runs / "other")  # it said that nothing was there to measure
    assert ran.code == 6 and "no such folder" in ran.stderr
