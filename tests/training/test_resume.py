"""A run that is stopped and gone on with: to the same bits, or refused by name; nothing half taken for whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, sets, write_rows
from safetensors.torch import load_file
from test_architectures import CONFIGS
from test_writer import make_base

from qunlearn.config.training import TrainConfig
from qunlearn.errors import ResumeError
from qunlearn.hub.fingerprint import take_fingerprint
from qunlearn.runs.folder import open_run
from qunlearn.runs.list import find_runs
from qunlearn.sandbox import data_file
from qunlearn.training import checkpoint as checkpoint_module
from qunlearn.training import forget as forget_module
from qunlearn.training import loop
from qunlearn.training import retain_rows as normal_module
from qunlearn.training.checkpoint import MANIFEST, TENSORS, VALUES, Checkpoints, Snapshot, checkpoints
from qunlearn.training.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from qunlearn.training.resume import IDENTITY, check_same
from qunlearn.utils.file_names import ADAPTER, METRICS, NORMAL, RECORD
from qunlearn.utils.staging import staging_folder

SMALL = {
    "train.steps": 7,
    "train.lr": 4e-3,
    "train.batch_size": 2,
    "train.normal_batch_size": 2,
    "train.warmup": 1,
    "train.save_every": 2,
    "train.optimizer": "adamw",
    "lora.dropout": 0.1,  # so that the random numbers count
    "lora.r": 4,
    "data.own_share": 0,
    # Random weights find no answer likely: a target, and a rest, below what they say, so that there is something to do.
    "objective.eps1": 1.0,
    "objective.rest": 1e-6,
    "stop.target": 6.3e-4,
    "stop.rows_left": 0.5,
    "stop.check_every": 3,
    "stop.max_drift": 9,
    "stop.probe_rows": 2,
    "stop.table_rows": 2,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, sandbox_folder: Path) -> tuple[Path, Path]:
    """A bad and a normal file; a tiny model of random weights lies beside them."""
    folder = tmp_path_factory.mktemp("resume")
    make_base(folder / "model", CONFIGS["llama"], sandbox_folder, torch.float32)
    for name, split in (("bad", "forget"), ("normal", "retain")):
        rows = data_file("hallucination", split).read_text(encoding="utf-8").splitlines()[:16]
        write_rows(folder / f"{name}.jsonl", [json.loads(row) for row in rows])
    return folder / "bad.jsonl", folder / "normal.jsonl"


def command(files: tuple[Path, Path], output: Path, values: Mapping[str, object] = SMALL) -> list[str]:
    model = files[1].with_name("model")
    args = ["forget", "--model", model, "--bad", files[0], "--normal", files[1], "-o", output, "--device", "cpu"]
    return [*map(str, args), *sets(values)]


@pytest.fixture(scope="module")
def whole(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    ran = call(*command(files, output))
    assert ran.code == 0, ran.stderr
    return output


def same_result(a: Path, b: Path) -> None:
    """Two run folders say the same, bit for bit, but for times, memory and their own names."""
    x, y = (load_file(folder / ADAPTER / "adapter_model.safetensors") for folder in (a, b))
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x)
    assert _events(a) == _events(b)
    records = [json.loads((folder / RECORD).read_text()) for folder in (a, b)]
    for record in records:
        record.pop("run"), record.pop("ended")
        for name in ("seconds", "total_seconds", "peak_memory_bytes"):
            record["training"].pop(name)
    assert records[0] == records[1]


def _events(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / METRICS).read_text().splitlines()
    timed = ("seconds", "tokens_per_s")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


class Killed(BaseException):
    """Stands for SIGKILL where a test kills in its own process: nothing of ours catches it but to clean up."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """The run ends in this step, after its event was written."""
    real = forget_module.on_step

    def stopping(event: Any, *args: Any) -> None:
        real(event, *args)
        if event["step"] == step:
            raise error

    monkeypatch.setattr(forget_module, "on_step", stopping)


@pytest.fixture(scope="module")
def died(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that died in step 5, with checkpoints of steps 2 and 4."""
    output = tmp_path_factory.mktemp("died") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5, Killed())
        with pytest.raises(Killed):
            call(*command(files, output))
    assert not output.exists()
    assert [p.name for p in saved(output)] == ["step-00000002", "step-00000004"]
    return output


