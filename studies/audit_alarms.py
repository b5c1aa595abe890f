"""False alarms of `qunlearn audit`: retrained models, which never saw the facts, audited as if they had unlearned them.

    python studies/audit_alarms.py [--seeds N] [--budget NAME] [--only NAMES] [--smoothing N | --adapter] [--beside …]

Each seed is another retrained model: the sandbox's own, trained on for some steps on rows that it knows, in an order
drawn from the seed (`--smoothing`: with smoothed labels, so that it is less sure of everything; `--adapter`: as an
adapter on it, whose weights are attacked too). It is audited beside placebo facts, and beside the sandbox's retrained
model. Kinds take turns. A finished audit is a line of studies/audit_alarms.jsonl and is not run again; every leak in
them is a false alarm.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import _path  # noqa: F401 - before what it makes importable
from _tuning import fine_tune
from qunlearn import api
from qunlearn.config.resolve import resolve
from qunlearn.config.settings import LoraConfig
from qunlearn.data.batch import ALL, collate
from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import Example, choose_template, encode
from qunlearn.model.load import LoadSpec, load_base, load_tokenizer
from qunlearn.model.policy import Policy, save_adapter
from qunlearn.sandbox import ASSETS, data_file

RESULTS = Path(__file__).with_name("audit_alarms.jsonl")
KINDS = ("hallucination", "harm", "code")
KNOWN = ("retain", "holdout")
BASELINES = ("placebo", "retrained")
STEPS, BATCH, RATE = 40, 16, 3e-4


def known_rows(folder: Path) -> tuple[list[Example], int]:
    """Rows that the retrained model was trained on, and the token that pads them."""
    tokenizer = load_tokenizer(folder)
    rows: list[Example] = []
    for kind in KINDS:
        for split in KNOWN:
            dataset = read_dataset(data_file(kind, split))
            rows += encode(dataset, tokenizer, choose_template(tokenizer, "auto", dataset), 256).examples
    return rows, tokenizer.pad_token_id


def make_retrained(folder: Path, seed: int, smoothing: float) -> None:
    """Write another model that never saw the facts: the sandbox's retrained one, trained on for some steps."""
    shutil.copytree(ASSETS / "gold", folder)
    rows, pad = known_rows(folder)
    rng = random.Random(f"alarms {seed}")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "gold", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        batch = collate(rng.sample(rows, BATCH), ALL, pad)
        logits = model(input_ids=batch.input_ids).logits
        loss = torch.nn.functional.cross_entropy(batch.pick(logits), batch.labels, label_smoothing=smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def make_adapter(folder: Path, seed: int) -> None:
    """Write an adapter of the sandbox's retrained model, by the project's own loop, on rows that it knows."""
    rows, _ = known_rows(ASSETS / "gold")
    policy = Policy.new(load_base(ASSETS / "gold", LoadSpec()), LoraConfig(), seed=seed, checkpointing=False)
    config = resolve(("this study", {"train.steps": STEPS, "train.lr": RATE, "train.seed": seed}))
    fine_tune(policy, rows, [], config)
    save_adapter(policy, folder)


def label(how: argparse.Namespace) -> str:
    """What an audit is called in the results: its budget, and what is not as usual."""
    more = [f"{how.only} alone"] * bool(how.only) + ["smoothed"] * bool(how.smoothing) + ["adapter"] * how.adapter
    return ", ".join([how.budget, *more])


def measure(seed: int, baseline: str, how: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One audit, of a budget and of some families or all; its leaks, and the p-value of every attack."""
    budget, only = how.budget, how.only
    kind, model = KINDS[seed % len(KINDS)], work / f"retrained-{seed}"
    if not model.is_dir():
        if how.adapter:
            make_adapter(model, seed)
        else:
            make_retrained(model, seed, how.smoothing)
    started = time.monotonic()
    of_adapter = {"model": str(ASSETS / "gold"), "adapter": model}
    of_model = {"model": str(model), "original": str(ASSETS / "model")}
    result = api.audit(
        **(of_adapter if how.adapter else of_model), device="cpu", budget=budget, only=only, seed=seed,
        control=None if baseline == "placebo" else str(ASSETS / "gold"),
        forget=data_file(kind, "forget"), paraphrase=data_file(kind, "forget_paraphrase"),
        retain=data_file(kind, "retain"), holdout=data_file(kind, "holdout"), general=data_file(kind, "general"),
        output=work / f"audit-{baseline}-{seed}",
    )  # fmt: skip
    tested = [row for row in result["rows"] if row["p"] is not None]
    return {
        "seed": seed,
        "kind": kind,
        "baseline": baseline,
        "budget": label(how),
        "tested": sorted(Counter(row["family"] for row in tested).items()),
        "leaks": [f"{row['family']}.{row['format']}" for row in tested if row["verdict"] == "leak"],
        "inconclusive": [f"{r['family']}.{r['format']}" for r in result["rows"] if r["verdict"] == "inconclusive"],
        "p": {f"{row['family']}.{row['format']}": round(row["p"], 4) for row in tested},
        "seconds": round(time.monotonic() - started, 1),
    }


def summary(results: Sequence[Mapping[str, Any]]) -> str:
    """The table: audits, audits with a leak, and in how many audits each family gives one."""
    lines = ["| control | budget | audits | with a false alarm | by family |", "|---|---|---|---|---|"]
    for baseline in BASELINES:
        for budget in dict.fromkeys(r["budget"] for r in results):
            found = [r for r in results if (r["baseline"], r["budget"]) == (baseline, budget)]
            if not found:
                continue
            alarms = Counter(f for r in found for f in {leak.partition(".")[0] for leak in r["leaks"]})
            tested = dict.fromkeys(family for r in found for family, _ in r["tested"])
            families = ", ".join(f"{family} {alarms[family]}" for family in tested)
            lines.append(
                f"| {baseline} | {budget} | {len(found)} | {sum(bool(r['leaks']) for r in found)} | {families} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budget", default="standard")
    parser.add_argument("--only", help="some families alone, as for audit")
    made = parser.add_mutually_exclusive_group()
    made.add_argument("--smoothing", type=float, default=0.0)
    made.add_argument("--adapter", action="store_true", help="adapters on the retrained model")
    parser.add_argument("--beside", nargs="+", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    lines = args.results.read_text(encoding="utf-8").splitlines() if args.results.is_file() else []
    results = [json.loads(line) for line in lines]
    done = {(r["seed"], r["baseline"], r["budget"]) for r in results}
    with tempfile.TemporaryDirectory() as temporary:
        for baseline in args.beside:
            for seed in range(args.seeds):
                if (seed, baseline, label(args)) in done:
                    continue
                results.append(measure(seed, baseline, args, Path(temporary)))
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    print(summary(results))  # noqa: T201 - the figures are this command's output


if __name__ == "__main__":
    main()
