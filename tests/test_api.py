"""The public functions do what the commands of the same names do, and errors come as named exceptions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, few, write_rows

import qunlearn
from qunlearn import evaluate, forget, merge, open_run
from qunlearn.api import audit, compare
from qunlearn.errors import ConfigError, ModelError
from qunlearn.sandbox import data_file


def test_a_run_an_evaluation_and_a_merge(tmp_path: Path, quick_run: Path) -> None:
    rows = [{"prompt": f"What is {n} and 1?", "completion": f"It is {n + 1}."} for n in range(2)]
    settings = {key: value for key, value in QUICK.items() if key not in ("train.steps", "data.reworded")}
    settings |= {"stop.table_rows": 4, "data.own_share": 0}
    normal = data_file("code", "retain")
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(qunlearn.errors.QunlearnError, match="knows none"):
        forget("sandbox", bad, tmp_path / "run", normal=normal, steps=3, reworded=0, set=settings)
    bad = few(tmp_path, data_file("code", "forget"))
    run = forget("sandbox", bad, tmp_path / "run", normal=normal, steps=3, reworded=0, set=settings)
    assert run.adapter == tmp_path / "run" / "adapter"
    assert run.record["training"]["steps"] == 3
    assert open_run(tmp_path / "run").record == run.record

    found = evaluate(quick_run, retain=data_file("hallucination", "retain"), rows=4, output=tmp_path / "eval")
    assert found["files"]["retain"]["rows"] == 4
    assert (tmp_path / "eval" / "eval.json").is_file()

    report = merge([quick_run], tmp_path / "merged", measure=False, device="cpu")
    assert (tmp_path / "merged" / "config.json").is_file()
    assert report.as_dict()["request"]["output"] == str(tmp_path / "merged")
    report.raise_if_back()  # nothing was measured, so nothing came back


def test_errors_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stepz"):
        forget("sandbox", data_file("code", "forget"), tmp_path / "run", stepz=3)
    with pytest.raises(ModelError):
        forget(str(tmp_path / "nothing"), data_file("code", "forget"), tmp_path / "run")
    with pytest.raises(ConfigError, match="neither"):
        evaluate(forget=data_file("code", "forget"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda run, out: open_run(None), "open_run(folder): must be a path; it is of type NoneType"),
        (lambda run, out: merge([], out), "merge: no run was named"),
        (lambda run, out: merge(run, out), "merge(runs): must be a list of paths"),
        (lambda run, out: merge([run], out, gate=["nf4"]), "merge(gate): must be a text"),
        (lambda run, out: evaluate(run, rows=0), "evaluate(rows): must be at least 1"),
        (lambda run, out: evaluate(run, rows="3"), "evaluate(rows): must be a whole number"),
        (lambda run, out: evaluate(run, forget=[{"prompt": "secret"}]), "evaluate(forget): must be a path"),
        (lambda run, out: audit(run, output=out, seed=-1), "--seed: must be between 0"),
        (lambda run, out: audit(run, output=out, tolerance=True), "audit(tolerance): must be a number"),
        (lambda run, out: compare(None), "compare(runs): must be a list of paths"),
        (lambda run, out: forget("sandbox", run, None), "forget(output): must be a path"),
        (lambda run, out: forget("sandbox", run, out, set={3: 4}), "forget(set): must be a dict"),
    ],
)
def test_odd_arguments_are_refused_by_name(
    call: Callable[[Any, Path], object], says: str, quick_run: Path, tmp_path: Path
) -> None:
    """They had ended as Python's own errors, somewhere within; a folder `None` was trained into."""
    with pytest.raises(ConfigError) as caught:
        call(quick_run, tmp_path / "out")
    assert str(caught.value).startswith(says) and caught.value.hint and "secret" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_path_names_a_model_too(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        evaluate(model=tmp_path / "nothing", forget=data_file("code", "forget"))  # type: ignore[arg-type]


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = "import qunlearn, sys; qunlearn.forget; assert 'torch' not in sys.modules; print(sorted(qunlearn.__all__))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "['evaluate', 'forget', 'merge', 'open_run']"
    assert set(qunlearn.__all__) <= set(dir(qunlearn))
    with pytest.raises(AttributeError, match="forgive"):
        qunlearn.forgive  # noqa: B018