@pytest.fixture
def stopped(died: Path, tmp_path: Path) -> Path:
    """The same elsewhere, for a test of its own."""
    shutil.copytree(staging_folder(died), staging_folder(tmp_path / "run"))
    return tmp_path / "run"


def saved(output: Path) -> list[Path]:
    return checkpoints(staging_folder(output) / "checkpoints")


# -- to the same bits --------------------------------------------------------------------------------------


def test_a_resumed_run_is_bit_equal(files: tuple[Path, Path], whole: Path, stopped: Path) -> None:
    ran = call(*command(files, stopped), "--resume")
    assert ran.code == 0, ran.stderr
    assert "resuming after step 4" in ran.stderr
    same_result(stopped, whole)
    assert [p.name for p in stopped.parent.iterdir()] == ["run"]
    assert all(p.stat().st_mode & 0o077 == 0 for p in [stopped, *stopped.rglob("*")])


def test_on_another_day_the_rows_are_the_same(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Llama 3.2 tells the day in every prompt: a run that went on after midnight had other rows, without a word."""
    shutil.copytree(files[1].parent, tmp_path / "data")
    told = tmp_path / "data" / "model" / "chat_template.jinja"
    told.write_text("{{ strftime_now('%d %b %Y') }}" + told.read_text())
    moved = (tmp_path / "data" / "bad.jsonl", tmp_path / "data" / "normal.jsonl")

    class Day(date):
        @classmethod
        def today(cls) -> date:
            return date(2025, 2, 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qunlearn.data.template.date_type", Day)
        whole = call(*command(moved, tmp_path / "whole"))
        stop_at(patch, 5, Killed())
        with pytest.raises(Killed):
            call(*command(moved, tmp_path / "run"))
    ran = call(*command(moved, tmp_path / "run"), "--resume")
    assert ran.code == whole.code and "so not to the same bits" not in ran.stderr, ran.stderr
    same_result(tmp_path / "run", tmp_path / "whole")
    assert open_run(tmp_path / "run").record["data"]["template"]["date"] == "2025-02-03"


def test_the_output_alone_is_enough(stopped: Path, whole: Path) -> None:
    ran = call("forget", "-o", stopped, "--resume", "--save-every", 3)
    assert ran.code == 0, ran.stderr
    x, y = (load_file(f / ADAPTER / "adapter_model.safetensors") for f in (stopped, whole))
    assert all(torch.equal(x[name], y[name]) for name in x)


def test_its_relative_paths_are_those_of_where_it_was_begun(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From elsewhere it said that its files were not there, also of a run that was finished."""
    output = tmp_path / "run"
    monkeypatch.chdir(files[0].parent)
    args = ["--model", "model", "--bad", files[0].name, "--normal", files[1].name, "-o", output, "--device", "cpu"]
    with monkeypatch.context() as patch:
        stop_at(patch, 5, Killed())
        with pytest.raises(Killed):
            call("forget", *args, *sets(SMALL))
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / files[0].name, [{"prompt": "Who?", "completion": "Nobody."}])  # another file of this name
    ran = call("forget", "-o", "run", "--resume")
    assert ran.code == 0 and "resuming after step 4" in ran.stderr, ran.stderr
    monkeypatch.chdir("/")
    ran = call("forget", "-o", output, "--resume")
    assert ran.code == 0 and "is finished" in ran.stderr, ran.stderr


@pytest.mark.parametrize(
    "damage", ["flipped", *(pytest.param(d, marks=pytest.mark.slow) for d in ("cut", "no manifest", "values"))]
)
def test_a_damaged_checkpoint_is_not_used(files: tuple[Path, Path], whole: Path, stopped: Path, damage: str) -> None:
    newest = saved(stopped)[-1]
    path = newest / {"no manifest": MANIFEST, "values": VALUES}.get(damage, TENSORS)
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    if damage == "no manifest":
        path.unlink()
    else:
        path.write_bytes(raw[:-50] if damage == "cut" else raw)
    ran = call(*command(files, stopped), "--resume")
    assert ran.code == 0, ran.stderr
    assert f"the checkpoint {newest} is damaged" in ran.stderr and "resuming after step 2" in ran.stderr
    same_result(stopped, whole)


