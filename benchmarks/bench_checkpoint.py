"""What a checkpoint costs: seconds to take and write it, and their share of the steps between two, by default.

Runs the loop on the sandbox with its default settings, and one step and one checkpoint at a larger shape. Every
checkpoint is on the disk (fsync) before the time is taken.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from _models import TRUE_SHAPES, Shape, random_base
from _report import out, table, where_line, write_section
from _rows import Drawer
from qunlearn.config.resolve import resolve
from qunlearn.config.settings import Config, LoraConfig
from qunlearn.model.device import choose_device
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Live
from qunlearn.objectives.table import terms_of
from qunlearn.training import checkpoint as module
from qunlearn.training.checkpoint import Checkpoints, Snapshot, TrainState
from qunlearn.training.forget import forget
from qunlearn.training.gradients import MicroBatcher
from qunlearn.training.optimizer import make_optimizer
from qunlearn.training.prepare import prepare
from qunlearn.training.request import check_forget
from qunlearn.training.sampler import make_step

HEADER = ("run", "checkpoint MiB", "step s", "checkpoint s", "every", "share of step time %")
EVERY = Config().train.save_every
SMALL = Shape("42M, 32k vocabulary", 512, 8, 8, 8, 1376, 32000, tied=True)
STEPS, SAVES = 6, 3


def sandbox() -> list[str]:
    """A whole run of `forget`: the loop's own seconds, and those of its checkpoints among them."""
    spent: list[float] = []
    sizes: list[int] = []
    take, save = TrainState.snapshot, Checkpoints.save

    def timed_take(self: TrainState, *args: Any) -> Snapshot:
        started = time.perf_counter()
        found = take(self, *args)
        spent.append(time.perf_counter() - started)
        return found

    def timed_save(self: Checkpoints, step: int, snapshot: Snapshot) -> None:
        started = time.perf_counter()
        save(self, step, snapshot)
        spent[-1] += time.perf_counter() - started
        sizes.append(_bytes(snapshot))

    with tempfile.TemporaryDirectory() as folder:
        settings = {"model.name": "sandbox", "data.bad": "sandbox:hallucination/forget"}
        settings["output.folder"] = f"{folder}/run"
        plan = check_forget(resolve(("benchmark", settings)))
        TrainState.snapshot, Checkpoints.save = timed_take, timed_save  # type: ignore[method-assign]
        try:
            record = forget(prepare(plan))
        finally:
            TrainState.snapshot, Checkpoints.save = take, save  # type: ignore[method-assign]
    loop = record["training"]["seconds"] - sum(spent)
    return _row("sandbox, 220 steps", sizes[0], loop / record["training"]["steps"], sum(spent) / len(spent))


def shaped(shape: Shape, device: torch.device, folder: Path) -> list[str]:
    """Medians of a few steps and a few checkpoints at a model's true shape, with the steps' default batch."""
    config = Config()
    policy = Policy.new(random_base(shape, device), LoraConfig())
    optimizer = make_optimizer(list(policy.trainable().values()), config.train, 1e-4)
    budget = MicroBatcher(policy, Live(policy, config.train.pass_tokens), config, lambda _: None)
    rows = Drawer(shape.vocabulary, 0).step(config.train.batch_size, config.train.normal_batch_size, 1)
    step = make_step(terms_of(config.objective), [{"forget": [e]} for e in rows.forget], rows.retain)
    policy.model.train()
    steps, saves, size = [], [], 0
    for i in range(STEPS):
        started = time.perf_counter()
        budget.backward(step, step_number=i + 1)
        optimizer.step()
        _wait(device)
        steps.append(time.perf_counter() - started)
    kept, moving = Checkpoints(folder / "c", keep=2), TrainState(policy, optimizer, {"budget": budget})
    best = policy.adapter_state()
    for i in range(SAVES):
        started = time.perf_counter()
        snapshot = moving.snapshot({}, best)
        kept.save(i + 1, snapshot)
        saves.append(time.perf_counter() - started)
        size = _bytes(snapshot)
    if len(module.checkpoints(folder / "c")) != 2:
        raise RuntimeError("no checkpoint was written")
    return _row(shape.name, size, statistics.median(steps[1:]), statistics.median(saves))


def _bytes(snapshot: Snapshot) -> int:
    return sum(t.numel() * t.element_size() for t in snapshot.tensors.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _row(name: str, size: int, step: float, save: float) -> list[str]:
    share = 100 * save / (EVERY * step)
    return [name, f"{size / 2**20:.1f}", f"{step:.3f}", f"{save:.3f}", str(EVERY), f"{share:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--true-shapes", action="store_true", help="Llama-2-7B too: for a GPU")
    parser.add_argument("--folder", help="where the checkpoints are written: the disk to measure")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    args = parser.parse_args()
    device = choose_device("auto")
    rows = [sandbox()]
    for shape in (SMALL, *(TRUE_SHAPES[:1] if args.true_shapes else ())):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append(shaped(shape, device, Path(folder)))
    text = f"{where_line(device, 'python benchmarks/bench_checkpoint.py')}\n\n{table(HEADER, rows)}"
    out(text)
    if args.write:
        write_section("checkpoint", text)


if __name__ == "__main__":
    main()
