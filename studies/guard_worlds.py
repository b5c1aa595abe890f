"""`qunlearn guard` on worlds: the gate's errors and robustness, and training, guard and both side by side.

    python studies/guard_worlds.py gate [--set development|validation] [--draw N] [--worlds NAMES]
        [--everyday FILE.jsonl] [--out FILE.jsonl] [-- FLAGS]
    python studies/guard_worlds.py words [--set development|validation] [--draw N] [--worlds NAMES]
    python studies/guard_worlds.py both [--kinds NAMES] [--seed N] [--out FILE.jsonl]

`gate` fits with nothing but the bad file, by the command a user gives, and sums up misses and false alarms over the
worlds of a set; the sandbox's kinds are of the development set. Rows of `--everyday` are what people ask of other
things: how many of their prompts are flagged. What follows `--` goes to `qunlearn guard fit`.
`words` fits the words' view alone on worlds of facts, without a model: half of the rows to keep are given to pass; the
others and those never given are measured, once as it is and once without reading slips of the pen.
`both` trains an adapter and fits a guard on each kind of the sandbox, with defaults, and measures what is answered
with either and with both, beside the model retrained without the bad rows. Settings are chosen on `development` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from qunlearn.data.records import read_dataset
from qunlearn.errors import QunlearnError
from qunlearn.evaluation.metrics.stats import wilson
from qunlearn.guard.attach import Attachment
from qunlearn.guard.calibrate import Threshold
from qunlearn.guard.gate import Gate
from qunlearn.guard.learn import train_gate
from qunlearn.guard.lexicon import Lexicon
from qunlearn.guard.prompts import make_prompts
from qunlearn.guard.robustness import gate_errors, robustness
from qunlearn.sandbox import ASSETS
from worlds import DEVELOPMENT, VALIDATION, choose

SPLITS = ("forget", "paraphrase", "retain", "holdout", "general")
KINDS = ("hallucination", "copyright", "harm", "code")
_COLUMNS = {"retrained": "base", "training": "adapter", "guard": "guarded", "both": "guarded"}  # of an evaluation
_GATE_FAILED = 5  # what `forget` ends with where a run misses its target: its adapter is there


def main() -> None:
    """Parse the command line and run one of the two studies."""
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("gate", "words", "both"))
    parser.add_argument("--set", choices=(DEVELOPMENT, VALIDATION), default=DEVELOPMENT)
    parser.add_argument("--worlds", help="names with commas; sandbox kinds are names, too")
    parser.add_argument("--draw", type=int, default=0, help="the same worlds, drawn again from this number")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--everyday", type=Path, help="rows of other things that people ask, to count false alarms on")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(sys.argv[1:cut])
    if args.command == "words":
        words(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        if args.command == "gate":
            lines = [gate(*place, Path(temporary), sys.argv[cut + 1 :], args) for place in places(args)]
            print_gates([line for line in lines if "splits" in line])
        else:
            print_both([both(kind, args.seed, Path(temporary), args.out) for kind in args.kinds.split(",")])


def places(args: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """Return the worlds of a set, each as name, model, bad file and data folder; those not built are left out."""
    named = args.worlds.split(",") if args.worlds else None
    kinds = [kind for kind in KINDS if args.set == DEVELOPMENT and (named is None or kind in named)]
    out = [(kind, "sandbox", f"sandbox:{kind}/forget", f"sandbox:{kind}") for kind in kinds]
    others = [name for name in named or () if name not in KINDS]
    for world in choose(args.set, ",".join(others) or None, args.draw) if others or named is None else ():
        if (world.folder / "model" / "config.json").is_file():
            out.append((world.name, str(world.folder / "model"), str(world.file("forget")), str(world.folder)))
    return out


def ran(*command: object) -> tuple[int, dict[str, Any]]:
    """Run a command of qunlearn; return its exit code and its result."""
    line = [sys.executable, "-m", "qunlearn", *map(str, command), "--device", "cpu", "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    return done.returncode, json.loads(done.stdout)


def keep(line: dict[str, Any], out: Path | None) -> dict[str, Any]:
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return line


# -- the gate --------------------------------------------------------------------------------------------


def gate(
    name: str, model: str, bad: str, data: str, work: Path, extra: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Fit a guard on a world, with nothing but the bad file, and measure its gate."""
    code, fitted = ran("guard", "fit", "--model", model, "--bad", bad, "-o", work / name, *extra)
    line: dict[str, Any] = {"world": name, "exit": code, "flags": list(extra)}
    if code == 0:
        line |= {"seconds": fitted["seconds"], "held_out": fitted["held_out"]}
        _, found = ran("guard", "eval", work / name, "--model", model, "--data", data)
        line |= {part: found[part] for part in ("splits", "attacks", "cost")}
        if args.everyday is not None:
            _, found = ran("guard", "eval", work / name, "--model", model, "--general", args.everyday)
            line["everyday"] = found["splits"]["general"]
    say(f"{name}: exit {code}, {line.get('seconds')} s, {line.get('splits')}")
    return keep(line, args.out)


