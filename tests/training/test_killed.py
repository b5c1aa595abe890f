"""SIGKILL while training, checkpointing, caching or importing: what is left goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import sets, write_rows
from test_resume import SMALL, files, same_result

from qunlearn.utils.staging import staging_folder

__all__ = ["files"]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
DRIVER = Path(__file__).with_name("kill_driver.py")
SETTINGS = {
    "live": {},
    "cached": {"train.reference": "cached", "train.max_tokens": 64},
    "adamw8bit": {"train.optimizer": "adamw8bit"},
}


def driven(kind: str, folder: Path, kills: int, *args: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, DRIVER, kind, folder, str(kills), "0", *map(str, args)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert len(told["states"]) == kills
    for state in told["states"]:
        assert state["signal"] == signal.SIGKILL, state
        assert state["again"] == 0, state
    return told


@pytest.mark.parametrize(
    ("setting", "kills"),
    [
        pytest.param("live", 1, marks=pytest.mark.slow),
        pytest.param("live", 50, marks=pytest.mark.slow),
        pytest.param("cached", 25, marks=pytest.mark.slow),
        pytest.param("adamw8bit", 12, marks=pytest.mark.slow),
    ],
)
def test_forget_is_killed(setting: str, kills: int, files: tuple[Path, Path], tmp_path: Path) -> None:
    args = ["forget", "--model", files[1].with_name("model"), "--bad", files[0], "--normal", files[1], "-o", "{out}"]
    told = driven("forget", tmp_path, kills, *args, "--device", "cpu", *sets({**SMALL, **SETTINGS[setting]}))
    for state in told["states"]:
        output = tmp_path / f"killed-{state['point']}"
        same_result(output, tmp_path / "whole")
        assert not staging_folder(output).exists() or output.name in state["found"]
        if setting == "cached":
            caches = [[*(tmp_path / f"{name}-cache").rglob("*.safetensors")] for name in (output.name, "whole")]
            assert len(caches[0]) == len(caches[1]) == 1 and caches[0][0].read_bytes() == caches[1][0].read_bytes()
    if kills > 10:
        going_on = ("resuming after step", "were there")
        assert sum(any(words in state["said"] for words in going_on) for state in told["states"]) >= kills / 2
        assert told["tries"] >= 1
        same_result(tmp_path / "chain", tmp_path / "whole")


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_an_import_is_killed(kills: int, tmp_path: Path) -> None:
    """Each file is not there, or whole; what is left over is private, and used up by the next attempt."""
    source = write_rows(
        tmp_path / "alpaca.jsonl",
        [
            {"instruction": f"Say {i}.", "input": "", "output": f"{i} it is, and {i * i} is its square."}
            for i in range(60)
        ],
    )
    names = [f"out.{part}.jsonl" for part in ("train", "test")]
    told = driven(
        "import", tmp_path, kills, "data", "import", "alpaca", source, "-o", "{out}/out.jsonl", "--split", "80/20"
    )
    whole = [(tmp_path / "whole" / name).read_bytes() for name in names]
    assert all(whole)
    for state in told["states"]:
        folder = tmp_path / f"killed-{state['point']}"
        assert [(folder / name).read_bytes() for name in names] == whole
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)
