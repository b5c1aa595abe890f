"""`make bench`: one unlearning step, four ways, in one run on this machine.

    python benchmarks/bench_engine.py [--write] [--json FILE] [--tiny] [--device cpu|cuda] [--max-tokens N]
        [--no-scaling]

The contestants take turns (a, b, c, d, d', a, b, ...) on the same rows, weights, adapter (LoRA r = 16 on every linear
layer), 4-bit base and optimizer; figures are medians. Memory is measured in a step before those that are timed. Trained
tokens are those that pass through a forward that is trained, padding aside: neither the reference's pass nor
recomputation counts, and a prompt that is computed once for several answers counts once. `--write` replaces the section
of benchmarks/RESULTS.md, `--json` writes every figure to a file besides.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _contestants import CONTESTANTS
from _models import Shape
from _race import Course, compare, scale
from _report import machine, out, say, table, where_line, write_section
from _rows import Lengths
from qunlearn.config.training import TrainConfig
from qunlearn.model.device import choose_device

# Tied embeddings, as small models have them: 26M and 14M parameters in the layers, the rest embeds.
SHAPES = (
    Shape("42M, 32k vocabulary", 512, 8, 8, 8, 1408, 32000, tied=True),
    Shape("63M, 128k vocabulary", 384, 8, 6, 6, 1056, 128256, tied=True),
)
SMALL = Shape("256 x 4", 256, 4, 4, 4, 704, 32000, tied=True)
AXES: dict[str, Sequence[Any]] = {
    "rows": (2, 8),
    "K": (1, 5),
    "vocabulary": (8000, 32000, 128256),
    "model": (SMALL, replace(SMALL, name="384 x 6", hidden=384, layers=6, heads=6, kv_heads=6, intermediate=1056)),
}
TINY = Shape("tiny", 64, 2, 2, 2, 128, 512, tied=True)
TINY_LENGTHS = Lengths(prompt=(4, 8), answer=(4, 12), answer_median=6)


def courses(args: argparse.Namespace) -> tuple[list[Course], Course, dict[str, Sequence[Any]]]:
    """The cells to compare, and where the scaling table starts from."""
    common = Course(
        SMALL, 1, max_tokens=args.max_tokens, seed=args.seed, published_checkpointing=args.published_checkpointing
    )
    if args.tiny:
        tiny = replace(common, shape=TINY, lengths=TINY_LENGTHS, rounds=(1, 1))
        return [tiny], tiny, {"K": (2,)}
    common = replace(common, seconds=args.seconds)
    # The large vocabulary takes half of the time: a round less where the machine is slow.
    cells = [
        replace(common, shape=shape, k=k, rounds=(least, 5))
        for shape, least in zip(SHAPES, (3, 2), strict=True)
        for k in (1, 5)
    ]
    return cells, replace(common, rounds=(2, 2)), AXES


def contest_table(results: Sequence[dict[str, Any]]) -> str:
    header = ["model", "K", "", "step s", "trained tokens", "tokens/s", "peak over the model MiB"]
    header += ["step / (a)", "step / (b)", "peak / (a)", "tokens/s / (c)"]
    rows = []
    for r in results:
        ratios = [f"{r['ratios'][k]:.2f}" if k in r["ratios"] else "" for k in RATIOS]
        name = f"({r['contestant']}) {r['title']}"
        cells = [r["shape"], str(r["k"]), name, f"{r['step_s']:.2f}", f"{r['tokens']:.0f}"]
        rows.append([*cells, f"{r['tokens_per_s']:.0f}", f"{r['peak_bytes'] / 2**20:.0f}", *ratios])
    return table(header, rows)


USUAL = ["a", "b", "c", "d", "d'", "d+"]
RATIOS = ("step/a", "step/b", "peak/a", "tokens_per_s/c")


def scaling_table(results: Sequence[dict[str, Any]]) -> str:
    header = ["axis", "width x layers", "vocabulary", "K", "tokens in the step", "step s", "tokens/s", "peak MiB"]
    rows = [
        [
            r["axis"],
            f"{r['hidden']} x {r['layers']}",
            str(r["vocabulary"]),
            str(r["k"]),
            f"{r['tokens']:.0f}",
            f"{r['step_s']:.2f}",
            f"{r['tokens_per_s']:.0f}",
            f"{r['peak_bytes'] / 2**20:.0f}",
        ]
        for r in results
    ]
    return table(header, rows)


NOTES = """\
- A step has {rows}.
  Prompts have {prompt} tokens, answers {answer}, log-normal. Random weights, nf4 with double quantisation, LoRA r = 16
  on every linear layer, AdamW.
