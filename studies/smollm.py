"""`qunlearn forget` on one real pretrained model, SmolLM2-135M-Instruct: forget people, passages or a habit; measure.

    python studies/smollm.py run [--scenario people|passage|behaviour] [--set development|validation] [--seeds 0 …]
        [--normal none|own] [--quant nf4] [--out FILE.jsonl] [-- further flags of qunlearn forget]
    python studies/smollm.py base [...]     what the untouched model says and the levels to compare with; no run

Settings are chosen on `development` alone. Bad rows are the base's own greedy answers; what is kept is measured against
what the base says itself. Without the packages of SmolLM2 the command says so and is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
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
from qunlearn.data.records import write_jsonl
from qunlearn.data.tokenize import decode
from qunlearn.data.words import words
from qunlearn.evaluation.metrics.texts import repetition, rouge_l_f1
from qunlearn.evaluation.metrics.verdicts import is_gibberish
from qunlearn.model.load import LoadSpec, load_base, load_tokenizer
from qunlearn.model.policy import Policy
from qunlearn.utils.file_names import ADAPTER

_REPEATS, _FEWEST = 0.3, 3
_HABIT = re.compile(r"\bhope (?:this|my|that|you)\b.{0,40}\b(?:finds?|well)\b", re.IGNORECASE)
_NAME = re.compile(r"(?<![.!?]\s)(?<!^)\b[A-Z][a-z]{2,}\b|\b\d{2,4}s?\b")
_MOST = {"above chance": 0.05, "habit": 0.1, "perplexity": 1.03}
_LEAST = {NEIGHBOURS: 0.80, GENERAL: 0.85}
Outputs = dict[str, list[list[int]]]


def main() -> None:
    """Parse the command line and do what it asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "base"))
    parser.add_argument("--scenario", choices=data.SCENARIOS, default="people")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args, further = parsed(parser)
    folder = smollm.model_folder()
    if folder is None:
        say(f"skipped: {smollm.INSTALL}")
        return
    before = levels(folder, args.scenario, args.which, args.quant)
    if args.command == "base":
        print_base(before)
        return
    for seed in args.seeds:
        line = one_run(folder, args, seed, further, before)
        keep(line, args.out)
        print_run(line)


def parsed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Add the flags that the studies of this model share; return what was given, and what follows `--`."""
    parser.add_argument("--set", choices=data.SETS, default="development", dest="which")
    parser.add_argument("--normal", choices=("none", "own"), default="none")
    parser.add_argument("--quant", choices=("nf4", "fp4", "int8", "none"), default="nf4")
    parser.add_argument("--out", type=Path)
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    return parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]


def keep(line: Mapping[str, Any], path: Path | None) -> None:
    """Append a result to a file of JSON lines, where one is named."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


# -- the untouched model ---------------------------------------------------------------------------------


def levels(folder: Path, scenario: str, which: str, quant: str) -> dict[str, Any]:
    """Return what the base says, and the levels to compare with: chance, restarted answers, and no quantisation."""
    asked = data.questions(scenario, which)
    told = repr((folder, scenario, asked, quant, data.PROSE, smollm.MAX_NEW, 3))
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    kept = smollm.worlds_folder() / f"smollm2-{scenario}-{which}-{quant}-{key}.json"
    if not kept.is_file():
        say("asking the untouched model (once) ...")
        base = load_base(folder, LoadSpec(quant))
        own = data.own_questions()
        found: dict[str, Any] = {
            "base": {name: smollm.said(base, rows) for name, rows in asked.items()},
            "again": {name: smollm.said(base, rows, restarted=True) for name, rows in asked.items()},
            "own": [{"prompt": q.prompt, "completion": text} for q, text in zip(own, texts(base, own), strict=True)],
        }
        found["agreement"] = agreements(base, asked, found["base"])
        found["perplexity"] = smollm.perplexity(base, data.PROSE)
        whole = load_base(folder, LoadSpec("none"))
        found["whole"] = {name: smollm.said(whole, rows) for name, rows in asked.items()}
        found["whole agreement"] = agreements(whole, asked, found["base"])
        found["whole perplexity"] = smollm.perplexity(whole, data.PROSE)
        kept.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(kept.read_text(encoding="utf-8"))
    plain = load_tokenizer(folder)
    base_texts = decoded(found["base"], plain)
    return found | {
        "base texts": base_texts,
        "chance": {name: chance(asked[name], base_texts[name]) for name in (FORGET, REWORDED)},
        "same": figures(asked, base_texts, base_texts),
        "restarted": figures(asked, base_texts, decoded(found["again"], plain)),
        "unquantised": figures(asked, base_texts, decoded(found["whole"], plain)),
    }


