"""Time what several processes generate together on the sandbox: a base's own rows, and greedy answers.

    python benchmarks/bench_generated.py
    torchrun --nproc_per_node 2 benchmarks/bench_generated.py

Each process prints its seconds of CPU time and by the clock, and the main one a hash of the texts, which is the same
for any number of processes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import choose_template, encode
from qunlearn.evaluation.scores import outputs_each
from qunlearn.model.load import LoadSpec, load_base
from qunlearn.parallel.group import joined
from qunlearn.parallel.ranks import Ranks
from qunlearn.roles.self_made import Wanted, self_made_rows
from qunlearn.sandbox import ASSETS, data_file
from qunlearn.utils.console import say

T = TypeVar("T")
_KINDS, _FILES = ("hallucination", "harm", "code"), ("forget", "retain", "holdout")


def timed(name: str, ranks: Ranks, act: Callable[[], T]) -> T:
    """Act in all processes, and print how long it took this one."""
    ranks.any(False)
    cpu, clock = time.process_time(), time.perf_counter()
    value = act()
    cpu = time.process_time() - cpu
    ranks.any(False)
    clock = time.perf_counter() - clock
    say(f"process {ranks.number} of {ranks.count}: {name}: {cpu:.1f} s of CPU time, {clock:.1f} s")
    return value


def main() -> None:
    """Generate both, in the processes that a launcher has started."""
    torch.set_num_threads(1)
    with joined() as ranks:
        base = load_base(ASSETS / "model", LoadSpec(device="cpu"))
        rows = read_dataset(data_file("hallucination", "forget"))
        template = choose_template(base.tokenizer, "auto", rows)
        wanted = Wanted(1536, 0.5, 40, 0, 256)
        made = timed("1,536 own rows", ranks, lambda: self_made_rows(base, rows, template, wanted))
        files = [read_dataset(data_file(kind, name)) for kind in _KINDS for name in _FILES]
        sets = [encode(file, base.tokenizer, template, 512, drop_long=True).examples for file in files]
        out = timed(f"{sum(map(len, sets))} greedy answers", ranks, lambda: outputs_each(base, sets))
        texts = [(r.prompt, r.completion) for r in made.records], out
        if ranks.main:
            say(f"texts: sha256 {hashlib.sha256(repr(texts).encode()).hexdigest()[:16]}")


if __name__ == "__main__":
    main()
