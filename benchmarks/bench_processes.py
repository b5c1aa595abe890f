"""Several processes on a CPU, one thread each, against one process with as many threads: the same step, and what of it
is communication. Part of `make bench`.

    python benchmarks/bench_processes.py [--write] [--count 2] [--steps 8] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from _engine import engine_batcher, step_of_rows
from _models import Shape, random_base
from _report import out, say, table, where_line, write_section
from _rows import Drawer, Lengths
from qunlearn.config.objective import ObjectiveConfig
from qunlearn.config.settings import Config, LoraConfig
from qunlearn.config.training import TrainConfig
from qunlearn.model.device import choose_device
from qunlearn.model.policy import Policy
from qunlearn.parallel.group import Group, joined

SHAPES = {
    "sandbox": Shape("the sandbox's, 1.5M", 160, 4, 4, 4, 448, 1536, tied=True),
    "42M": Shape("42M, 32k vocabulary", 512, 8, 8, 8, 1408, 32000, tied=True),
    "tiny": Shape("tiny", 64, 2, 2, 2, 128, 512, tied=True),
}
_LENGTHS = {"tiny": Lengths(prompt=(4, 8), answer=(4, 12), answer_median=6)}
_BAD, _NORMAL, _WARM = 8, 16, 2


@dataclass
class Clock:
    """Seconds that this process has spent in messages to the others, waiting for the slower ones included."""

    seconds: float = 0.0

    def timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args)
            finally:
                self.seconds += time.perf_counter() - started

        return call


def one_process(name: str, steps: int) -> None:
    """Take the steps, as one of the processes that a launcher has started; the main one prints their times as JSON."""
    clock, shape = Clock(), SHAPES[name]
    Group.add, Group.any = clock.timed(Group.add), clock.timed(Group.any)  # type: ignore[method-assign]
    with joined() as ranks:
        policy = Policy.new(random_base(shape, choose_device("cpu")), LoraConfig(), seed=0)
        policy.model.train()
        optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-4, fused=True)
        batcher = engine_batcher(policy, Config(objective=ObjectiveConfig("llmu"), train=TrainConfig(max_tokens=2048)))
        drawer, told = Drawer(shape.vocabulary, 0, _LENGTHS.get(name)), []
        for number in range(steps + _WARM):
            rows = drawer.step(_BAD, _NORMAL, 1)
            ranks.any(False)
            clock.seconds, started = 0.0, time.perf_counter()
            batcher.backward(step_of_rows(rows), step_number=number)
            optimizer.step()
            told.append((time.perf_counter() - started, clock.seconds))
        if ranks.main:
            out(json.dumps(told[_WARM:]))


def launched(name: str, count: int, threads: int, steps: int) -> list[tuple[float, float]]:
    """(seconds, seconds of communication) of each step of `count` processes with so many threads each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__)), "--child", name, "--steps", str(steps)]
    places = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places["OMP_NUM_THREADS"] = str(threads)
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **places, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{name} in {count} processes: a process failed")
    return [(total, waiting) for total, waiting in json.loads(said[0])]


def compared(name: str, count: int, steps: int) -> list[str]:
    """A row of the table. Both ways take turns, twice, for the machine is not always equally fast."""
    alone: list[tuple[float, float]] = []
    together: list[tuple[float, float]] = []
    for _ in range(2):
        alone += launched(name, 1, count, steps)
        together += launched(name, count, 1, steps)
    one, several = (median(total for total, _ in found) for found in (alone, together))
    share = median(waiting / total for total, waiting in together)
    say(f"{name}: {one:.3f} s, {several:.3f} s, {100 * share:.1f} %")
    return [
        SHAPES[name].name,
        f"{1000 * one:.0f}",
        f"{1000 * several:.0f}",
        f"{several / one:.2f}",
        f"{100 * share:.1f} %",
    ]


def main(argv: Sequence[str], typed: str | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the section of RESULTS.md")
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", choices=[*SHAPES], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        one_process(args.child, args.steps)
        return
    n = args.count
    header = [
        "shape",
        f"1 process x {n} threads, ms a step",
        f"{n} processes x 1 thread, ms a step",
        "ratio",
        "of it messages, waiting included",
    ]
    found = table(header, [compared(name, n, args.steps) for name in (["tiny"] if args.tiny else ["sandbox", "42M"])])
    out(found)
    if args.write:
        line = where_line(choose_device("cpu"), typed or f"python benchmarks/bench_processes.py {' '.join(argv)}")
        write_section("processes", f"{line}\n\n{found}")


if __name__ == "__main__":
    main(sys.argv[1:])