def test_without_a_sound_checkpoint_it_starts_again(files: tuple[Path, Path], whole: Path, stopped: Path) -> None:
    for path in saved(stopped):
        (path / TENSORS).write_bytes(b"")
    ran = call(*command(files, stopped), "--resume")
    assert ran.code == 0 and ran.stderr.count("is damaged") == 2
    same_result(stopped, whole)


def test_resume_where_there_is_nothing(files: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    ran = call(*command(files, tmp_path / "run"), "--resume")
    assert ran.code == 0 and "starting at the beginning" in ran.stderr
    same_result(tmp_path / "run", whole)


def test_resume_of_a_finished_run(files: tuple[Path, Path], whole: Path) -> None:
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    ran = call(*command(files, whole), "--resume", "--json")
    assert ran.code == 0 and ran.json["status"] == "done" and "is finished" in ran.stderr
    ran = call(*command(files, whole, {**SMALL, "train.lr": 1e-3}), "--resume")
    assert ran.code == 10 and "train.lr: 0.004 then, 0.001 now" in ran.stderr
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_a_run_that_failed_does_not_succeed_by_being_resumed(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_finite", lambda *_: False)
        assert call(*command(files, tmp_path / "run")).code == 8
    ran = call(*command(files, tmp_path / "run"), "--resume", "--json")
    assert ran.code == 8 and ran.json["status"] == "failed" and "is finished" in ran.stderr


def test_running_out_of_memory_at_once_leaves_the_metrics_as_they_were(
    files: tuple[Path, Path], whole: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the longest step is tried first: what is told of it stands behind what a resumed run has told before."""
    passes, told = loop.MicroBatcher._passes, []

    def fewer(self: Any, *args: Any) -> Any:
        told.append(self)
        if len(told) == 1:
            raise torch.OutOfMemoryError("a test")
        return passes(self, *args)

    def tried(policy: Any, micro_batches: Any, longest: Any, step: int) -> None:
        with torch.random.fork_rng():
            micro_batches.backward(longest, step_number=step)

    monkeypatch.setattr(loop.MicroBatcher, "_passes", fewer)
    monkeypatch.setattr(loop, "_try_longest", tried)
    assert call(*command(files, stopped), "--resume").code == 0
    found = [event for event in _events(stopped) if "max_tokens" not in event]
    assert [event["step"] for event in found] == [event["step"] for event in _events(whole)]
    assert sum("max_tokens" in event for event in _events(stopped)) == 1


@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
def test_what_a_kill_left_of_a_file_is_in_nobodys_way(files: tuple[Path, Path], stopped: Path, how: str) -> None:
    torn = staging_folder(stopped) / f".{NORMAL}-a1b2c3"
    torn.write_text("{")
    ran = call(*command(files, stopped), how)
    assert ran.code == 0, ran.stderr
    assert [p.name for p in stopped.parent.iterdir()] == ["run"]


def test_a_finished_run_needs_its_folder_alone(whole: Path, tmp_path: Path) -> None:
    ran = call("forget", "-o", whole, "--resume", "--json")
    assert ran.code == 0 and ran.json["status"] == "done", ran.stderr
    assert "is finished" in ran.stderr
    nothing = call("forget", "-o", tmp_path / "nothing", "--resume")
    assert nothing.code == 2 and "no model was named" in nothing.stderr


@pytest.mark.parametrize("name", ["npo", pytest.param("simnpo", marks=pytest.mark.slow)])
def test_what_an_objective_sets_is_no_difference(files: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    """What was `content` or auto when the run began, and was settled then, is so when it is asked for again."""
    values = {**SMALL, "objective.name": name, "train.steps": 2}
    first = call(*command(files, tmp_path / "run", values))
    assert first.code == 5, first.stderr  # two steps reach nothing
    ran = call(*command(files, tmp_path / "run", values), "--resume")
    assert ran.code == 5 and "is finished" in ran.stderr, ran.stderr
    other = call(*command(files, tmp_path / "run", {**values, "objective.beta": 7.0}), "--resume")
    assert other.code == 10 and "objective.beta" in other.stderr


@pytest.mark.slow
def test_self_made_data_is_made_once(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**SMALL, "data.normal_count": 8, "data.max_length": 40}

    def args(output: Path) -> list[str]:
        made = command(files, output, values)
        at = made.index("--normal")
        return made[:at] + made[at + 2 :]

    assert call(*args(tmp_path / "whole")).code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3, Killed())
        with pytest.raises(Killed):
            call(*args(tmp_path / "run"))
    kept = staging_folder(tmp_path / "run") / NORMAL
    original = kept.read_bytes()
    kept.write_bytes(original + b'{"prompt": "a", "completion": "b"}\n')
    ran = call(*args(tmp_path / "run"), "--resume")
    assert ran.code == 10 and "normal data" in ran.stderr
    kept.write_bytes(original)
    monkeypatch.setattr(normal_module, "self_made_rows", None)
    ran = call(*args(tmp_path / "run"), "--resume")
    assert ran.code == 0, ran.stderr
    same_result(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run" / NORMAL).read_bytes() == (tmp_path / "whole" / NORMAL).read_bytes()


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "paged_adamw8bit"])
def test_every_optimizers_state_comes_back(kind: str, tmp_path: Path) -> None:
    def parameters() -> list[torch.nn.Parameter]:
        g = torch.Generator().manual_seed(3)
        return [torch.nn.Parameter(torch.randn(*shape, generator=g)) for shape in ((64, 128), (3, 5))]

    def steps(optimizer: Any, ps: list[torch.nn.Parameter], numbers: range) -> None:
        for n in numbers:
            for p in ps:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
            optimizer.step()

    c = TrainConfig(optimizer=kind)
    whole = parameters()
    steps(make_optimizer(whole, c, 1e-2), whole, range(6))
    first = parameters()
    optimizer = make_optimizer(first, c, 1e-2)
    steps(optimizer, first, range(3))
    tensors, scalars = optimizer_state(optimizer)
    Checkpoints(tmp_path / "c").save(3, Snapshot(tensors, scalars))
    found = Checkpoints(tmp_path / "c").latest()
    assert found is not None
    second = parameters()
    with torch.no_grad():
        for a, b in zip(second, first, strict=True):
            a.copy_(b)
    optimizer = make_optimizer(second, c, 1e-2)
    load_optimizer_state(optimizer, found.tensors, found.values)
    steps(optimizer, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


# -- refused -----------------------------------------------------------------------------------------------


def test_what_has_changed_is_named(
    files: tuple[Path, Path], stopped: Path, tmp_path: Path, sandbox_folder: Path
) -> None:
    changed = {**SMALL, "train.lr": 1e-3, "objective.eps1": 0.7}
    ran = call(*command(files, stopped, changed), "--resume")
    assert ran.code == 10
    assert "train.lr: 0.004 then, 0.001 now" in ran.stderr and "objective.eps1: 1.0 then, 0.7 now" in ran.stderr
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a?", "completion": "b"}])
    ran = call(*command((bad, files[1]), stopped), "--resume")
    assert ran.code == 10 and "the bad file: sha256" in ran.stderr
    args = command(files, stopped)
    args[args.index("--model") + 1] = str(sandbox_folder)
    ran = call(*args, "--resume")
    assert ran.code == 10 and "the model: sha256" in ran.stderr
    assert len(saved(stopped)) == 2


def test_a_model_that_was_told_by_the_bytes_of_its_config_is_the_same(
    files: tuple[Path, Path], stopped: Path, whole: Path, tmp_path: Path
) -> None:
    """So runs that an earlier version began, or finished, are resumed."""
    before = take_fingerprint(files[1].with_name("model")).by_bytes
    begun = staging_folder(stopped) / IDENTITY
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"model": before}))
    ran = call(*command(files, stopped), "--resume")
    assert ran.code == 0 and len(_events(stopped)) == len(_events(whole)), ran.stderr
    old = Path(shutil.copytree(whole, tmp_path / "old"))
    record = json.loads((old / RECORD).read_text())
    record["model"]["fingerprint"] = before
    (old / RECORD).write_text(json.dumps(record))
    ran = call("forget", "-o", old, "--resume")
    assert ran.code == 0 and "is finished" in ran.stderr


def test_what_an_earlier_format_left_is_refused_by_name(files: tuple[Path, Path], stopped: Path) -> None:
    """Its checkpoints name the parts of the loop otherwise: read, they would end in a fault of ours."""
    begun = staging_folder(stopped) / IDENTITY
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"format": 1}))
    ran = call(*command(files, stopped), "--resume")
    assert ran.code == 10 and "the file format: 1 then, 5 now" in ran.stderr, ran.stderr
    assert saved(stopped), "nothing is lost"


def test_the_commit_of_a_model_that_moved_on_is_named(stopped: Path) -> None:
    then = json.loads((staging_folder(stopped) / IDENTITY).read_text()) | {"commit": "0" * 40}
    with pytest.raises(ResumeError) as caught:
        check_same(then, {**then, "model": "another", "commit": "1" * 40}, stopped)
    assert "the model: sha256" in caught.value.message and f"--revision {'0' * 40}" in str(caught.value.hint)
    check_same(then, {**then, "commit": "1" * 40}, stopped)  # other files of the repository have changed


def test_the_same_data_under_another_name_is_the_same(files: tuple[Path, Path], stopped: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = [Path(shutil.copy(path, tmp_path / "elsewhere" / f"moved-{path.name}")) for path in files]
    shutil.copytree(files[1].with_name("model"), tmp_path / "elsewhere" / "model")
    ran = call(*command((moved[0], moved[1]), stopped), "--resume")
    assert ran.code == 0, ran.stderr


def test_an_unfinished_run_is_not_overwritten_unasked(files: tuple[Path, Path], stopped: Path, whole: Path) -> None:
    ran = call(*command(files, stopped))
    assert ran.code == 9 and "an unfinished run is there" in ran.stderr and "--resume" in ran.stderr
    assert len(saved(stopped)) == 2
    assert call(*command(files, stopped), "--overwrite").code == 0
    same_result(stopped, whole)


def test_two_processes_in_one_folder(files: tuple[Path, Path], stopped: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    descriptor = os.open(staging_folder(stopped), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        ran = call(*command(files, stopped), "--resume")
    finally:
        os.close(descriptor)
    assert ran.code == 9 and "another process is writing it" in ran.stderr
    assert len(saved(stopped)) == 2


def test_a_staging_folder_that_is_not_ours(files: tuple[Path, Path], tmp_path: Path) -> None:
    stage = staging_folder(tmp_path / "run")
    stage.mkdir()
    (stage / "thesis.txt").write_text("mine")
    ran = call(*command(files, tmp_path / "run"), "--overwrite")
    assert ran.code == 9 and "not a folder of ours" in ran.stderr
    assert (stage / "thesis.txt").read_text() == "mine"
    shutil.rmtree(stage)
    (tmp_path / "elsewhere").mkdir()
    stage.symlink_to(tmp_path / "elsewhere")
    ran = call(*command(files, tmp_path / "run"))
    assert ran.code == 9 and "in the way" in ran.stderr
    assert list((tmp_path / "elsewhere").iterdir()) == []


# -- signals -----------------------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[None]:
    """Signals as a terminal gives them; under nohup or in the background some are ignored."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_signal_leaves_a_checkpoint_and_the_best_adapter(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = forget_module.on_step

    def signalling(event: Any, *args: Any) -> None:
        real(event, *args)
        if event["step"] == 5:
            os.kill(os.getpid(), getattr(signal, name))

    before = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        patch.setattr(forget_module, "on_step", signalling)
        ran = call(*command(files, tmp_path / "run"), "--json")
    assert ran.code == 130 and ran.json["status"] == "interrupted", ran.stderr
    assert signal.getsignal(getattr(signal, name)) is before
    assert (tmp_path / "run" / ADAPTER / "adapter_model.safetensors").is_file()
    assert [p.name for p in saved(tmp_path / "run")] == ["step-00000004", "step-00000005"]
    assert "--resume continues" in ran.stderr
    assert [row["status"] for row in find_runs(tmp_path)] == ["interrupted"]  # once, though it is in two folders
    ran = call(*command(files, tmp_path / "run"), "--resume")
    assert ran.code == 0 and "resuming after step 5" in ran.stderr
    same_result(tmp_path / "run", whole)


@pytest.mark.usefixtures("terminal")
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal")
def test_a_terminal_that_is_closed(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes, and from then on nothing can be said: the checkpoint is made all the same."""
    from rich.console import Console

    real = forget_module.on_step

    def closing(event: Any, *args: Any) -> None:
        if event["step"] == 5:
            os.kill(os.getpid(), signal.SIGHUP)
            patch.setattr(Console, "print", gone)
        real(event, *args)

    def gone(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(forget_module, "on_step", closing)
        assert call(*command(files, tmp_path / "run")).code == 130
    assert [p.name for p in saved(tmp_path / "run")] == ["step-00000004", "step-00000005"]
    assert call(*command(files, tmp_path / "run"), "--resume").code == 0
    same_result(tmp_path / "run", whole)


# -- faults ------------------------------------------------------------------------------------------------


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_too_full_for_a_checkpoint_costs_no_run(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "_write_tensors", full)
    ran = call(*command(files, tmp_path / "run"))
    assert ran.code == 0 and ran.stderr.count("could not be written (No space left on device)") == 4
    same_result(tmp_path / "run", whole)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("qunlearn.training.events.Metrics.write", 0),
        ("qunlearn.training.resume._write_identity", 0),
        pytest.param("qunlearn.training.resume.write_private", 0, marks=pytest.mark.slow),
        pytest.param("qunlearn.training.record.save_adapter", 2, marks=pytest.mark.slow),
        pytest.param("qunlearn.training.record.write_json", 2, marks=pytest.mark.slow),
        pytest.param("qunlearn.training.forget.write_private", 2, marks=pytest.mark.slow),
        ("qunlearn.training.resume.put_in_place", 2),
        pytest.param("qunlearn.training.resume.shutil.copyfile", 2, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_full_anywhere_else(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, kept: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        ran = call(*command(files, tmp_path / "run"))
    assert ran.code == 9 and "the disk is full" in ran.stderr and "Traceback" not in ran.stderr
    assert not (tmp_path / "run").exists()
    assert len(saved(tmp_path / "run")) == kept
    if kept:
        ran = call(*command(files, tmp_path / "run"), "--resume")
        assert ran.code == 0 and "resuming after step 7" in ran.stderr
        same_result(tmp_path / "run", whole)
    else:
        assert list(tmp_path.iterdir()) == []


def test_out_of_memory_in_the_middle(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.MicroBatcher.backward

    def short(self: loop.MicroBatcher, step: Any, *, step_number: int, **options: Any) -> Any:
        if step_number == 6:
            raise torch.OutOfMemoryError("a test")
        return real(self, step, step_number=step_number, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop.MicroBatcher, "backward", short)
        ran = call(*command(files, tmp_path / "run"))
    assert ran.code == 4 and "step 6" in ran.stderr and "checkpoints are kept" in ran.stderr
    assert call(*command(files, tmp_path / "run"), "--resume").code == 0
    same_result(tmp_path / "run", whole)


def test_non_finite_steps_before_and_after_a_checkpoint(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bad steps in a row around the checkpoint of step 4, three in a row end the run: the count is in it."""
    real = loop.MicroBatcher.backward

    def poisoned(self: loop.MicroBatcher, step: Any, *, step_number: int, **options: Any) -> Any:
        found = real(self, step, step_number=step_number, **options)
        if step_number in (3, 4, 5):
            next(iter(self.policy.trainable().values())).grad.fill_(float("inf"))  # type: ignore[union-attr]
        return found

    values = {**SMALL, "stop.max_skips": 3}
    monkeypatch.setattr(loop.MicroBatcher, "backward", poisoned)
    with monkeypatch.context() as patch:
        stop_at(patch, 5, Killed())
        with pytest.raises(Killed):
            call(*command(files, tmp_path / "run", values))
    ran = call(*command(files, tmp_path / "run", values), "--resume")
    assert ran.code == 8 and "3 non-finite steps in a row" in ran.stderr
    assert json.loads((tmp_path / "run" / RECORD).read_text())["status"] == "failed"
    assert not staging_folder(tmp_path / "run").exists()


def test_a_data_file_that_changes_while_the_run_lasts(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was read once, and its hash is of what was read; a resume sees that it is another one."""
    bad = Path(shutil.copy(files[0], tmp_path / "bad.jsonl"))
    real = forget_module.on_step

    def changing(event: Any, *args: Any) -> None:
        real(event, *args)
        if event["step"] == 5:
            bad.write_text('{"prompt": "a?", "completion": "b"}\n')
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(forget_module, "on_step", changing)
        with pytest.raises(Killed):
            call(*command((bad, files[1]), tmp_path / "run"))
    ran = call(*command((bad, files[1]), tmp_path / "run"), "--resume")
    assert ran.code == 10 and "the bad file" in ran.stderr


def test_a_clock_that_jumps(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)  # a coarse clock: no time passes
    assert call(*command(files, tmp_path / "run")).code == 0
    same_result(tmp_path / "run", whole)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_read_only_place(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    ran = call(*command(files, tmp_path / "locked" / "run"))
    assert ran.code == 9 and "cannot be written" in ran.stderr


def test_a_place_that_refuses_writes(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    ran = call(*command(files, tmp_path / "run"))
    assert ran.code == 9 and "Read-only file system" in ran.stderr


def test_an_overwritten_run_is_not_lost_between_two_renames(
    files: tuple[Path, Path], whole: Path, stopped: Path
) -> None:
    """Killed after the old run was moved away and before the new one was put there: the old one is put back."""
    shutil.copytree(whole, staging_folder(stopped) / "run-old")
    ran = call(*command(files, stopped))
    assert ran.code == 9
    same_result(stopped, whole)


def test_ctrl_c_while_it_is_measured_costs_no_training(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a single checkpoint, for the run is short: the trained adapter is kept before it is measured."""
    real, calls = forget_module.score_sets, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("trained again")

    values = {**SMALL, "train.save_every": 50}
    with monkeypatch.context() as patch:
        patch.setattr(forget_module, "score_sets", interrupted)
        ran = call(*command(files, tmp_path / "run", values))
    assert ran.code == 130 and "--resume continues" in ran.stderr
    with monkeypatch.context() as patch:
        patch.setattr(forget_module, "train", never)
        ran = call("forget", "-o", tmp_path / "run", "--resume")
    assert ran.code == 0 and "resuming after step 7" in ran.stderr
    same_result(tmp_path / "run", whole)
    assert not staging_folder(tmp_path / "run").exists()


@pytest.mark.skipif(os.name == "nt", reason="names there are Unicode")
def test_a_run_into_the_folder_it_is_started_in_from_a_file_whose_name_is_no_unicode(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither can be seen before the end of a run, where it used to be lost: the folder cannot be renamed."""
    here = tmp_path / "run"
    here.mkdir()
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xe9d.jsonl"))
    shutil.copy(files[0], bad)
    monkeypatch.chdir(here)
    inode = here.stat().st_ino
    with monkeypatch.context() as patch:
        stop_at(patch, 5, Killed())
        with pytest.raises(Killed):
            call(*command((bad, files[1]), Path()))
    assert [path.name for path in here.iterdir()] == [".unfinished"]
    assert [row["status"] for row in find_runs(tmp_path)] == ["unfinished"]
    monkeypatch.chdir(tmp_path)  # it is found from elsewhere too
    ran = call("forget", "-o", "run", "--resume")
    assert ran.code == 0 and "resuming after step 4" in ran.stderr, ran.stderr
    assert here.stat().st_ino == inode
    record = json.loads((here / RECORD).read_text())
    assert record["data"]["bad"].pop("path") == str(bad)
    expected = json.loads((whole / RECORD).read_text())
    assert record["data"]["bad"].items() <= expected["data"]["bad"].items()
    assert not list(here.glob(".*"))
    again = call("forget", "-o", "run", "--resume", "--json")
    assert again.code == 0 and again.json["status"] == "done"
    assert call("export", here, "-o", tmp_path / "adapter").code == 0


@pytest.mark.parametrize("name", ["npo"])
def test_the_whole_command_finds_a_finished_run_of_any_objective(
    files: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    args = [*command(files, tmp_path / "run", {**SMALL, "train.steps": 1}), "--objective", name]
    first = call(*args)
    assert (tmp_path / "run" / RECORD).is_file(), first.stderr
    again = call(*args, "--resume")
    assert again.code == first.code and "is finished" in again.stderr, again.stderr


def test_a_link_in_the_staging_folder_is_not_followed(files: tuple[Path, Path], stopped: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (staging_folder(stopped) / "checkpoints").rename(elsewhere)
    (staging_folder(stopped) / "checkpoints").symlink_to(elsewhere)
    ran = call(*command(files, stopped), "--resume")
    assert ran.code == 9 and "not a folder of ours" in ran.stderr
    assert len(checkpoints(elsewhere)) == 2


@pytest.mark.medium
def test_a_folder_that_is_made_meanwhile_is_kept_and_so_is_the_training(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, real = tmp_path / "run", forget_module.score_sets

    def making(*args: Any) -> Any:
        late.mkdir(exist_ok=True)
        (late / "notes.txt").write_text("mine")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(forget_module, "score_sets", making)
        ran = call(*command(files, late))
    assert ran.code == 9 and "not empty" in ran.stderr and (late / "notes.txt").read_text() == "mine"
    shutil.rmtree(late)
    assert call("forget", "-o", late, "--resume").code == 0
    same_result(late, whole)


@pytest.fixture
def begun_anew(files: tuple[Path, Path], whole: Path, tmp_path: Path) -> Path:
    """A finished run that a later one with --overwrite, of other steps, was to replace, which died in step 5."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5, Killed())
        with pytest.raises(Killed):
            call(*command(files, output, {**SMALL, "train.lr": 1e-3}), "--overwrite")
    return output


def test_a_run_that_was_begun_anew_goes_on(files: tuple[Path, Path], begun_anew: Path) -> None:
    """The finished run that it replaces said that it was finished, or of other settings."""
    ran = call(*command(files, begun_anew, {**SMALL, "train.lr": 1e-3}), "--resume", "--json")
    assert ran.code == 0 and "resuming after step 4" in ran.stderr, ran.stderr
    assert "lr: 0.001" in (begun_anew / "config.yaml").read_text(encoding="utf-8")
    assert [p.name for p in begun_anew.parent.iterdir()] == ["run"]


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_does_not_replace_a_finished_run(
    files: tuple[Path, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    real = forget_module.on_step

    def signalling(event: Any, *args: Any) -> None:
        real(event, *args)
        if event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(forget_module, "on_step", signalling)
        assert call(*command(files, output), "--overwrite").code == 130
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    ran = call(*command(files, output), "--resume")
    assert ran.code == 0 and "resuming after step 3" in ran.stderr, ran.stderr
    same_result(output, whole)


def test_an_interrupted_run_that_was_moved_does_not_start_again(
    files: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    """Without its checkpoints it would begin at step 0, and replace the adapter that was kept."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    record = json.loads((output / RECORD).read_text(encoding="utf-8"))
    (output / RECORD).write_text(json.dumps({**record, "status": "interrupted"}), encoding="utf-8")
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    ran = call(*command(files, output), "--resume")
    assert ran.code == 10 and "not where they belong" in ran.stderr
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
