"""The most memory alive at once while something runs, as torch's own allocators count it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes `run` had alive at its worst moment, beyond what was alive before it.

    On a CPU every allocation is seen, temporaries inside of operators too; what was there before and is freed within
    counts as still there.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    live, most = 0, 0
    for size in allocations(run):
        live += size
        most = max(most, live)
    return most


def allocations(run: Callable[[], object]) -> list[int]:
    """Sizes of the CPU allocator's events while `run` runs, in order; what is freed is negative."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    roots = profiler.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    events = sorted(_memory_events(roots), key=lambda event: event[0])
    return [size for _, size in events]


def _memory_events(nodes: list[Any]) -> Iterator[tuple[int, int]]:
    """(time, size) of every allocation below these nodes."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        stack += node.children
        kind, fields = node.typed
        if kind == _EventType.Allocation:
            yield node.start_time_ns, fields.alloc_size
