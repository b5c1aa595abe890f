"""`make bench-launches`: the operations that a step gives a GPU, counted without one.

    python benchmarks/bench_launches.py [--write]

Counted is what torch dispatches on a CPU that takes the path of a GPU, but for what only looks at memory in another
way: a decoder block's as half the difference between four blocks and two, a step's beside them as the rest, the
optimizer's apart. A norm that a GPU has a kernel for counts as one operation a pass. One pass holds the whole step.
bitsandbytes' 4-bit product counts as one, and is up to four kernels on a GPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import _contestants
from _contestants import CONTESTANTS, Arena, new_policy
from _models import Shape, random_base
from _report import out, table, where_line, write_section
from _rows import Drawer, Lengths
from qunlearn.model.kernels import lora, norm
from qunlearn.model.kernels.fused import fuse
from qunlearn.model.kernels.lora import make_lean

_LOOKS = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "expand",
        "slice",
        "unsqueeze",
        "squeeze",
        "detach",
        "alias",
        "permute",
    ),
    *("as_strided", "select", "split", "split_with_sizes", "unbind", "lift_fresh", "_local_scalar_dense"),
    *("empty", "empty_like", "empty_strided", "new_empty"),
}
_FEW, _MORE = 2, 4
_CPU = torch.device("cpu")
_ROWS = Lengths((4, 8), (4, 12), 6.0)


class Dispatched(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name not in _LOOKS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _OneNorm(torch.autograd.Function):
    """A fused norm where there is no kernel for it: computed unseen, and counted as one operation each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        with _disable_current_modes():
            y = torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        with _disable_current_modes(), torch.enable_grad():
            x = x.detach().requires_grad_()
            y = torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, ctx.eps)
            (found,) = torch.autograd.grad(y, x, gradient)
        return found.clone(), None, None


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let norms and products into another precision be one operation, and layers in 4 bits compute with adapters."""
    ours, product, lean = norm._norm, lora._product, _contestants.make_lean

    def one_product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        found = x @ y
        with _disable_current_modes():
            return found.to(dtype)

    lora._product = one_product
    norm._norm = lambda weight, eps, x: _OneNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    _contestants.make_lean = lambda layers, **_: make_lean(layers, whole=True)
    try:
        yield
    finally:
        norm._norm, lora._product, _contestants.make_lean = ours, product, lean


def counted(key: str, layers: int) -> Counter[str]:
    """The operations of a contestant's second step with so many blocks."""
    shape = Shape("counted", 256, layers, 4, 4, 512, 1024, tied=False)
    base, lean = random_base(shape, _CPU), CONTESTANTS[key].lean
    with as_on_a_gpu():
        if lean:
            fuse(base.model)
        arena = Arena.build(new_policy(base), max_tokens=4096)
        rows = Drawer(shape.vocabulary, 0, _ROWS).step_of(512, 1)
        arena.prepare(key, shape, [rows], 0)
        arena.step(key, rows)
        arena.optimizer.step = lambda: None  # type: ignore[method-assign]
        with Dispatched() as found:
            arena.step(key, rows)
    return found.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the section of RESULTS.md")
    parser.add_argument("--by-name", action="store_true", help="each operation of a block")
    args = parser.parse_args()
    lines = []
    for key in ("c", "d'", "d"):
        few, more = counted(key, _FEW), counted(key, _MORE)
        block = {name: (more[name] - few[name]) / (_MORE - _FEW) for name in more}
        rest = few.total() - _FEW * sum(block.values())
        lines.append([f"({key}) {CONTESTANTS[key].title}", f"{sum(block.values()):.0f}", f"{rest:.0f}"])
        if args.by_name:
            out(f"({key}) " + ", ".join(f"{name} {n:g}" for name, n in sorted(block.items(), key=lambda x: -x[1]) if n))
    text = f"{where_line(_CPU, 'python benchmarks/bench_launches.py')}\n\n"
    text += table(["", "operations a block: forward, recomputation, backward", "a step beside the blocks"], lines)
    out(text)
    if args.write:
        write_section("launches", text)


if __name__ == "__main__":
    main()