def print_gates(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print errors by world, and the attacks over all worlds together."""
    say(
        "\n| world | forget missed | paraphrase missed | false alarms | everyday flagged | fit |\n|---"
        + "|---" * 5
        + "|"
    )
    for line in lines:
        splits = line["splits"]
        alarms = [split for split in splits.values() if split["what"] == "false alarms"]
        told = [shown([splits[split]]) if split in splits else "" for split in ("forget", "paraphrase")]
        told += [shown(alarms), shown([line["everyday"]] if "everyday" in line else [])]
        say(f"| {line['world']} | {' | '.join(told)} | {line['seconds']:.0f} s |")
    say("\n| attack | misses | false alarms of rows to pass |\n|---|---|---|")
    for name in lines[0]["attacks"]:
        if not name.endswith(", normal"):
            rows = [[line["attacks"].get(key) for line in lines] for key in (name, f"{name}, normal")]
            said = [shown([row for row in found if row]) for found in rows]
            say(f"| {name} | {' | '.join(said)} |")


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the errors of several rows together, with Wilson's interval."""
    wrong, n = (sum(row[key] for row in rows) for key in ("wrong", "n"))
    if not n:
        return "not measured"
    found = wilson(wrong, n)
    return f"{wrong} of {n} [{100 * (found.low or 0):.1f}, {100 * (found.high or 0):.1f}]"


# -- the words alone -------------------------------------------------------------------------------------


def words(args: argparse.Namespace) -> None:
    """Fit and measure the words of every world of facts, and print all of them together."""
    told: dict[str, dict[str, list[Mapping[str, Any]]]] = {"": {}, "slips not read": {}}
    for world in choose(args.set, args.worlds, args.draw):
        if world.kind != "facts" or not world.file("forget").is_file():
            continue
        sets = {name: read_dataset(world.file(name), role=name) for name in SPLITS if world.file(name).is_file()}
        kept = [r for name in ("retain", "general") for r in sets[name].records]
        bad, normal, passing = sets["forget"].records, kept[::2], (*kept[1::2], *sets["holdout"].records)
        reader: Any = NoModel()
        try:
            prompts = replace(make_prompts(bad, normal, (), args.seed), formed=True)  # so that no states are asked
            gate, held = train_gate(reader, prompts, Threshold())
        except QunlearnError as error:
            say(f"{world.name}: {error}")
            continue
        plain = replace(gate, lexicon=Lexicon(gate.lexicon.keys, gate.lexicon.weights))
        for name, used in zip(told, (gate, plain), strict=True):
            attachment = attachment_of(used)
            found = robustness(attachment, bad, passing)
            measured = {split: sets[split] for split in ("forget", "paraphrase") if split in sets}
            measured["holdout"] = replace(sets["holdout"], records=passing)
            found |= gate_errors(attachment, measured)
            for attack, row in found.items():
                told[name].setdefault(attack, []).append(row)
            if used is gate:
                wrong = {attack: f"{row['wrong']} of {row['n']}" for attack, row in found.items() if row["wrong"]}
                say(f"{world.name}: AUC {held.auc:.4f}, {len(bad)} bad rows, {len(passing)} to pass; wrong: {wrong}")
    for name, found in told.items():
        say(f"\n{name}")
        for attack, rows in found.items():
            say(f"| {attack} | {rows[0]['what']} | {shown(rows)} |")


class NoModel:
    """What the fit asks of a base whose states are not asked, and whose tokenizer knows no words."""

    width = 1
    tokenizer = SimpleNamespace(get_vocab=dict)


def attachment_of(gate: Gate) -> Attachment:
    """Return a guard's decision without a model: the words alone need none."""
    nothing: Any = None
    judge = partial(gate.judge, nothing)
    return Attachment(nothing, nothing, nothing, nothing, "turn", gate.threshold, judge)


# -- training, guard, both -------------------------------------------------------------------------------


def both(kind: str, seed: int, work: Path, out: Path | None) -> dict[str, Any]:
    """Train an adapter, fit a guard, and measure what the model answers bare, with either, and with both."""
    bad, data, run, guard = f"sandbox:{kind}/forget", f"sandbox:{kind}", work / f"{kind}-run", work / f"{kind}-guard"
    code, record = ran("forget", "--model", "sandbox", "--bad", bad, "-o", run, "--seed", seed)
    if code not in (0, _GATE_FAILED):
        raise SystemExit(f"{kind}: forget ended with {code}")
    fitted = ran("guard", "fit", "--model", "sandbox", "--bad", bad, "-o", guard, "--seed", seed)[1]
    measured = {
        "retrained": ran("eval", ASSETS / "gold", "--data", data),
        "training": ran("eval", run, "--data", data),
        "guard": ran("eval", "sandbox", "--guard", guard, "--data", data),
        "both": ran("eval", run, "--guard", guard, "--data", data),
    }
    seconds = {"training": (record.get("training") or {}).get("seconds"), "guard": fitted["seconds"]}
    line: dict[str, Any] = {"kind": kind, "seed": seed, "forget exit": code, "seconds": seconds}
    for how, (_, found) in measured.items():
        for split, measures in found["measures"].items():
            values = measures["leaks" if split in ("forget", "paraphrase") else "exact_match"]
            if how != "retrained":
                line.setdefault("base", {})[split] = values["base"]["mean"]
            line.setdefault(how, {})[split] = values[_COLUMNS[how]]["mean"]
    say(json.dumps(line))
    return keep(line, out)


def print_both(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print shares in %: of bad rows that still leak, of others that are answered as before."""
    columns = ("base", *_COLUMNS)
    say("\n| kind | split | " + " | ".join(columns) + " |\n|---" + "|---" * (len(columns) + 1) + "|")
    for line in lines:
        for split in line["base"]:
            values = [f"{100 * line[how][split]:.1f}" for how in columns]
            say(f"| {line['kind']} | {split} | {' | '.join(values)} |")


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a study's data


if __name__ == "__main__":
    main()
