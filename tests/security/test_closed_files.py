"""Files and folders that the user may not read or write: each is named, with what to do; nothing is written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_rows

from qunlearn.sandbox import ASSETS, data_file

# Root reads everything, unless it gives that up.
_AS_ANYBODY = (
    [] if not hasattr(os, "geteuid") or os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
)
pytestmark = pytest.mark.skipif(
    os.name == "nt" or bool(_AS_ANYBODY and not shutil.which("setpriv")), reason="root without setpriv reads everything"
)


def qunlearn(*arguments: object) -> tuple[int, str]:
    """Exit code and output of `qunlearn ARGUMENTS` as a user whom permissions bind."""
    command = [*_AS_ANYBODY, sys.executable, "-m", "qunlearn", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return ran.returncode, ran.stdout + ran.stderr


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Files and folders without any permission, opened again for whoever cleans up."""
    model = ASSETS / "model"
    places = {
        "data": write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}]),
        "config": tmp_path / "without_config" / "config.json",
        "weights": tmp_path / "without_weights" / "model.safetensors",
        "folder": tmp_path / "closed",
    }
    for name in ("config", "weights"):
        shutil.copytree(model, places[name].parent)
    places["folder"].mkdir()
    for place in places.values():
        place.chmod(0)
    yield places
    for place in places.values():
        place.chmod(0o700)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("data check {data}", 3, "bad.jsonl: cannot be read: Permission denied"),
        ("data import text {data} -o {out}", 3, "bad.jsonl: cannot be read: Permission denied"),
        ("forget --model sandbox --bad {data} -o {out}", 3, "bad.jsonl: cannot be read: Permission denied"),
        (
            "plan --model {config.parent}",
            6,
            "config.json: cannot be read: Permission denied\n  hint: check its permissions",
        ),
        ("forget --model {weights.parent} --bad {rows}", 6, "model.safetensors: cannot be read: Permission denied"),
        (
            "plan --model {folder}/model",
            6,
            "cannot be reached: Permission denied\n  hint: check the permissions of the",
        ),
        ("forget --model sandbox --bad {rows} -o {folder}/out", 9, "closed/out: cannot be written: Permission denied"),
        ("data import text {rows} -o {folder}/o.jsonl", 9, "cannot be written: Permission denied"),
        ("runs {folder}", 2, "not readable"),
    ],
)
def test_what_is_closed_is_named(tmp_path: Path, closed: dict[str, Path], command: str, code: int, said: str) -> None:
    rows, out = data_file("hallucination", "forget"), tmp_path / "out"
    found, text = qunlearn(*(part.format(**closed, rows=rows, out=out) for part in command.split()))
    assert (found, said in text) == (code, True), text
    assert text.count("error: ") + text.count("─ Error") == 1
    assert not out.exists()
