"""What an adapter forgets and loses that is told the answers of a retrained model: to compare objectives with.

    python studies/told_adapter.py --world NAME --own RUN/normal.jsonl [--weight 10] [--steps 1500] [--out FILE]

The adapter of `forget`, unquantised, is trained to the distribution of the world's gold model on the bad rows (KL), and
to the base's on the rows to keep, given and its own (KL, `--weight` times). No unlearning has these
answers. It is one way to train, no bound: an objective may keep more. Measured as `prove.py` measures runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _path  # noqa: F401 - before what it makes importable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from _world_run import figures, measure, untouched
from qunlearn.config.settings import LoraConfig
from qunlearn.data.batch import ALL, collate
from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import Example, choose_template, encode
from qunlearn.model.load import LoadSpec, load_base
from qunlearn.model.policy import Policy
from worlds import World, world_named

RATE, WARMUP, MOST_TOKENS = 1e-3, 10, 256
SHOWN = (
    "forget",
    "leaks_forget",
    "paraphrase",
    "kept_retain",
    "kept_holdout",
    "kept_general",
    "perplexity_ratio",
    "ks_p",
)


def teach(world: World, own: Path | None, how: argparse.Namespace) -> Policy:
    """Return the base with an adapter taught what the gold model answers to the bad rows."""
    lm = load_base(world.folder / "model", LoadSpec("none"))
    policy = Policy.new(lm, LoraConfig(), seed=how.seed, checkpointing=False)
    base, gold = (AutoModelForCausalLM.from_pretrained(world.folder / name) for name in ("model", "gold"))
    bad = _rows(policy, world.file("forget"))
    kept = [row for file in (world.file("normal"), own) if file and file.is_file() for row in _rows(policy, file)]
    rng, parameters = random.Random(how.seed), [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    for step in range(how.steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP, 2 * (how.steps - step) / how.steps)
        loss = _kl(policy, gold, rng.sample(bad, min(how.rows, len(bad))))
        loss = loss + how.weight * _kl(policy, base, rng.sample(kept, min(how.rows, len(kept))))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return policy


def _rows(policy: Policy, file: Path) -> Sequence[Example]:
    dataset = read_dataset(file)
    template = choose_template(policy.tokenizer, "auto", dataset)
    return encode(dataset, policy.tokenizer, template, MOST_TOKENS).examples


def _kl(policy: Policy, teacher: Any, rows: Sequence[Example]) -> Tensor:
    """Return the mean KL of the teacher's distribution to the policy's over all tokens, in nats."""
    batch = collate(rows, ALL, policy.tokenizer.pad_token_id)
    with torch.no_grad():
        wanted = F.log_softmax(batch.pick(teacher(input_ids=batch.input_ids).logits).float(), -1)
    said = F.log_softmax(batch.pick(policy.model(input_ids=batch.input_ids).logits).float(), -1)
    return F.kl_div(said, wanted, reduction="none", log_target=True).sum(-1).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", required=True, help="of the proving ground (towns.1)")
    parser.add_argument("--own", type=Path, help="rows that the base made: normal.jsonl of a run on the world")
    parser.add_argument("--weight", type=float, default=10.0, help="of the KL on rows to keep")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=8, help="bad rows a step, and as many to keep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append the figures to this file of JSON lines")
    args = parser.parse_args()
    try:
        world = world_named(args.world)
    except (KeyError, ValueError):
        parser.error(f"no such world: {args.world}")
    base, gold = untouched(world, "model"), untouched(world, "gold")
    found = figures(measure(teach(world, args.own, args), world), base, gold)
    line = {"world": args.world, "seed": args.seed, "weight": args.weight, "steps": args.steps, **found}
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    print(", ".join(f"{name} {line[name]:.3g}" for name in SHOWN if name in line))  # noqa: T201 - the figures


if __name__ == "__main__":
    main()
