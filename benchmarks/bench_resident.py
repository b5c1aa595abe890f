"""Resident memory over a hundred steps on a CPU, beside what the memory plan says and what is in use.

    python benchmarks/bench_resident.py [--steps N] [--write]

A model of SmolLM2-135M's shape with random weights, steps of 24 rows of some 70 tokens whose sizes differ in every
step, activations kept: the shape that once grew to two and a half times its plan. Resident is what the system counts,
in use what glibc has handed out, whoever asked for it: what is between the two is kept for later by the allocator, and
what grows in the second is kept by a library.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from _meter import used_bytes
from _models import Shape, random_base
from _report import out, table, where_line, write_section
from _rows import Drawer
from qunlearn.config.resolve import resolve
from qunlearn.config.settings import LoraConfig
from qunlearn.memory.fit import memory_plan
from qunlearn.memory.plan import Lengths
from qunlearn.model.device import device_facts
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Live
from qunlearn.objectives.table import terms_of
from qunlearn.training.gradients import MicroBatcher
from qunlearn.training.sampler import make_step

SHAPE = Shape("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152, tied=True)
TINY = Shape("tiny", 64, 4, 2, 2, 128, 512, tied=True)
BAD, NORMAL, LONGEST = 8, 16, 140
HEADER = ["step", "resident MiB", "in use MiB", "resident / plan", "s a step"]


def resident_bytes() -> int:
    """Return the process's resident set (0 where the system does not tell)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:")), 0)


def watch(shape: Shape, steps: int) -> list[list[str]]:
    """Train so many steps, and return a row of the table for some of them."""
    device, config = (
        torch.device("cpu"),
        resolve(("bench", {"train.checkpointing": "never", "train.optimizer": "adamw"})),
    )
    plan = memory_plan(config, shape.config().to_dict(), device_facts(device), Lengths(LONGEST))
    policy = Policy.new(random_base(shape, device), LoraConfig())
    policy.model.train()
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-4, weight_decay=0.0)
    passes = MicroBatcher(policy, Live(policy, config.train.pass_tokens), config, lambda event: None)
    drawer, terms = Drawer(shape.vocabulary, 0), terms_of(config.objective)
    shown = {1, 3, 10, 33, 66, 100, steps} & set(range(1, steps + 1))
    rows, since, last = [], time.monotonic(), 0
    for step in range(1, steps + 1):
        drawn = drawer.step(BAD, NORMAL, 1)
        bad = [
            {"forget": [replace(e, rest=0.03)], "instead": [o]}
            for e, o in zip(drawn.forget, drawn.mismatch, strict=True)
        ]
        passes.backward(make_step(terms, bad, drawn.retain), step_number=step)
        optimizer.step()
        if step in shown:
            held, now = resident_bytes(), time.monotonic()
            ratio = held / plan.needs.total_bytes
            took = (now - since) / (step - last)
            mib = [f"{size / 2**20:,.0f}" for size in (held, used_bytes(device))]
            rows.append([str(step), *mib, f"{ratio:.2f}", f"{took:.2f}"])
            out("  ".join(rows[-1]))
            since, last = now, step
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    rows = watch(TINY if args.tiny else SHAPE, args.steps)
    typed = f"python benchmarks/bench_resident.py --steps {args.steps}"
    text = f"{where_line(torch.device('cpu'), typed)}\n\n{table(HEADER, rows)}"
    if args.write:
        write_section("resident", text)
    else:
        out(text)


if __name__ == "__main__":
    main()
