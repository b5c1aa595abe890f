"""What each objective costs: time and memory of a step at the same tokens, as a ratio to llmu's in the same run.

    python benchmarks/bench_rows.py [--write] [--tiny] [--device cpu|cuda]

`make bench` runs it after engine.py. Every objective passes the very same rows through the same model in the same
packs: llmu's mismatched answer is a second bad answer for those that draw none, and the other answer of a pair for
those that do. References are cached and filled before the first step; rmu's, at a block, is live, as in a run. The
objectives take turns; on a CPU a step's time is that of the process, so that neighbours on the machine do not count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from _meter import Peak, release, seconds, used_bytes
from _models import Shape, random_base
from _report import out, table, where_line, write_section
from _rows import Drawer, Lengths, Rows
from qunlearn.config.objective import OBJECTIVE_NAMES
from qunlearn.config.resolve import resolve
from qunlearn.config.settings import Config, LoraConfig
from qunlearn.model.device import choose_device
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Cached, Live
from qunlearn.objectives.table import OBJECTIVES, terms_of
from qunlearn.training.gradients import MicroBatcher
from qunlearn.training.sampler import Step, make_step

# The output head is a tenth of what computes, as in the largest vocabularies: 1/14 in Llama-3.1-8B, 1/50 in Llama-2-7B.
SHAPE = Shape("width 384, 4 layers, vocabulary 2000", 384, 4, 6, 6, 1056, 2000, tied=True)
TINY = Shape("tiny", 64, 4, 2, 2, 128, 512, tied=True)
BASELINE, BAD, NORMAL, ROUNDS = "llmu", 2, 2, 3


def step_of(name: str, rows: Rows) -> Step:
    """The step of an objective on these rows: both answers to a bad prompt, whatever it makes of the second one."""
    roles = {term.role for term in terms_of(config_of(name).objective)}
    bad: list[dict[str, Any]] = []
    for e, other in zip(rows.forget, rows.mismatch, strict=True):
        both = [e, other]
        bad.append({"forget": [e], "mismatch": [other]} if "mismatch" in roles else {"forget": both, "pair": both})
    return make_step(terms_of(config_of(name).objective), bad, rows.retain)


def config_of(name: str) -> Config:
    return resolve(("benchmark", {"objective.name": name}))


class Track:
    """A policy with its optimizer and the reference of every row, filled. `loaded_bytes`: with the base alone."""

    def __init__(self, shape: Shape, device: torch.device, steps: Sequence[Rows], folder: Path) -> None:
        base = random_base(shape, device)
        with torch.no_grad():  # what the libraries set up once
            base.model(input_ids=torch.ones(1, 4, dtype=torch.long, device=device))
        release(device)
        self.loaded_bytes = used_bytes(device)
        self.policy = Policy.new(base, LoraConfig())
        self.policy.model.train()
        self.optimizer = torch.optim.AdamW(self.policy.trainable().values(), lr=1e-4, weight_decay=0.0)
        for p in self.policy.trainable().values():  # the optimizer's state is there from the first step on
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        limit = Config().train.pass_tokens
        examples = [e for rows in steps for e in (*rows.forget, *rows.mismatch, *rows.retain)]
        self.reference = Cached(folder / "reference.safetensors", Live(self.policy, limit), examples)
        self.reference.fill()

    def step(self, name: str, rows: Rows) -> int:
        """One optimizer step; the tokens of its passes."""
        budget = MicroBatcher(self.policy, self.reference, config_of(name), lambda event: None)
        found = budget.backward(step_of(name, rows), step_number=1)
        self.optimizer.step()
        return found.tokens


def drawn(shape: Shape, n: int) -> list[Rows]:
    lengths = Lengths(prompt=(4, 8), answer=(4, 12), answer_median=6) if shape is TINY else None
    drawer = Drawer(shape.vocabulary, 0, lengths)
    return [drawer.step(BAD, NORMAL, 1) for _ in range(n)]


def race(shape: Shape, device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    """Memory of a step of each objective, which warms up besides; then times of each in turn, round by round.

    Memory is over the loaded base, with adapter, gradients and optimizer.
    """
    steps = drawn(shape, rounds)
    times: dict[str, list[float]] = {name: [] for name in OBJECTIVE_NAMES}
    tokens: dict[str, list[int]] = {name: [] for name in OBJECTIVE_NAMES}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as temporary:
        track = Track(shape, device, steps, Path(temporary))
        for name in OBJECTIVE_NAMES:
            with Peak(device) as peak:
                track.step(name, steps[0])
            peaks[name] = max(0, peak.peak_bytes - track.loaded_bytes)
        for rows in steps:
            for name in OBJECTIVE_NAMES:
                took = _timed(lambda name=name, rows=rows: tokens[name].append(track.step(name, rows)), device)
                times[name].append(took)
    return {
        name: {"times_s": times[name], "tokens": statistics.fmean(tokens[name]), "peak_bytes": peaks[name]}
        for name in OBJECTIVE_NAMES
    }


def _timed(work: Any, device: torch.device) -> float:
    if device.type != "cpu":
        return seconds(work, device)
    started = time.process_time()
    work()
    return time.process_time() - started


def row_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    base = found[BASELINE]
    header = ["objective", "tokens of its passes", "ms a step", f"x {BASELINE}", "peak MiB", f"x {BASELINE}"]
    rows = []
    for name in OBJECTIVE_NAMES:
        r = found[name]
        ratio = statistics.median(a / b for a, b in zip(r["times_s"], base["times_s"], strict=True))
        cells = [f"`{name}`", f"{r['tokens']:.0f}", f"{1000 * statistics.median(r['times_s']):.0f}", f"{ratio:.2f}"]
        rows.append([*cells, f"{r['peak_bytes'] / 2**20:.0f}", f"{r['peak_bytes'] / max(1, base['peak_bytes']):.2f}"])
    return table(header, rows)


NOTES = """\
- A step: {bad} bad prompts with two answers each, {normal} normal rows, the same for every objective; {shape}, random
  weights, nf4, LoRA r = 16. Only `{apart}` goes backward twice through its normal rows: two losses' gradients are
  kept apart.
- References are cached. `rmu` looks at a block a quarter up: no gradient is computed above it, and its reference is
  live.
- Times are of the process on a CPU, medians of {rounds} rounds; a ratio is the median of each round's. Memory: over the
  loaded base, with adapter, gradients and optimizer; in a process that has done nothing before, some MiB more that
  libraries set up once."""


def main(argv: Sequence[str] | None = None, *, typed: str | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the section of RESULTS.md")
    parser.add_argument("--tiny", action="store_true", help="a shape for tests, in seconds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args(argv)
    device, started = choose_device(args.device), time.monotonic()
    shape = TINY if args.tiny else SHAPE
    found = race(shape, device, args.rounds)
    apart = next(name for name, row in OBJECTIVES.items() if row.descent)
    notes = NOTES.format(bad=BAD, normal=NORMAL, shape=shape.name, apart=apart, rounds=args.rounds)
    typed = typed or " ".join(["python benchmarks/bench_rows.py", *(sys.argv[1:] if argv is None else argv)])
    where = f"{where_line(device, typed)}; {time.monotonic() - started:.0f} s"
    text = f"{where}\n\n{row_table(found)}\n\n{notes}"
    out(text)
    if args.write:
        write_section("rows", text)


if __name__ == "__main__":
    main()
