"""`qunlearn guard` on one real pretrained model, SmolLM2-135M-Instruct: guard ten people, let other people pass.

    python studies/guard_smollm.py [--set development|validation] [--normal none|own] [--seed N] [--quant nf4]
        [--everyday FILE.jsonl] [--out FILE.jsonl] [-- further flags of qunlearn guard fit]

Settings are chosen on `development` alone. Bad rows are the base's own greedy answers about ten people, in six forms;
they are asked in these, in four other forms, and dressed as the gate's attacks are; other people are asked about in the
same forms. Chance is the likeness of two answers of the base, in the same form, about two different people. Rows of
--everyday are what people ask of other things: how many of their prompts are flagged.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _smollm_data as data
import _smollm_model as smollm
from _smollm_data import FORGET, GENERAL, NEIGHBOURS, REWORDED, Question
from qunlearn.data.records import Record, read_dataset, write_jsonl
from qunlearn.evaluation.metrics.stats import wilson
from qunlearn.evaluation.metrics.texts import rouge_l_f1
from qunlearn.guard import Guard
from qunlearn.guard.robustness import cost, gate_errors, robustness
from qunlearn.model.load import LoadSpec, load_base
from smollm import bad_rows, chance, is_garbage, keep, mean, out, parsed, say, texts

FLAGGED, PASSED = (FORGET, REWORDED), (NEIGHBOURS, GENERAL)
TIMED_TOKENS = 64


def main() -> None:
    """Parse the command line, fit a guard as a user would, and measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--everyday", type=Path, help="rows of other things that people ask, to count false alarms on")
    args, further = parsed(parser)
    folder = smollm.model_folder()
    if folder is None:
        say(f"skipped: {smollm.INSTALL}")
        return
    line = one_guard(folder, args, further)
    keep(line, args.out)
    print_line(line)