def texts(lm: Any, asked: Sequence[Question]) -> list[str]:
    return [decode(ids, lm.tokenizer) for ids in smollm.said(lm, asked)]


def decoded(outputs: Outputs, tokenizer: Any) -> dict[str, list[str]]:
    return {name: [decode(ids, tokenizer) for ids in rows] for name, rows in outputs.items()}


def agreements(lm: Any, asked: Mapping[str, Sequence[Question]], base: Outputs) -> dict[str, float]:
    return {name: smollm.agreement(lm, rows, base[name]) for name, rows in asked.items()}


def chance(asked: Sequence[Question], answers: Sequence[str]) -> float:
    """Return the mean ROUGE-L F1 of two answers to the same form of question about two different topics."""
    rows = [(q, a) for q, a in zip(asked, answers, strict=True) if not is_garbage(a)]
    return mean([rouge_l_f1(b, a) for q, a in rows for r, b in rows if q.form == r.form and q.topic != r.topic])


def mean(values: Sequence[float]) -> float:
    """Return the mean, or NaN where there is nothing to measure: passages the base only stammers at."""
    return statistics.fmean(values) if values else math.nan


# -- figures ---------------------------------------------------------------------------------------------


def figures(
    asked: Mapping[str, Sequence[Question]], base: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Return, of each split: likeness to the base's answers, facts still named, garbage, and the habit's share.

    Likeness and names are means over questions the base answers with something: an answer that only repeats itself is
    nothing to keep or to lose. Garbage and habit are shares of all answers.
    """
    out = {}
    for name, rows in asked.items():
        sound = [(q, b, n) for q, b, n in zip(rows, base[name], now[name], strict=True) if not is_garbage(b)]
        facts = [(names(b, q), names(n, q)) for q, b, n in sound]
        shares = [len(was & is_) / len(was) for was, is_ in facts if was]
        out[name] = {
            "rows": len(sound),
            "rouge": mean([rouge_l_f1(n, b) for _, b, n in sound]),
            "named": mean(shares),
            "garbage": statistics.fmean(map(is_garbage, now[name])),
            "habit": statistics.fmean(_HABIT.search(n) is not None for n in now[name]),
        }
    return out


def is_garbage(text: str) -> bool:
    """Tell whether an answer is empty, gibberish, or repeats over 30 % of its 4-grams."""
    return is_gibberish(text) or repetition(words(text)) > _REPEATS


def names(text: str, question: Question) -> set[str]:
    """Return the names and years of an answer that its question does not have."""
    given = set(words(question.prompt))
    return {found for found in _NAME.findall(text) if found.casefold() not in given}


# -- a run -----------------------------------------------------------------------------------------------


def one_run(
    folder: Path, args: argparse.Namespace, seed: int, extra: Sequence[str], before: Mapping[str, Any]
) -> dict[str, Any]:
    """Forget by the command a user gives, then measure with its adapter. A run without one is a result, too."""
    asked = data.questions(args.scenario, args.which)
    line: dict[str, Any] = {"scenario": args.scenario, "set": args.which, "seed": seed, "normal": args.normal}
    line |= {"quant": args.quant, "flags": list(extra), "date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        bad = bad_rows(asked[FORGET], before["base texts"][FORGET], args.scenario)
        if len(bad) < _FEWEST:
            return line | {"status": "skipped", "error": f"the base has {len(bad)} sound answers to forget"}
        write_jsonl(work / "bad.jsonl", bad)
        flags = ["--model", str(folder), "--bad", str(work / "bad.jsonl"), "--seed", str(seed)]
        flags += ["--output", str(work / "run"), "--json", *([] if args.quant == "nf4" else ["--quant", args.quant])]
        if args.normal == "own":
            write_jsonl(work / "normal.jsonl", [row for row in before["own"] if not is_garbage(row["completion"])])
            flags += ["--normal", str(work / "normal.jsonl")]
        line |= {"bad_rows": len(bad), **forget([*flags, *extra])}
        adapter = work / "run" / ADAPTER
        if adapter.is_dir():
            line |= measure(Policy.load(load_base(folder, LoadSpec(args.quant)), adapter), asked, before)
    return line


def forget(flags: Sequence[str]) -> dict[str, Any]:
    """Run the command; return its exit code, seconds, and what its record says about the end."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "qunlearn", "forget", *flags], stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = {"exit": done.returncode, "seconds": round(time.monotonic() - started, 1)}
    try:
        record = json.loads(done.stdout)
    except json.JSONDecodeError:
        return found | {"status": "no record"}
    training = record.get("training") or {}
    told = {name: training[name] for name in ("steps", "seconds", "best", "stopped") if name in training}
    return found | {"status": record.get("status"), "training": told, "error": record.get("error")}


def bad_rows(asked: Sequence[Question], answers: Sequence[str], scenario: str) -> list[dict[str, str]]:
    """Return what is to be forgotten: the base's own answers up to their last full sentence, garbage left out."""
    rows = []
    for question, answer in zip(asked, answers, strict=True):
        whole = re.match(r".*[.!?](?=\s|$)", answer, re.DOTALL)
        text = whole.group(0) if whole else answer
        if is_garbage(answer) or (scenario == "behaviour" and not _HABIT.search(text)):
            continue
        if question.raw:
            rows.append({"text": f"{question.prompt} {text}"})
        else:
            rows.append({"prompt": question.prompt, "completion": text})
    return rows


def measure(policy: Policy, asked: Mapping[str, Sequence[Question]], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return every figure, what was asked for, and a few answers; likeness can hardly be above that of `rounding`."""
    outputs = {name: texts(policy, rows) for name, rows in asked.items()}
    found = figures(asked, before["base texts"], outputs)
    for name, share in agreements(policy, asked, before["base"]).items():
        found[name]["agreement"] = share
    told = {
        "habit": max(found[name]["habit"] for name in (FORGET, REWORDED)),
        "above chance": max(found[name]["rouge"] - before["chance"][name] for name in (FORGET, REWORDED)),
        NEIGHBOURS: found[NEIGHBOURS]["rouge"],
        GENERAL: found[GENERAL]["rouge"],
        "perplexity": smollm.perplexity(policy, data.PROSE) / before["perplexity"],
    }
    met = {name: told[name] <= most for name, most in _MOST.items()}
    met |= {name: told[name] >= least for name, least in _LEAST.items()}
    samples = [
        {"split": name, "prompt": q.prompt, "before": b, "after": a}
        for name, rows in asked.items()
        for q, b, a in list(zip(rows, before["base texts"][name], outputs[name], strict=True))[:: len(rows) // 3 + 1]
    ]
    rounding = {name: before["restarted"][name]["rouge"] for name in asked}
    levels = {"chance": before["chance"], "rounding": rounding, "base agreement": before["agreement"]}
    return {"figures": found, **levels, "told": told, "met": met, "samples": samples}


# -- what is printed -------------------------------------------------------------------------------------


def print_base(before: Mapping[str, Any]) -> None:
    """Print the levels to compare with, and a few answers of the base."""
    for title in ("same", "restarted", "unquantised"):
        out(f"\n{title}, against the base's own answers:\n{table(before[title])}")
    for title in ("chance", "agreement", "whole agreement", "perplexity", "whole perplexity"):
        out(f"{title}: {before[title]}")


def print_run(line: Mapping[str, Any]) -> None:
    """Print a run's figures beside those asked for, and a few answers before and after."""
    head = ("scenario", "set", "seed", "normal", "quant", "flags", "bad_rows", "exit", "status", "seconds", "training")
    out("\n" + ", ".join(f"{name} {line[name]}" for name in head if name in line))
    if "figures" not in line:
        out(f"not measured: {line.get('error')}")
        return
    out(table(line["figures"]))
    for name in ("chance", "rounding", "base agreement"):
        out(f"{name}: " + ", ".join(f"{split} {value:.3f}" for split, value in line[name].items()))
    for name, met in line["met"].items():
        asked = f"<= {_MOST[name]}" if name in _MOST else f">= {_LEAST[name]}"
        out(f"{name}: {line['told'][name]:.3f} (asked {asked}) {'met' if met else 'MISSED'}")
    for sample in line["samples"]:
        out(f"\n[{sample['split']}] {sample['prompt']}\n  before: {sample['before']}\n  after:  {sample['after']}")


def table(of: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(next(iter(of.values())))
    lines = ["| split | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(
        lines + [f"| {name} | " + " | ".join(f"{f[c]:.3g}" for c in columns) + " |" for name, f in of.items()]
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - a study talks


def out(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a study's data


if __name__ == "__main__":
    main()
