"""`make bench-gpu`: the step at the true shapes of 3B to 8B models, random weights, under the memory of small gpus.

    python benchmarks/bench_gpu.py [--json FILE] [--write] [--vram 6 8] [--tokens 1024 4096] [--shapes Llama-2-7B ...]
    python benchmarks/bench_gpu.py --tiny --device cpu

Weights are drawn and quantised on the GPU one layer at a time; nothing is downloaded. `--vram` caps the allocator, in
GB of 10^9 bytes: about what a GPU of as many GiB has left beside the CUDA context. A step that does not fit is tried
again with half the tokens a pass, which changes no result. Achieved FLOP/s: 2 FLOP for each weight a token meets, in
forward, recomputation and backward each; embeddings, attention scores and the reference's pass are not counted, the
head only where a token is supervised. They are set against a bf16 matrix product measured on the same GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch

from _contestants import CONTESTANTS, Arena, new_policy
from _engine import engine_supervised
from _meter import Peak, release, seconds, used_bytes
from _models import TRUE_SHAPES, Shape, random_base
from _report import machine, out, say, table, where_line, write_section
from _rows import Drawer, Lengths, Rows
from qunlearn.config.settings import Config
from qunlearn.memory.families import read_shape
from qunlearn.memory.plan import DeviceFacts, run_choices
from qunlearn.memory.step import Load, run_needs
from qunlearn.model.device import choose_device, choose_dtype

TINY = (
    Shape("tiny", 64, 2, 4, 2, 128, 512, tied=True),
    Shape("tiny, qwen2", 64, 2, 4, 2, 128, 512, tied=False, family="qwen2"),
)
_SMALLEST_PASS = 128  # tokens; below this a step is given up as too large
_WARM, _TIMED = 3, 3  # steps: a shape's first, its second, which is recorded, and its first replay


def predicted_bytes(policy: Any, *, tokens: int, max_tokens: int, k: int) -> int | None:
    """What the memory plan says a step allocates at most, everything loaded included; None on a CPU, where the whole
    process is measured. `tokens` of the step, `max_tokens` of one pass."""
    if policy.device.type != "cuda":
        return None
    family = Lengths().prompt[1] + (1 + k) * Lengths().answer[1]
    load = Load(max_tokens, min(family, max_tokens), max_tokens, tokens, family)
    recorded = policy.graphs is not None and not policy.graphs.off
    choices = run_choices(Config(), DeviceFacts("cuda", policy.dtype.itemsize), "adamw", "device", recorded=recorded)
    return run_needs(read_shape(policy.base.model.config.to_dict()), choices, load).allocated_bytes


def matmul_flops(device: torch.device, n: int) -> float:
    """FLOP/s of an n x n x n product in the dtype the model computes in: what the GPU gives at best."""
    a, b = (torch.randn(n, n, device=device, dtype=choose_dtype(device)) for _ in range(2))
    times = [seconds(lambda: torch.mm(a, b), device) for _ in range(13)]
    return 2 * n**3 / statistics.median(times[3:])


def step_flop(arena: Arena, key: str, rows: Rows) -> float:
    """2 FLOP per weight and token, three times: forward, recomputation, backward."""
    linears = (m for m in arena.policy.base.model.modules() if isinstance(m, bnb.nn.Linear4bit))
    layers = sum(int(m.in_features * m.out_features) for m in linears)
    head = arena.policy.head.weight.numel()
    if key == "c":
        supervised = sum(len(e.input_ids) - e.start for e in arena.plain[CONTESTANTS[key].tokens(rows)])
    else:
        supervised = engine_supervised(rows)
    return 6.0 * (layers * CONTESTANTS[key].tokens(rows) + head * supervised)


def cell(arena: Arena, key: str, rows: Rows, matmul: float) -> dict[str, Any]:
    """One contestant on one step, with half the tokens a pass as often as memory runs out."""
    device, tokens = arena.policy.device, CONTESTANTS[key].tokens(rows)
    max_tokens = tokens
    while True:
        arena.limit_passes(max_tokens)
        try:
            with Peak(device) as peak:
                times = [seconds(lambda: arena.step(key, rows), device) for _ in range(_WARM + _TIMED)][_WARM:]
            break
        except torch.OutOfMemoryError:
            max_tokens //= 2
        # Outside of the handler: its traceback holds the tensors that filled the GPU.
        arena.policy.graphs = arena.graphs = None
        arena.optimizer.zero_grad(set_to_none=True)
        release(device)
        if max_tokens < _SMALLEST_PASS or key in ("a", "a'", "b"):  # those make one pass per loss, whatever its size
            return {"status": "out of memory"}
    step_s = statistics.median(times)
    flops = step_flop(arena, key, rows) / step_s
    return {
        "status": "ok",
        "max_tokens": max_tokens,
        "step_s": step_s,
        "times_s": times,
        "trained_tokens": tokens,
        "tokens_per_s": tokens / step_s,
        "flops_per_s": flops,
        "share_of_matmul": flops / matmul,
        "peak_allocated_bytes": peak.peak_bytes,
        "peak_reserved_bytes": peak.reserved_bytes,
    }


def profiled(arena: Arena, key: str, rows: Rows) -> dict[str, Any]:
    """Kernels, launches and the share of time the GPU is busy in one step, and what takes longest there."""
    device, activities = (
        arena.policy.device,
        [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA],
    )
    with torch.profiler.profile(activities=activities) as profile:
        wall = seconds(lambda: arena.step(key, rows), device)
    events = profile.key_averages()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.self_device_time_total for e in kernels) / 1e6
    launched = sum(e.count for e in events if e.key in ("cudaLaunchKernel", "cudaGraphLaunch", "cuLaunchKernelEx"))
    longest = sorted(kernels, key=lambda e: -e.self_device_time_total)[:8]
    return {
        "wall_s": wall,
        "busy_s": busy,
        "kernels": sum(e.count for e in kernels),
        "launches": launched,
        "longest": [{"kernel": e.key[:90], "count": e.count, "s": e.self_device_time_total / 1e6} for e in longest],
    }


def measure(shape: Shape, args: argparse.Namespace, device: torch.device, matmul: float) -> Iterator[dict[str, Any]]:
    """Every cell of one shape. The model is made once; caps are set around the steps."""
    common = {"shape": shape.name}
    base = random_base(shape, device, seed=args.seed)
    loaded = used_bytes(device)
    arena = Arena.build(new_policy(base), max_tokens=max(args.tokens))
    lengths = Lengths((4, 8), (4, 12), 6.0) if args.tiny else Lengths()
    for cap in args.vram:
        limit_memory(cap, device)
        for tokens in args.tokens:
            rows = Drawer(shape.vocabulary, args.seed, lengths).step_of(tokens, args.k)
            for key in args.contestants:
                where = common | {"contestant": key, "vram_gb": cap, "step_tokens": tokens, "k": args.k}
                where |= {"loaded_bytes": loaded, "predicted_bytes": None}
                if time.monotonic() > args.deadline:
                    yield where | {"status": "not measured: out of time"}
                    continue
                try:
                    arena.prepare(key, shape, [rows], args.seed)
                except torch.OutOfMemoryError:
                    yield where | {"status": "out of memory before the first step"}
                    continue
                figures = cell(arena, key, rows, matmul)
                if args.profile and figures["status"] == "ok" and device.type == "cuda":
                    figures["profile"] = profiled(arena, key, rows)
                if figures["status"] == "ok" and key in ("d", "d'"):
                    passes = {"max_tokens": figures["max_tokens"], "k": args.k}
                    where["predicted_bytes"] = predicted_bytes(arena.policy, tokens=tokens, **passes)
                yield where | figures
                arena.drop()
                release(device)


def limit_memory(cap_gb: float, device: torch.device) -> None:
    """Cap the allocator at so many GB (10^9 bytes); 0 is no cap."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gb * 1e9 / total) if cap_gb else 1.0, device)


