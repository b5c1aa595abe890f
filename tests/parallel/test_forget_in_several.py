"""Runs in several processes: equal to one process within rounding, and agreed on whatever happens to one of them."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, few, sets
from launched import Call, free_ports, launch
from safetensors.torch import load_file

from qunlearn.model import device
from qunlearn.objectives.table import OBJECTIVES
from qunlearn.sandbox import data_file
from qunlearn.utils.file_names import ADAPTER, METRICS, RECORD
from qunlearn.utils.staging import staging_folder

pytestmark = pytest.mark.medium

BAD, NORMAL = data_file("hallucination", "forget"), data_file("hallucination", "retain")
SHORT = {
    "train.steps": 4,
    "train.lr": 1e-2,
    "train.warmup": 1,
    "train.schedule": "constant",
    "train.batch_size": 5,
    "train.normal_batch_size": 7,
    "train.save_every": 2,
    "data.own_share": 0,
    "data.reworded": 0,
    "stop.check_every": 2,
    "stop.probe_rows": 16,
    "stop.table_rows": 8,
    "stop.max_drift": 9,
    "lora.r": 4,
}
QUICKLY = ("logodds", "mollm", "pdu")  # the default, separate gradients, multipliers steered at every step


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: False)


def line(folder: Path, objective: str = "logodds", *more: object, **settings: object) -> list[object]:
    changed = {**SHORT, "stop.check_every": 1} if objective == "pdu" else SHORT
    changed = changed | {key.replace("__", "."): value for key, value in settings.items()}
    return [
        *("forget", "--model", "sandbox", "--bad", BAD, "--normal", NORMAL, "-o", folder, "--device", "cpu"),
        *("--objective", objective, *sets(changed), *more),
    ]


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / METRICS).read_text().splitlines()]


_B = ".lora_B."  # where a fresh adapter is 0: all of it is training


def moved(run: Path) -> bool:
    """Return whether the adapter that was kept is another than the fresh one."""
    return any(bool(t.any()) for n, t in load_file(run / ADAPTER / "adapter_model.safetensors").items() if _B in n)


def same(one: Path, other: Path, *, rounding: float = 2e-3) -> None:
    """The same steps, decisions and adapter, within rounding."""
    for ours, theirs in zip(map(_flat, events(one)), map(_flat, events(other)), strict=True):
        assert ours == pytest.approx(theirs, rel=rounding, abs=1e-5)
    a, b = (load_file(folder / ADAPTER / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    trained = [name for name in a if _B in name]
    far, long = (
        sum(float(t.square().sum()) for t in x) for x in ([a[n] - b[n] for n in trained], [b[n] for n in trained])
    )
    assert far <= rounding**2 * long
    first, second = (json.loads((folder / RECORD).read_text()) for folder in (one, other))
    for key in ("status", "stop_reason", "verdicts", "not_reached"):
        assert first[key] == second[key]
    assert first["training"]["steps"] == second["training"]["steps"]


def _flat(event: dict[str, Any]) -> dict[str, float]:
    """The numbers of a step, but for how long it took."""
    out: dict[str, float] = {}
    for name, value in event.items():
        if isinstance(value, dict):
            out |= {f"{name}.{inner}": number for inner, number in _flat(value).items()}
        elif name not in ("seconds", "tokens_per_s", "tokens"):
            out[name] = value
    return out


@pytest.mark.parametrize(
    ("count", "objectives"), [(2, QUICKLY), *(pytest.param(n, (*OBJECTIVES,), marks=pytest.mark.slow) for n in (2, 3))]
)
def test_equal_to_one_process(count: int, objectives: Sequence[str], tmp_path: Path) -> None:
    files = ("--bad", few(tmp_path, BAD), "--normal", few(tmp_path, NORMAL, 24))
    for name in objectives:
        assert call(*line(tmp_path / f"one-{name}", name, *files)).code in (0, 5)
    told = launch(count, tmp_path, [Call(line(tmp_path / name, name, *files)) for name in objectives])
    for n, name in enumerate(objectives):
        assert [process[n]["code"] in (0, 5) for process in told] == [True] * count, told[0][n]["stderr"]
        assert {process[n]["stderr"] + process[n]["stdout"] for process in told[1:]} == {""}
        same(tmp_path / name, tmp_path / f"one-{name}")
        assert moved(tmp_path / name) or name not in QUICKLY
        assert json.loads((tmp_path / name / RECORD).read_text())["training"]["processes"] == count
        assert not staging_folder(tmp_path / name).exists()


@pytest.mark.slow
def test_with_rows_of_its_own_cached_and_measured(tmp_path: Path) -> None:
    """What the base makes is the main process's; a cache is filled once; measuring divides its rows."""
    own = ["--set", "data.own_share=0.5", "--set", "data.normal_count=32", "--set", "data.reworded=8"]
    more = [*own, "--reference", "cached", "--set", "stop.eval_every=2", "--json"]
    assert call(*line(tmp_path / "one", "llmu", *more)).code in (0, 5)
    told = launch(2, tmp_path, [Call(line(tmp_path / "two", "llmu", *more))])
    assert told[1][0] == {"code": told[0][0]["code"], "stdout": "", "stderr": ""}
    assert json.loads(told[0][0]["stdout"])["training"]["processes"] == 2
    assert (tmp_path / "one" / "normal.jsonl").read_text() == (tmp_path / "two" / "normal.jsonl").read_text()
    same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_what_happens_to_one_is_agreed_on_by_all(tmp_path: Path) -> None:
    """Out of memory, a number that is not finite, a signal, an error, in one process: all do the same, or end."""
    names = ["memory", "skip", "stop", "stop-main", "none-fits", "error", "refused", "alone"]
    run = {name: tmp_path / name for name in names}
    calls = {
        "memory": Call(line(run["memory"], train__max_tokens=512), "out of memory at step 2", [1]),
        "skip": Call(line(run["skip"]), "not finite at step 2", [1]),
        "stop": Call(line(run["stop"]), "SIGTERM at step 3", [1]),
        "stop-main": Call(line(run["stop-main"]), "SIGTERM at step 3", [0]),
        "none-fits": Call(line(run["none-fits"]), "always out of memory", [1]),
        "error": Call(line(run["error"]), "an error before training", [1]),
        "refused": Call(["forget", "--model", "sandbox", "--bad", run["refused"]]),
        "alone": Call(["models"]),
    }
    main, other = (dict(zip(names, told, strict=True)) for told in launch(2, tmp_path, [*calls.values()]))
    assert [e for e in events(run["memory"]) if "max_tokens" in e] == [{"step": 2, "max_tokens": 256}]
    assert main["memory"]["code"] == other["memory"]["code"] in (0, 5)
    assert json.loads((run["skip"] / RECORD).read_text())["training"]["skipped"] == 1
    for name in ("stop", "stop-main"):
        record = json.loads((run[name] / RECORD).read_text())
        assert (record["status"], record["training"]["steps"]) == ("interrupted", 3)
        assert main[name]["code"] == other[name]["code"] == 130
    assert main["none-fits"]["code"] == other["none-fits"]["code"] == 4  # not even single rows do
    assert (main["error"]["code"], other["error"]["code"]) == (8, 3)
    assert "process 1: error: test: this one cannot go on" in other["error"]["stderr"]
    assert "process 1 has ended: test: this one cannot go on" in main["error"]["stderr"]
    assert main["refused"]["code"] == 3 and "no such file" in main["refused"]["stderr"]
    assert other["refused"]["stderr"] == other["refused"]["stdout"] == ""
    assert (main["alone"]["code"], other["alone"]) == (2, {"code": 2, "stdout": "", "stderr": ""})
    assert "models runs in one process; 2 were launched" in main["alone"]["stderr"]
    for name in ("none-fits", "error", "refused"):
        assert not run[name].exists() and not staging_folder(run[name]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_is_killed_and_another_number_goes_on(killed: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    told = launch(3, tmp_path, [Call(line(run), "SIGKILL at step 4", [killed])])
    assert launch.codes[killed] == -9  # type: ignore[attr-defined]
    left = [process[0] for n, process in enumerate(told) if n != killed]
    assert [one["code"] for one in left] == [8, 8]
    assert all("a process of this run is gone" in one["stderr"] for one in left)
    assert not run.exists() and staging_folder(run).exists()
    told = launch(2, tmp_path, [Call(line(run, "logodds", "--resume"))])
    assert told[0][0]["code"] in (0, 5) and "resuming after step 2" in told[0][0]["stderr"]
    assert "processes 3 then, 2 now" in told[0][0]["stderr"]
    assert call(*line(tmp_path / "one")).code in (0, 5)
    same(run, tmp_path / "one")
    assert moved(run)


def test_torch_is_left_as_it_was() -> None:
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_any_process_is_killed_at_any_moment(tmp_path: Path) -> None:
    """Twenty times, either of two: what is left goes on, here in one process, to the same result."""
    assert call(*line(tmp_path / "one")).code in (0, 5)
    rng, killed = random.Random(0), 0
    for turn in range(20):
        run = tmp_path / f"run-{turn}"
        told = launch(2, tmp_path, [Call(line(run), str(rng.randint(1, 60)), [turn % 2])])
        if launch.codes[turn % 2] == -signal.SIGKILL:  # type: ignore[attr-defined]
            killed += 1
            assert run.exists() or told[1 - turn % 2][0]["code"] == 8
        assert call(*line(run, "logodds", "--resume")).code in (0, 5)
        same(run, tmp_path / "one")
        assert not staging_folder(run).exists()
    assert killed >= 10


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_machines_by_a_launcher(launcher: str, tmp_path: Path) -> None:
    """As the guide has it: a process for a machine, both on this one, and a port where they meet."""
    port, started = free_ports(1)[0], []
    bin_folder = Path(sys.executable).parent
    for number in (0, 1):
        if launcher == "torchrun":
            how = [bin_folder / "torchrun", "--nnodes", 2, "--nproc_per_node", 1, "--node_rank", number]
            how += ["--master_addr", "127.0.0.1", "--master_port", port]
        else:
            how = [bin_folder / "accelerate", "launch", "--multi_gpu", "--num_machines", 2, "--num_processes", 2]
            how += ["--machine_rank", number, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        command = [*map(str, [*how, "-m", "qunlearn", *line(tmp_path / "run", stop__rows_left=1.0, stop__target=0.9)])]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=500)[0] for process in started]
    assert (tmp_path / "run" / RECORD).is_file(), said[0]
    assert json.loads((tmp_path / "run" / RECORD).read_text())["training"]["processes"] == 2
    assert "stopped after" in said[0] and "stopped after" not in said[1]
