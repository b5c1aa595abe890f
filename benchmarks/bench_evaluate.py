"""`make bench-eval`: what measuring costs, on the sandbox.

    python benchmarks/bench_evaluate.py [--rounds N] [--items FEW MANY] [--write]

Three figures: the wall time of `qunlearn eval --suite basic` on 200 rows, before and after, everything included that a
person waits for; answers in batches against the same answers one by one, taking turns in one process; and the peak
memory of measuring many rows against few, each in a process of its own. `--write` replaces the section in
benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _report import out, say, table, where_line, write_section

ROWS = 40  # of each of five splits
GOALS = {"basic": 30.0, "batched": 5.0}
_ASKED = ("Where was {} born?", "What does {} do for a living?", "What does {} like best?")


def qunlearn(*args: object) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command. What it says is shown where it fails."""
    command = [sys.executable, "-m", "qunlearn.cli.app", *map(str, args)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    talk = process.stderr.read() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{talk}")
    return time.monotonic() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def basic(folder: Path, rounds: int) -> list[float]:
    """Seconds of the basic suite on a short run, nothing known beforehand."""
    short = ("--steps", 20, "--set", "data.normal_count=48")
    qunlearn("forget", "--model", "sandbox", "--bad", "sandbox:hallucination/forget", "-o", folder / "run", *short)
    asked = ("eval", folder / "run", "--data", "sandbox:hallucination", "--rows", ROWS, "--suite", "basic", "--fresh")
    return [qunlearn(*asked)[0] for _ in range(rounds)]


def batched(rounds: int, count: int = 120) -> list[tuple[float, float]]:
    """(seconds in batches, seconds one by one) of the same greedy answers, which must be the same."""
    from qunlearn.data.records import read_dataset
    from qunlearn.data.tokenize import choose_template, encode
    from qunlearn.evaluation.scores import greedy_outputs
    from qunlearn.model.load import LoadSpec, load_base
    from qunlearn.sandbox import ASSETS, data_file

    base = load_base(ASSETS / "model", LoadSpec("nf4", device="cpu"))
    dataset = read_dataset(data_file("hallucination", "retain"))
    template = choose_template(base.tokenizer, "auto", dataset)
    examples = encode(dataset, base.tokenizer, template, 512).examples[:count]
    greedy_outputs(base, examples[:4])  # what happens once
    found = []
    for _ in range(rounds):
        started = time.monotonic()
        together = greedy_outputs(base, examples)
        between = time.monotonic()
        alone = [greedy_outputs(base, [example])[0] for example in examples]
        found.append((between - started, time.monotonic() - between))
        if alone != together:
            raise SystemExit("answers in batches are not those one by one")
    return found


def memory(folder: Path, items: int) -> tuple[float, int]:
    """Seconds and peak bytes of the basic suite on the base alone, over so many different rows."""
    path = folder / f"{items}.jsonl"
    rows = (
        {"prompt": _ASKED[i % 3].format(f"Orla Finch the {i // 3}th"), "completion": f"Orla Finch was born in {i}."}
        for i in range(items)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return qunlearn("eval", "sandbox", "--forget", path, "--rows", items, "-o", folder / f"{items}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, nargs=2, default=(1000, 10_000), metavar=("FEW", "MANY"))
    parser.add_argument("--write", action="store_true", help="replace the section of benchmarks/RESULTS.md")
    args = parser.parse_args()
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="qunlearn-bench-") as temporary:
        folder = Path(temporary)
        # Memory first: a child's peak is at least what its parent had when it began.
        found = [(items, *memory(folder, items)) for items in args.items]
        for items, seconds, peak in found:
            rows.append([f"basic suite on {items:,} rows, base alone", f"{seconds:.0f} s", f"{peak / 2**20:.0f} MiB"])
            say(" | ".join(rows[-1]))
        growth = (found[1][2] - found[0][2]) / (found[1][0] - found[0][0])
        rows.append(["  grows by", "", f"{growth / 2**10:.2f} KiB a row"])
        times = basic(folder, args.rounds)
    middle = statistics.median(times)
    rows.append(
        [f"basic suite on {5 * ROWS} rows, before and after", f"{middle:.1f} s", f"at most {GOALS['basic']:g} s"]
    )
    say(" | ".join(rows[-1]))
    pairs = batched(args.rounds)
    together, alone = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    rows.append(["120 answers in batches", f"{together:.2f} s", ""])
    rows.append(["the same one by one", f"{alone:.2f} s", f"{ratio:.1f} x, at least {GOALS['batched']:g} x"])
    import torch

    text = f"{where_line(torch.device('cpu'), 'make bench-eval')}\n\n{table(('what', 'time', ''), rows)}"
    out(text)
    if args.write:
        write_section("evaluate", text)


if __name__ == "__main__":
    main()
