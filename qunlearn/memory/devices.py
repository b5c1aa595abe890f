"""Ask the driver and the system for the device: importing torch would take longer than the whole plan."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from pathlib import Path
from typing import Any

from qunlearn.errors import DeviceError
from qunlearn.memory.plan import DeviceFacts

_LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")
_CPUINFO = Path("/proc/cpuinfo")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def found_device(asked: str) -> DeviceFacts:
    """The device a run would be on: the CPU where it is asked for, else a GPU, whether or not there is one here.

    Raises DeviceError for a name that is none.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", asked):
        raise DeviceError(f"unknown device {asked!r}", where="--device", hint="one of auto, cpu, cuda, cuda:N")
    if asked == "cpu":
        return DeviceFacts("cpu", cpu_compute_bytes())
    return find_gpu(int(asked.partition(":")[2] or 0)) or DeviceFacts("cuda", 2)


def cpu_compute_bytes() -> int:
    """Bytes of a number on this CPU: bf16 where it has units for it, else fp32 (as model/device.py chooses)."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace") if platform.system() == "Linux" else ""
    except OSError:
        return 4
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    return 2 if flags and _BF16_FLAGS & set(flags[1].split()) else 4


def find_gpu(index: int) -> DeviceFacts | None:
    """The NVIDIA GPU of this index among the visible ones, from the driver's library; None where there is none."""
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    if visible:
        if index >= len(visible) or not visible[index].isdigit():
            return None
        index = int(visible[index])
    library = _library()
    if library is None or library.nvmlInit_v2() != 0:
        return None
    try:
        return _gpu(library, index)
    finally:
        library.nvmlShutdown()


def _library() -> Any:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _gpu(library: Any, index: int) -> DeviceFacts | None:
    handle, memory, name = ctypes.c_void_p(), _Memory(), ctypes.create_string_buffer(96)
    if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        return None
    if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    named = library.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name))) == 0
    told = name.value.decode(errors="replace") if named else "a CUDA GPU"
    return DeviceFacts("cuda", 2, int(memory.total), told)
