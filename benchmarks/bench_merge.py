"""`make bench-merge`: what merging costs in time and memory, against `cp` of the same files on the same disk.

    python benchmarks/bench_merge.py [--shape small|llama-2-7b] [--rounds N] [--base original|dequantized] [--write]

A model of random weights and an adapter (r = 16 on every linear layer) are written to a temporary folder; then `cp` and
`qunlearn merge --no-measure` take turns. A merge has everything on the disk when it ends, a copy has not: so the copy
is timed alone and with the `sync` after it. Neither finds the source in memory. `--write` replaces the table in
benchmarks/RESULTS.md. The disk needs about 2.1 times the model: 29 GB for the shape llama-2-7b.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# torch is imported where the model is made, which is another process: the peak memory that the system tells of a
# child is at least that of the process that started it.
RESULTS = Path(__file__).with_name("RESULTS.md")
BEGIN, END = "<!-- merge: begin -->", "<!-- merge: end -->"
SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 4, "num_attention_heads": 16},
    "llama-2-7b": {},  # what LlamaConfig says unasked
}
SHARD_BYTES = 5_000_000_000
RANK = 16


def make(folder: Path, shape: str) -> None:
    """A model folder of random bf16 weights, written tensor by tensor, and an adapter for it."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    from qunlearn.hub.safetensors_file import header
    from qunlearn.sandbox import ASSETS

    torch.manual_seed(0)
    base, config = folder / "base", LlamaConfig(**SHAPES[shape])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    size = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    config.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "model" / name, base / name)
    shards: list[list[str]] = [[]]
    for name in shapes:
        if sum(size[n] for n in shards[-1]) + size[name] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    placed = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        placed.update(dict.fromkeys(names, file))
        with (base / file).open("wb") as out:
            out.write(header((n, "BF16", shapes[n], size[n]) for n in names))
            for n in names:
                out.write((0.02 * torch.randn(shapes[n])).bfloat16().view(torch.uint8).numpy().tobytes())
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            rows, columns = module.weight.shape
            tensors[f"base_model.model.{name}.lora_A.weight"] = 0.01 * torch.randn(RANK, columns)
            tensors[f"base_model.model.{name}.lora_B.weight"] = 0.01 * torch.randn(rows, RANK)
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "base_model_name_or_path": str(base)}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))


def forget_cached(folder: Path) -> None:
    """Have the source read from the disk again, where the system lets a user ask for that."""
    os.sync()
    if hasattr(os, "posix_fadvise"):
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str]) -> dict[str, float]:
    """Seconds of a command alone and with the sync after it, and its peak resident memory in bytes."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    talk = process.stderr.read() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status:
        raise SystemExit(f"{command[0]} failed: {talk}")
    os.sync()
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "synced": time.monotonic() - started, "peak": peak, "cpu": cpu}


def rounds(folder: Path, base: Path, kind: str, count: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    copy, merged = folder / "copy", folder / "merged"
    merge = [sys.executable, "-m", "qunlearn", "merge", str(folder / "adapter"), "-o", str(merged)]
    copies, merges = [], []
    for _ in range(count):
        forget_cached(base)
        copies.append(timed(["cp", "-r", str(base), str(copy)]))
        shutil.rmtree(copy)
        forget_cached(base)
        merges.append(timed([*merge, "--base", kind, "--no-measure", "--device", "cpu"]))
        shutil.rmtree(merged)
        print(f"cp {copies[-1]}\nmerge {merges[-1]}", file=sys.stderr, flush=True)  # noqa: T201
    return copies, merges


def row(shape: str, kind: str, size: int, copies: list[Any], merges: list[Any]) -> str:
    def middle(runs: list[Any], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    cells = [
        shape,
        kind,
        f"{size / 1e9:.2f}",
        f"{middle(copies, 'seconds'):.1f}",
        f"{middle(copies, 'synced'):.1f}",
        f"{middle(merges, 'synced'):.1f}",
        f"{middle(merges, 'synced') / middle(copies, 'seconds'):.2f}",
        f"{middle(merges, 'synced') / middle(copies, 'synced'):.2f}",
        f"{middle(merges, 'cpu'):.0f}",
        f"{max(run['peak'] for run in merges) / 1e9:.2f}",
        str(len(merges)),
    ]
    return f"| {' | '.join(cells)} |"


HEADER = [
    "shape",
    "base",
    "weights, GB",
    "cp, s",
    "cp + sync, s",
    "merge, s",
    "x cp",
    "x cp + sync",
    "merge, CPU s",
    "peak RSS, GB",
    "rounds",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--base", choices=("original", "dequantized"), default="original")
    parser.add_argument("--folder", help="where the temporary folder is made: the disk to measure")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.shape)
        return
    with tempfile.TemporaryDirectory(prefix="qunlearn-bench-", dir=args.folder) as temporary:
        folder, base = Path(temporary), Path(temporary) / "base"
        subprocess.run([sys.executable, __file__, "--shape", args.shape, "--make", temporary], check=True)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        made = row(args.shape, args.base, size, *rounds(folder, base, args.base, args.rounds))
    where = f"{datetime.date.today()}, {os.cpu_count()} CPUs, {platform.machine()}, torch {metadata.version('torch')}"
    command = f"make bench-merge ARGS='--shape {args.shape} --rounds {args.rounds} --base {args.base}'"
    table = [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER), made]
    print("\n".join([f"{where}; `{command}`", "", *table]))  # noqa: T201 - a benchmark talks
    if args.write:
        text = RESULTS.read_text(encoding="utf-8")
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        content = "\n".join([f"{where}; `{command}`", "", *table])
        RESULTS.write_text(f"{head}{BEGIN}\n{content}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
