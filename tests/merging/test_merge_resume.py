"""A merge that is stopped: by a kill, a full disk, a fault. Nothing half is taken for whole, and nothing done twice."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, call
from test_architectures import CONFIGS
from test_writer import WEIGHTS, make_adapter, make_base, merge
from transformers import AutoModelForCausalLM

from qunlearn.utils.staging import JOURNAL, staging_folder

# Runs `merge` once without a kill, counting what it does to the disk; then again for each kill, in a child that dies
# there, and once more for what is left. One process pays for the imports; it forks before torch starts threads.
_DRIVER = """
import json, os, signal, sys
from pathlib import Path
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
import torch
torch.set_num_threads(1)
from typer.testing import CliRunner
import qunlearn.merging.merge, qunlearn.merging.plan, qunlearn.merging.compute, qunlearn.merging.writer as writer
import qunlearn.merging.shard_file as shard_file
import qunlearn.utils.staging as staging
import qunlearn.utils.output
from qunlearn.cli.app import app
qunlearn.merging.plan.SHARD_BYTES = 60_000
qunlearn.merging.compute._RAW_BYTES = 20_000

class Count:
    events, limit = 0, None

def counted(owner, name):
    plain = getattr(owner, name)
    def wrapper(*args, **kwargs):
        Count.events += 1
        if Count.limit is not None and Count.events > Count.limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)
    setattr(owner, name, wrapper)

for owner, name in [(shard_file.ShardFile, "write"), (os, "fsync"), (Path, "rename"), (Path, "replace"),
                    (writer.shutil, "copyfile"), (writer, "write_json"), (staging, "write_json"),
                    (qunlearn.utils.output, "write_json")]:
    counted(owner, name)

def run(output, limit=None):
    child = os.fork()
    if not child:
        Count.events, Count.limit = 0, limit
        args = ["merge", str(folder / "adapter"), "-o", str(output), "--no-measure", "--device", "cpu"]
        result = CliRunner().invoke(app, args)
        (folder / "events").write_text(str(Count.events))
        os._exit(result.exit_code if result.exception is None or isinstance(result.exception, SystemExit) else 99)
    return os.waitpid(child, 0)[1]

assert run(folder / "whole") == 0
events = int((folder / "events").read_text())
points = sorted({round(i * (events - 1) / (kills - 1)) for i in range(kills)})
out = []
for point in points:
    output = folder / f"killed-{point}"
    status = run(output, point)
    stage = staging.staging_folder(output)
    kept = sorted(p.name for p in stage.iterdir()) if stage.is_dir() else []
    state = {"point": point, "signal": os.WTERMSIG(status), "placed": output.exists(), "kept": kept}
    state["again"] = run(output)
    state["again_events"] = int((folder / "events").read_text())
    out.append(state)
chain, tries = folder / "chain", 0
while run(chain, 28):
    tries += 1
    assert tries < 50
print(json.dumps({"events": events, "states": out, "tries": tries}))
"""


@pytest.fixture(scope="module")
def pair(sandbox_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("resume")
    base = make_base(folder / "base", CONFIGS["qwen2"], sandbox_folder, torch.bfloat16, max_shard_size="150KB")
    return base, make_adapter(folder / "adapter", base)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_killed_anywhere_and_resumed_is_byte_for_byte_an_uninterrupted_merge(pair: tuple[Path, Path]) -> None:
    folder = pair[1].parent
    done = subprocess.run([sys.executable, "-c", _DRIVER, str(folder), "10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    whole = content(folder / "whole")
    assert sum(name.endswith(".safetensors") for name in whole) > 4
    assert len(told["states"]) == 10
    saved = 0
    for state in told["states"]:
        last = state["point"] == told["events"] - 1
        assert state["signal"] == 9, state
        if state["placed"]:  # killed after the folder had its name: then it is whole
            assert last and content(folder / f"killed-{state['point']}") == whole
        else:
            names = set(state["kept"])
            assert "config.json" not in names or names >= set(whole) - {"config.json"}
        assert state["again"] == 0 or state["placed"], state
        assert content(folder / f"killed-{state['point']}") == whole, state
        saved += state["again_events"] < told["events"] - 10
        assert not staging_folder(folder / f"killed-{state['point']}").exists()
    assert saved >= len(told["states"]) / 2  # and the second time less was to do
    assert told["tries"] > 2, told["events"]
    assert content(folder / "chain") == whole
    AutoModelForCausalLM.from_pretrained(folder / "chain")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A disk that is full after so many writes; small shards, so that there are several."""
    from qunlearn.merging.shard_file import ShardFile

    left, plain = {"writes": 10**9}, ShardFile.write

    def write(self: Any, block: memoryview) -> None:
        left["writes"] -= 1
        if left["writes"] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, block)

    monkeypatch.setattr(ShardFile, "write", write)
    monkeypatch.setattr("qunlearn.merging.plan.SHARD_BYTES", 60_000)
    yield left


def stopped(pair: tuple[Path, Path], output: Path, full_disk: dict[str, int], writes: int) -> Ran:
    full_disk["writes"] = writes
    ran = merge(pair[1], output)
    full_disk["writes"] = 10**9
    assert ran.code == 9, ran.stderr
    assert "the disk is full" in ran.stderr and "Traceback" not in ran.stderr
    assert not output.exists()
    return ran