def results(args: argparse.Namespace, device: torch.device, matmul: float) -> list[dict[str, Any]]:
    """All shapes; one that cannot even be loaded is a line like any other."""
    found: list[dict[str, Any]] = []
    for shape in args.shapes:
        say(f"{shape.name} on {device}")
        limit_memory(0, device)
        try:
            for figures in measure(shape, args, device, matmul):
                found.append(figures)
                say("  " + " | ".join(cells(figures)))
                if "profile" in figures:
                    say(f"    {figures['profile']}")
        except torch.OutOfMemoryError:
            found.append({"shape": shape.name, "status": "out of memory while loading"})
            say(f"  {shape.name}: out of memory while loading")
        release(device)
    return found


HEADER = ["shape", "cap GB", "tokens in the step", "", "tokens a pass", "step s", "tokens/s", "TFLOP/s"]
HEADER += ["of a matrix product", "peak allocated GiB", "peak reserved GiB", "planned GiB"]


def cells(r: dict[str, Any]) -> list[str]:
    """One row of the table."""
    cap = f"{r['vram_gb']:g}" if r.get("vram_gb") else "none"
    first = [r["shape"], cap, str(r.get("step_tokens", "")), f"({r['contestant']})" if "contestant" in r else ""]
    if r["status"] != "ok":
        return [*first, r["status"], *[""] * 7]
    planned = r["predicted_bytes"]
    return [
        *first,
        str(r["max_tokens"]),
        f"{r['step_s']:.3f}",
        f"{r['tokens_per_s']:.0f}",
        f"{r['flops_per_s'] / 1e12:.2f}",
        f"{100 * r['share_of_matmul']:.0f} %",
        f"{r['peak_allocated_bytes'] / 2**30:.2f}",
        f"{r['peak_reserved_bytes'] / 2**30:.2f}",
        "" if planned is None else f"{planned / 2**30:.2f}",
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in TRUE_SHAPES]
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--write", action="store_true", help="replace the section of RESULTS.md")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for tests, in seconds")
    parser.add_argument("--shapes", nargs="+", default=names, choices=names)
    parser.add_argument("--vram", type=float, nargs="+", help="caps in GB, 0 for none; default 6 8")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens in a step; default 1024 4096")
    parser.add_argument("--k", type=int, default=1, help="mismatched answers of a bad row")
    parser.add_argument("--contestants", nargs="+", default=["d", "d'", "c"], choices=list(CONTESTANTS))
    parser.add_argument("--seconds", type=float, default=420, help="no cell is begun after so long")
    parser.add_argument("--profile", action="store_true", help="a step of each once more, kernel by kernel")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.shapes = TINY if args.tiny else [shape for shape in TRUE_SHAPES if shape.name in args.shapes]
    args.tokens = args.tokens or ([64] if args.tiny else [1024, 4096])
    args.deadline = time.monotonic() + args.seconds
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args, started = parse(argv), time.monotonic()
    device = choose_device(args.device)
    args.vram = (args.vram or [6, 8]) if device.type == "cuda" else [0]  # nothing caps a CPU
    matmul = matmul_flops(device, 8192 if device.type == "cuda" and not args.tiny else 256)
    found = results(args, device, matmul)
    took = time.monotonic() - started
    typed = " ".join(["python benchmarks/bench_gpu.py", *(sys.argv[1:] if argv is None else argv)])
    text = f"{where_line(device, typed)}; {took:.0f} s. Matrix product: {matmul / 1e12:.2f} TFLOP/s"
    text += f"\n\n{table(HEADER, map(cells, found))}"
    out(text)
    record = {"machine": machine(device), "seconds": took, "matmul_flops_per_s": matmul, "results": found}
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.write:
        write_section("gpu", text)


if __name__ == "__main__":
    main()
