"""Tokens a second that a 4-bit model generates: as the library does it, and as `qunlearn.model.generate` does.

    python benchmarks/bench_generate.py [--rows N] [--tokens N] [--rounds N] [--write]

A model of SmolLM2-135M's shape with random weights, prompts of 16 tokens in one batch, in turns, the least time of each
counts. The library unpacks each layer's weights for every token, sorts the vocabulary where it samples, and on a CPU in
bf16 copies the head for every row behind a prompt.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from types import SimpleNamespace

import torch
from transformers import GenerationConfig

from _meter import seconds
from _models import TRUE_SHAPES, random_base
from _report import out, table, where_line, write_section
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.load import Base

PROMPT = 16
HEADER = ["", "rows", "library, tokens/s", "qunlearn, tokens/s", "ratio"]
WAYS = {"greedy": (0.0, 1.0), "sampled": (1.0, 1.0), "sampled, top-p 0.95": (1.0, 0.95)}


def library(base: Base, prompts: torch.Tensor, sampling: Sampling) -> None:
    """Generate as a script with transformers does."""
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    options = drawn if sampling.temperature else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=sampling.max_new_tokens, pad_token_id=0, use_cache=True, **options)
    with torch.no_grad():
        base.model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config)


def main() -> None:
    """Time both, in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (shape,) = [shape for shape in TRUE_SHAPES if shape.name == "SmolLM2-135M"]
    base = replace(random_base(shape, device), tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=None))
    base.model.generation_config.eos_token_id = None
    base.model.eval()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, shape.vocabulary, (args.rows, PROMPT), generator=generator)
    rows = []
    for name, (temperature, top_p) in WAYS.items():
        sampling = Sampling(args.tokens, temperature, top_p)
        theirs, ours = [], []
        for _ in range(args.rounds + 1):  # the first of each sets things up
            theirs.append(seconds(lambda s=sampling: library(base, prompts.to(device), s), device))
            ours.append(seconds(lambda s=sampling: generate(base, prompts.tolist(), s), device))
        a, b = (args.rows * args.tokens / min(found[1:]) for found in (theirs, ours))
        rows.append([name, str(args.rows), f"{a:.0f}", f"{b:.0f}", f"{b / a:.2f}"])
    text = f"{where_line(device, 'python benchmarks/bench_generate.py')}\n\n{table(HEADER, rows)}"
    out(text)
    if args.write:
        write_section("generate", text)


if __name__ == "__main__":
    main()
