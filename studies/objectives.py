"""`make bench-objectives`: every objective on every kind of the sandbox, with the settings of its row.

    python studies/objectives.py [--objectives NAME …] [--kinds KIND …] [--seeds 0 1 2] [--set section.key=value …]
                                    [--render] [--no-render]

Only the bad file is given: the normal data is what the base makes of its own, the same for every objective of a kind
and seed. All take as many steps with as many rows a step, unless the drift stays over its budget. Each finished run is
a line of studies/objectives.jsonl, and one that is there is not run again, so a call can be cut off and repeated.
At the end (`--render`: nothing else) tables and plots are written into docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import _path  # noqa: F401 - before what it makes importable
from _meter import in_fresh_process
from _objectives_page import render
from _report import machine, say
from _trials import Trial, make_normal, measure_untouched, normal_path, run
from qunlearn.config.objective import OBJECTIVE_NAMES
from qunlearn.config.resolve import parse_set
from qunlearn.sandbox import KINDS

RESULTS = Path(__file__).with_name("objectives.jsonl")
VERSION = 5  # of what a run does, its settings aside: a change makes older results of no use
_CPU = torch.device("cpu")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The finished runs of this version; a line that was cut off in writing is none."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            result = json.loads(line)
        except ValueError:
            continue
        if result.get("version") == VERSION:
            found.append(result)
    return found


def is_done(trial: Trial, results: Sequence[Mapping[str, Any]]) -> bool:
    return any(is_of(trial, result) for result in results)


def is_of(trial: Trial, result: Mapping[str, Any]) -> bool:
    """Whether a result is this trial's. Settings that came to be after it was written had no say in it."""
    now = trial.settings()
    named = all(result[name] == getattr(trial, name) for name in ("objective", "kind", "seed"))
    return named and all(now.get(key) == value for key, value in result["settings"].items())


def append(result: Mapping[str, Any], path: Path) -> None:
    """One line, on the disk before the next run begins."""
    ended = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if ended else "\n") + json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_all(trials: Sequence[Trial], work: Path, path: Path) -> None:
    """Every trial that has no result yet, each in a fresh process."""
    untouched: dict[str, dict[str, Any]] = {}
    for number, trial in enumerate(trials, 1):
        if is_done(trial, read_results(path)):
            continue
        if trial.kind not in untouched:
            untouched[trial.kind] = in_fresh_process(measure_untouched, trial.kind, device=_CPU)
        if not normal_path(trial, work).is_file():
            began = time.monotonic()
            in_fresh_process(make_normal, trial, work, device=_CPU)
            say(f"normal data of {trial.kind}, seed {trial.seed}: {time.monotonic() - began:.0f} s")
        result = in_fresh_process(run, trial, untouched[trial.kind], work, device=_CPU)
        append({"version": VERSION, **result, "machine": machine(_CPU)}, path)
        say(f"{number}/{len(trials)} {trial.name}: {_line(result)}")


def _line(result: Mapping[str, Any]) -> str:
    if "failed" in result:
        return f"failed: {result['failed']}"
    em = " ".join(f"{name[0]} {result[name]:.1f}" for name in ("forget", "paraphrase", "retain", "holdout"))
    more = f"ppl {result['perplexity']:.3f} KS p {result['ks_p']:.3f} p(bad) {result['p_bad']:.3f}"
    taken = f"step {result['step']}/{result['steps']}, {result['train_seconds']:.0f} of {result['seconds']:.0f} s"
    return f"{em} {more} drift {result['drift']:.4f} {taken}"


def trials_of(args: argparse.Namespace) -> Iterator[Trial]:
    """Seed by seed, so that what is cut off has at least one seed of everything."""
    overlay = parse_set(args.set)
    for seed in args.seeds:
        for name in args.objectives:
            for kind in args.kinds:
                yield Trial(name, kind, seed, overlay)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVE_NAMES), choices=OBJECTIVE_NAMES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another file for the finished runs")
    parser.add_argument("--work", type=Path, help="keep normal data and reference states here, for the next call")
    parser.add_argument("--render", action="store_true", help="write the tables and plots, run nothing")
    parser.add_argument("--no-render", action="store_true", help="run, and leave docs/ as it is")
    args = parser.parse_args(argv)
    if not args.render:
        with tempfile.TemporaryDirectory() as temporary:
            work = args.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True, mode=0o700)
            run_all(list(trials_of(args)), work, args.results)
    results = read_results(args.results)
    if results and not args.no_render:
        render(results, is_of)


if __name__ == "__main__":
    main()
