"""`qunlearn merge` in several processes: one merges and writes, all measure, and the numbers are those of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import call
from launched import Call, launch

from qunlearn.model import device
from qunlearn.utils.output import MARK

pytestmark = pytest.mark.medium


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: False)


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """All numbers of a tree by where they are."""
    if isinstance(value, dict):
        return {place: found for key, inner in value.items() for place, found in flat(inner, f"{at}/{key}").items()}
    return {} if value is None else {at: value}


def test_measured_in_two_processes(quick_run: Path, tmp_path: Path) -> None:
    """Two runs into one model: the same files, table and exit code; a folder that is there is refused once."""
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        shutil.copytree(quick_run, run)
        path = run / "config.yaml"
        settings = path.read_text()
        assert "table_rows: 40" in settings
        path.write_text(settings.replace("table_rows: 40", "table_rows: 7"))
    line: list[object] = ["merge", *runs, "--gate", "nf4", "--device", "cpu", "--json", "-o"]
    one = call(*line, tmp_path / "one")
    main, other = launch(2, tmp_path, [Call([*line, tmp_path / "two"]), Call([*line, tmp_path / "two"])])
    assert main[0]["code"] == other[0]["code"] == one.code in (0, 5), main[0]["stderr"]
    assert (main[1]["code"], other[1]["code"]) == (9, 8) and "--overwrite" in main[1]["stderr"]
    assert {said["stdout"] + said["stderr"] for said in other} == {""}
    ours, theirs = json.loads(main[0]["stdout"]), one.json
    assert list(ours["scores"]) == ["base", "adapter", "merged", "nf4"] and ours["back"] == theirs["back"]
    assert flat(ours["scores"]) == pytest.approx(flat(theirs["scores"]), rel=1e-4)
    assert ours["divergence"] == pytest.approx(theirs["divergence"], rel=1e-4)
    assert (ours["tensors"], ours["weight_bytes"]) == (theirs["tensors"], theirs["weight_bytes"])
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.name != MARK} for name in ("one", "two")]
    assert files[0] == files[1] and "model.safetensors" in files[0]
