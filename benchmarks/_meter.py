"""Time and memory of a step, and a fresh process to run something in."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, ClassVar, TypeVar

import torch

T = TypeVar("T")
_PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "peft", "bitsandbytes", "qunlearn.training.loop"]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of `work`, the GPU's queue included."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what is free, to the system and to the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class _Mallinfo2(ctypes.Structure):
    """glibc's own counts, in bytes: `uordblks` in use in its heaps, `hblkhd` in mappings of their own."""

    _fields_: ClassVar = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def _mallinfo2() -> Any:
    function = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if function is not None:
        function.restype = _Mallinfo2
    return function


_ask_malloc = _mallinfo2()


def used_bytes(device: torch.device) -> int:
    """In use in the GPU's allocator; on a CPU in glibc's, whoever asked for it (0 where there is none that can tell).

    What was freed does not count, whether or not the system has it back: a step is measured at its usual speed.
    """
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if _ask_malloc is None:
        return 0
    said = _ask_malloc()
    return int(said.uordblks + said.hblkhd)


class Peak:
    """The highest memory in use while inside: told by the allocator on a GPU, else asked every millisecond."""

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
