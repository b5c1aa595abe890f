"""Time and memory of a step, and a fresh process to measure memory in."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_STATUS = Path("/proc/self/status")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "peft", "bitsandbytes", "qunlearn.train"]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of `work`, the card's queue included."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what is free, to the system and to the card."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def return_frees_at_once() -> None:
    """Let glibc give every freed tensor of 64 KiB or more back to the system: what is resident is what is in use.

    It costs time, so nothing is timed in such a process.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 16)


def used_bytes(device: torch.device) -> int:
    """Allocated on the card; on a CPU the anonymous resident memory of this process (0 where there is no /proc)."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


class Peak:
    """The highest memory while inside: from the allocator on a card, else sampled every millisecond.

    Only anonymous pages are counted on a CPU: the libraries' code, read in as it is first used, is not the step's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak_bytes, self.reserved_bytes = device, 0, 0
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.peak_bytes = used_bytes(self.device)
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = int(torch.cuda.max_memory_allocated(self.device))
            self.reserved_bytes = int(torch.cuda.max_memory_reserved(self.device))
        else:
            self._done.set()
            self._sampler.join()

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self.peak_bytes = max(self.peak_bytes, used_bytes(self.device))


def in_fresh_process(work: Callable[..., T], *args: Any, device: torch.device) -> T:
    """`work(*args)` in a process of its own that has imported the libraries and done nothing else."""
    # A forked child has the imports for nothing, but CUDA does not survive a fork.
    fork = device.type == "cpu" and "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if fork else "spawn")
    if fork:
        context.set_forkserver_preload(_PRELOAD)
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(work, *args).result()


def each_in_fresh_process(work: Callable[..., T], calls: Sequence[tuple[Any, ...]], *, device: torch.device) -> list[T]:
    """`work` with each of these arguments in a process of its own: memory, which neighbours on a CPU do not change, so
    there two run at a time, with a thread each."""
    at_once = 2 if device.type == "cpu" else 1
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda args: in_fresh_process(_with_threads, at_once, work, args, device=device), calls))


def _with_threads(at_once: int, work: Callable[..., T], args: tuple[Any, ...]) -> T:
    if at_once > 1:
        torch.set_num_threads(1)
    return work(*args)
