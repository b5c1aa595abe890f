"""Choose the device and the dtype, and measure memory."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator

import torch

from qunlearn.errors import DeviceError
from qunlearn.memory.plan import DeviceFacts
from qunlearn.utils.launch import number_here, process_count


def choose_device(asked: str) -> torch.device:
    """The device asked for, or CUDA where there is one; each of several processes takes a GPU. Raises DeviceError."""
    if asked == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        asked = "cuda"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", asked):
        hint = "one of auto, cpu, cuda, cuda:N"
        raise DeviceError(f"unknown device {asked!r}", where="--device", hint=hint)
    device = torch.device(asked)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index is not None and process_count() > 1:
            hint = "--device cuda: each process takes a GPU of its own; CUDA_VISIBLE_DEVICES says which there are"
            raise DeviceError(f"{process_count()} processes cannot share {asked}", where="--device", hint=hint)
        index = number_here() if device.index is None else device.index
        if index >= count:
            hint = "use --device cpu, or install the CUDA build of torch and a driver"
            message = f"{asked} was asked for, {count} CUDA devices are there"
            if process_count() > 1:
                message = f"process {index} of this machine has no GPU: {count} are there"
                hint = "launch fewer processes, or use --device cpu"
            raise DeviceError(message, where="--device", hint=hint)
        return torch.device("cuda", index)
    return device


def choose_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware computes in it; else fp16 on a GPU, and fp32 on a CPU.

    A CPU without bf16 units emulates them: a 4-bit layer, forward and backward, took 35 times as long as in fp32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    probe = getattr(torch.cpu, "get_capabilities", None)
    if probe is None:  # torch 2.11
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    capabilities = probe()
    return any(capabilities.get(unit, False) for unit in ("avx512_bf16", "amx_bf16", "bf16"))


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} ({properties.name}, {properties.total_memory / 2**30:.1f} GiB)"
    return f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"


def device_facts(device: torch.device) -> DeviceFacts:
    """Return what the memory plan wants to know of a device."""
    compute_bytes = choose_dtype(device).itemsize
    if device.type != "cuda":
        return DeviceFacts("cpu", compute_bytes)
    properties = torch.cuda.get_device_properties(device)
    return DeviceFacts("cuda", compute_bytes, properties.total_memory, properties.name)


def cap_memory(device: torch.device, size_bytes: int) -> None:
    """Let torch allocate so much on a GPU and no more; beyond it is out of memory. Does nothing on a CPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, size_bytes) / total), device)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with so many threads on the CPU. The number is the whole process's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory so far: allocated on the GPU, or resident for the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