- (a) {kept}; it is padded to the longest row, where the script pads to the model's
  maximum. Like the script it indexes its logits row by row, for which autograd fills a gradient of the whole size each
  time; (a') in `--contestants` is the same without that.
- (c) fine-tunes on as many tokens as (d) passes through; both make passes of at most {max_tokens} tokens.
- (d) and (d') recompute their activations, as (b) and (c) do and a small GPU asks for; (d+) keeps them, as
  `train.checkpointing: auto` has it where there is room, and has its reference cached, as `auto` has it with a --normal
  file that is gone through more than once. (d*) in `--contestants` keeps activations with a live reference.
- (a), (b) and (c) run peft's own LoRA layers and transformers' own attention, (d) qunlearn's.
- Trained tokens pass through a forward that is trained, padding aside: no reference pass, no recomputation; a prompt
  computed once for several answers counts once. Step ratios are medians of each round's ratio.
- Peak: over the loaded base, with adapter, gradients, optimizer, and (a)'s second model; on a CPU what is in use
  in the process, of every library that asks for memory. The caches of (d') and (d+) are filled
  before the steps. The first cell has some MiB more, which libraries set up once."""


def notes(args: argparse.Namespace, cells: Sequence[Course]) -> str:
    """What one has to know to read the table."""
    forced = "recomputes its activations, which the script does not"
    low, high = cells[0].lengths.prompt, cells[0].lengths.answer
    return NOTES.format(
        rows=f"{cells[0].bad} bad rows, as many as the published script's, and {cells[0].normal} normal ones",
        prompt=f"{low[0]}-{low[1]}",
        answer=f"{high[0]}-{high[1]}",
        kept=forced if args.published_checkpointing else "keeps every activation, as published",
        max_tokens=args.max_tokens,
    )


def command(argv: Sequence[str]) -> str:
    """What to type to measure it again."""
    return "make bench" if list(argv) in ([], ["--write"]) else f"python benchmarks/bench_engine.py {' '.join(argv)}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the section of RESULTS.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure, each round's time included")
    parser.add_argument("--tiny", action="store_true", help="a shape for tests, in seconds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--max-tokens", type=int, default=TrainConfig().pass_tokens, help="of one pass, (c) and (d)")
    parser.add_argument("--seconds", type=float, default=20.0, help="no further round of a cell after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contestants", nargs="+", default=USUAL, choices=list(CONTESTANTS))
    parser.add_argument("--published-checkpointing", action="store_true", help="(a) recomputes activations too")
    parser.add_argument("--no-scaling", action="store_true", help="without the scaling table")
    args = parser.parse_args(argv)
    device, started = choose_device(args.device), time.monotonic()
    cells, start, axes = courses(args)
    contest = compare(cells, args.contestants, device)
    scaling = [] if args.no_scaling else scale(start, axes, device)
    took = time.monotonic() - started
    where = where_line(device, command(sys.argv[1:] if argv is None else argv))
    text = f"{where}; {took:.0f} s\n\n{contest_table(contest)}\n\n{notes(args, cells)}"
    if scaling:
        text += f"\n\nHow (d) scales, from the same run:\n\n{scaling_table(scaling)}"
    record = {"machine": machine(device), "seconds": took, "contest": contest, "scaling": scaling}
    out(text)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.write:
        write_section("engine", text)
    say(f"done in {took:.0f} s")


if __name__ == "__main__":
    main()