def test_a_disk_that_fills_up(pair: tuple[Path, Path], tmp_path: Path, full_disk: dict[str, int]) -> None:
    stopped(pair, tmp_path / "first", full_disk, 1)
    assert list(tmp_path.iterdir()) == []  # nothing was worth keeping
    ran = stopped(pair, tmp_path / "out", full_disk, 25)
    stage = staging_folder(tmp_path / "out")
    assert "finished files are kept in" in ran.stderr and str(stage) in ran.stderr.replace("\n", "")
    kept = {p.name for p in stage.iterdir()}
    assert JOURNAL in kept and "config.json" not in kept and not any(name.endswith(".part") for name in kept)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(stage)
    again = merge(pair[1], tmp_path / "out")
    assert again.code == 0 and "resuming" in again.stderr
    assert merge(pair[1], tmp_path / "whole").code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_a_finished_file_that_has_changed_is_made_again(
    pair: tuple[Path, Path], tmp_path: Path, full_disk: dict[str, int]
) -> None:
    stopped(pair, tmp_path / "out", full_disk, 25)
    shard = min(staging_folder(tmp_path / "out").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert merge(pair[1], tmp_path / "out").code == 0
    assert merge(pair[1], tmp_path / "whole").code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_flush_that_fails_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports a lost write once: to the flush in the background, and not to the one at the end."""
    from qunlearn.merging import shard_file as output

    told = []

    def fsync(_: int) -> None:
        if not told:
            told.append(1)
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(output.os, "fsync", fsync)
    monkeypatch.setattr(output, "_FLUSH_BYTES", 20)
    monkeypatch.setattr(output, "_STAGE_BYTES", 10)
    monkeypatch.delattr(output.os, "O_DIRECT", raising=False)
    file = output.ShardFile(tmp_path / "a")
    file.write(memoryview(bytes(20)))
    with pytest.raises(OSError, match="Input/output"):
        file.close()
    file.abandon()


def test_another_merge_does_not_go_on_with_it(
    pair: tuple[Path, Path], tmp_path: Path, full_disk: dict[str, int]
) -> None:
    other = make_adapter(tmp_path / "other", pair[0], seed=7)
    stopped(pair, tmp_path / "out", full_disk, 25)
    ran = merge(other, tmp_path / "out")
    assert ran.code == 0 and "other work is removed" in ran.stderr
    assert merge(other, tmp_path / "whole").code == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_base_that_has_changed_since(pair: tuple[Path, Path], tmp_path: Path, full_disk: dict[str, int]) -> None:
    stopped(pair, tmp_path / "out", full_disk, 25)
    shard = min(pair[0].glob("*.safetensors"))
    shard.touch()
    assert "other work is removed" in merge(pair[1], tmp_path / "out").stderr


def test_a_folder_that_is_not_ours_is_left_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    stage = staging_folder(tmp_path / "out")
    stage.mkdir()
    (stage / "mine").write_text("mine")
    ran = merge(pair[1], tmp_path / "out")
    assert ran.code == 9 and "not a folder of ours" in ran.stderr
    assert (stage / "mine").read_text() == "mine"
    (stage / "mine").unlink()
    stage.rmdir()
    (tmp_path / "elsewhere").mkdir()
    stage.symlink_to(tmp_path / "elsewhere")
    ran = merge(pair[1], tmp_path / "out")
    assert ran.code == 9 and "in the way" in ran.stderr
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_two_at_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    stage = staging_folder(tmp_path / "out")
    stage.mkdir()
    with (stage / JOURNAL).open("w") as file:
        file.write('{"files": {}}')
    import os

    descriptor = os.open(stage, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    ran = merge(pair[1], tmp_path / "out")
    os.close(descriptor)
    assert ran.code == 9 and "another process" in ran.stderr
    assert [p.name for p in stage.iterdir()] == [JOURNAL]


def test_too_little_disk_is_told_before_anything(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    import shutil

    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    ran = merge(pair[1], tmp_path / "out")
    assert ran.code == 9 and "the disk is full" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_what_is_finished(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    from qunlearn.merging import writer as stream

    plain, seen = stream._write_shard, []

    def interrupted(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr("qunlearn.merging.plan.SHARD_BYTES", 60_000)
    monkeypatch.setattr(stream, "_write_shard", interrupted)
    ran = merge(pair[1], tmp_path / "out")
    assert ran.code == 130
    assert not (tmp_path / "out").exists()
    assert len(list(staging_folder(tmp_path / "out").glob("*.safetensors"))) >= 1
    assert merge(pair[1], tmp_path / "out").code == 0


def test_an_adapter_is_used_up_or_nothing_is_kept(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    from qunlearn.merging import writer as stream

    plain = stream._write_shard
    monkeypatch.setattr(stream, "_write_shard", lambda *args: plain(*args)[1:])
    ran = call("merge", pair[1], "-o", tmp_path / "out", "--no-measure")
    assert ran.code == 6 and "exactly once" in ran.stderr
    assert list(tmp_path.iterdir()) == []
    assert (pair[1] / WEIGHTS).is_file()
