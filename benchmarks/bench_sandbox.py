"""`make bench-sandbox`: forgetting, cost and time of the default settings on every kind of the sandbox.

    python benchmarks/bench_sandbox.py [--seeds 0 1 2] [--kinds hallucination …] [--set section.key=value …] [--write]

Every kind is forgotten with default settings through the same code as `qunlearn forget`; every split is then measured
by `qunlearn eval`, before and after. Time is given in seconds and as a ratio to plain fine-tuning of the same adapter
on as many tokens in the same run. `--write` replaces the table in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from _report import out, say, table, where_line, write_section
from qunlearn.config.resolve import parse_set, resolve
from qunlearn.config.settings import Config
from qunlearn.data.batch import ALL, collate
from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import choose_template, encode
from qunlearn.evaluation.evaluate import evaluate
from qunlearn.evaluation.request import EvalRequest
from qunlearn.model.head import token_logps
from qunlearn.model.load import load_base, load_spec
from qunlearn.model.policy import Policy
from qunlearn.sandbox import ASSETS, KINDS, data_file
from qunlearn.training.forget import forget
from qunlearn.training.prepare import prepare
from qunlearn.training.request import check_forget

SPLITS = ("forget", "forget_paraphrase", "retain", "holdout", "general")


def one(kind: str, seed: int, overlay: dict[str, Any]) -> dict[str, Any]:
    """Forget one kind and measure all its splits."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        settings = {
            "model.name": "sandbox",
            "data.bad": f"sandbox:{kind}/forget",
            "train.seed": seed,
            "output.folder": str(folder),
        }
        plan = check_forget(resolve(("benchmark", settings), ("--set", overlay)))
        started = time.monotonic()
        record = forget(prepare(plan))
        if record["status"] != "done":
            raise SystemExit(f"the run is {record['status']}")
        seconds = time.monotonic() - started
        files = {split: data_file(kind, split) for split in SPLITS}
        request = EvalRequest.check(folder, None, files, template=None)
        scores = evaluate(request, quant=None, device="auto", rows=1000, to_stdout=False)["scores"]
        return {"kind": kind, "seed": seed, "seconds": seconds, "record": record, "scores": scores}


def plain_seconds_per_token(config: Config) -> float:
    """Plain QLoRA fine-tuning on the sandbox's own text: the time everything else is compared with."""
    base = load_base(ASSETS / "model", load_spec(config.model))
    policy = Policy.new(base, config.lora)
    dataset = read_dataset(data_file("hallucination", "retain"))
    rows = encode(dataset, base.tokenizer, choose_template(base.tokenizer, "auto", dataset), 512).examples
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-6)
    policy.model.train()
    tokens, started = 0, 0.0
    for step in range(40):
        if step == 5:
            tokens, started = 0, time.monotonic()
        batch = collate([rows[(24 * step + i) % len(rows)] for i in range(24)], ALL, base.tokenizer.pad_token_id)
        batch = batch.to(policy.device)
        loss = -token_logps(batch.pick(policy.hidden(batch)), batch.labels, policy.head).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        tokens += batch.tokens
    return (time.monotonic() - started) / tokens


def row(result: dict[str, Any], plain: float) -> list[str]:
    before, after = result["scores"]["base"], result["scores"]["adapter"]
    training = result["record"]["training"]

    def kept(split: str) -> str:
        return f"{100 * after[split]['exact_match'] / before[split]['exact_match']:.1f}"

    return [
        result["kind"],
        str(result["seed"]),
        f"{100 * after['forget']['exact_match']:.1f}",
        f"{100 * after['forget_paraphrase']['exact_match']:.1f}",
        kept("retain"),
        kept("holdout"),
        f"{after['general']['perplexity'] / before['general']['perplexity']:.3f}",
        f"{after['forget']['probability']:.3f}",
        f"{training['best']['step']}/{training['steps']}",
        f"{result['seconds']:.0f}",
        f"{training['seconds'] / training['tokens'] / plain:.2f}",
        f"{training['peak_memory_bytes'] / 2**20:.0f}",
    ]


HEADER = [
    "kind",
    "seed",
    "forget EM %",
    "paraphrase EM %",
    "retain, % of base",
    "holdout, % of base",
    "general perplexity, x base",
    "p(bad)",
    "step kept",
    "seconds in all",
    "time per token, x plain QLoRA",
    "peak MiB",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    plain = plain_seconds_per_token(Config())
    rows = []
    for seed in args.seeds:
        for kind in args.kinds:
            rows.append(row(one(kind, seed, parse_set(args.set)), plain))
            say(" | ".join(rows[-1]))
    typed = "make bench-sandbox" + "".join(f" --set {s}" for s in args.set)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = f"{where_line(device, typed)}\n\n{table(HEADER, rows)}"
    out(text)
    if args.write:
        write_section("sandbox", text)


if __name__ == "__main__":
    main()