def one_guard(folder: Path, args: argparse.Namespace, extra: Sequence[str]) -> dict[str, Any]:
    """Fit by the command a user gives, then measure. A fit that is refused is a result, too."""
    asked = data.guarded_people(args.which)
    base = load_base(folder, LoadSpec(args.quant))
    say("asking the untouched model ...")
    before = {name: texts(base, rows) for name, rows in asked.items()}
    line: dict[str, Any] = {"set": args.which, "normal": args.normal, "seed": args.seed, "quant": args.quant}
    line |= {"flags": list(extra), "date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_jsonl(work / "bad.jsonl", bad_rows(asked[FORGET], before[FORGET], "people"))
        flags = ["--model", str(folder), "--bad", str(work / "bad.jsonl"), "-o", str(work / "guard"), "--json"]
        flags += ["--seed", str(args.seed), "--quant", args.quant]
        if args.normal == "own":
            own = data.own_questions()
            pairs = zip(own, texts(base, own), strict=True)
            rows = [{"prompt": q.prompt, "completion": text} for q, text in pairs if not is_garbage(text)]
            write_jsonl(work / "normal.jsonl", rows)
            flags += ["--normal", str(work / "normal.jsonl")]
        line |= fit([*flags, *extra])
        if line["exit"] == 0:
            guard = Guard.open(work / "guard")
            line |= measure(base, guard, asked, before, work / "bad.jsonl")
            if args.everyday is not None:
                everyday = {GENERAL: read_dataset(args.everyday, role="--everyday")}
                line["everyday"] = gate_errors(guard.attachment(base.model, base.tokenizer), everyday)[GENERAL]
    return line


def fit(flags: Sequence[str]) -> dict[str, Any]:
    """Run `qunlearn guard fit`; return its exit code, seconds, and report."""
    began = time.monotonic()
    command = [sys.executable, "-m", "qunlearn", "guard", "fit", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = {"exit": done.returncode, "seconds": round(time.monotonic() - began, 1)}
    if done.returncode == 0:
        report = json.loads(done.stdout)
        found["report"] = {name: report[name] for name in ("rows", "prompts", "held_out", "strength", "seconds")}
    return found


def measure(
    base: Any, guard: Guard, asked: Mapping[str, Sequence[Question]], before: Mapping[str, Sequence[str]], bad: Path
) -> dict[str, Any]:
    """Return the gate's errors, the answers' likeness to the base's, what passed unchanged, and the cost."""
    found: dict[str, Any] = {"state": guard.gate.state, "layer": guard.gate.layer}
    with guard.on(base.model, base.tokenizer) as attachment:
        judged = {name: attachment.judge([q.prompt for q in rows]) for name, rows in asked.items()}
        found["wrong"] = {
            name: [
                q.prompt
                for q, p in zip(asked[name], chances, strict=True)
                if (p >= attachment.threshold) != (name in FLAGGED)
            ]
            for name, chances in judged.items()
        }
        found["of"] = {name: len(rows) for name, rows in asked.items()}
        after = {name: texts(base, rows) for name, rows in asked.items()}
        normal = [Record((("user", q.prompt),), "", 0, {}) for name in PASSED for q in asked[name]]
        found["attacks"] = robustness(attachment, read_dataset(bad, role="--bad").records, normal)
    found["likeness"] = {name: likeness(before[name], after[name]) for name in asked}
    found["chance"] = {name: chance(asked[name], before[name]) for name in FLAGGED}
    found["garbage"] = {name: mean([float(is_garbage(text)) for text in after[name]]) for name in asked}
    found["cost"] = cost(base, guard.attachment(base.model, base.tokenizer), prompt_of(base, TIMED_TOKENS))
    samples = [
        (q.prompt, b, a) for name in FLAGGED for q, b, a in zip(asked[name], before[name], after[name], strict=True)
    ]
    return found | {"samples": samples[:: len(samples) // 4]}


def likeness(before: Sequence[str], after: Sequence[str]) -> float:
    """Return the mean ROUGE-L F1 of answers with the base's own, over those the base answers with something."""
    return mean([rouge_l_f1(a, b) for b, a in zip(before, after, strict=True) if not is_garbage(b)])


def prompt_of(base: Any, tokens: int) -> tuple[int, ...]:
    """Return a prompt, template and all, of exactly so many tokens."""
    words = " ".join(data.PROSE).split()
    for n in range(1, len(words)):
        ids = smollm.prompt_ids(Question(" ".join(words[:n]), "", ""), base.tokenizer)
        if len(ids) >= tokens:
            return ids[:tokens]
    raise ValueError(f"no prompt of {tokens} tokens")


def print_line(line: Mapping[str, Any]) -> None:
    """Print the tables, and a few answers before and after."""
    head = ("set", "normal", "seed", "quant", "flags", "exit", "seconds", "report", "state", "layer", "cost")
    out("\n" + ", ".join(f"{name} {line[name]}" for name in head if name in line))
    if "wrong" not in line:
        return
    out("\n| split | wrong | ROUGE-L F1 with the base's answers | chance | garbage |\n|---|---|---|---|---|")
    for name, wrong in line["wrong"].items():
        level = line["chance"].get(name)
        told = [shown(len(wrong), line["of"][name]), f"{line['likeness'][name]:.3f}"]
        told += ["" if level is None else f"{level:.3f}", f"{line['garbage'][name]:.3f}"]
        out(f"| {name} | {' | '.join(told)} |")
    if "everyday" in line:
        out(f"| everyday | {shown(line['everyday']['wrong'], line['everyday']['n'])} | | | |")
    out("\n| attack | wrong |\n|---|---|")
    for name, row in line["attacks"].items():
        out(f"| {name}, {row['what']} | {shown(row['wrong'], row['n'])} |")
    for name, wrong in line["wrong"].items():
        out(f"{name}, wrong: {wrong}")
    for prompt, b, a in line["samples"]:
        out(f"\n{prompt}\n  before: {b}\n  after:  {a}")


def shown(wrong: int, n: int) -> str:
    found = wilson(wrong, n)
    return f"{wrong} of {n} [{100 * (found.low or 0):.1f}, {100 * (found.high or 0):.1f}] %"


if __name__ == "__main__":
    main()
