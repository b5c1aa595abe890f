"""Lay a model over the GPUs of this machine: which there are, and the device of each of its modules.

transformers loads each module onto its device, and accelerate's hooks move what passes from one to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from qunlearn.errors import ConfigError, DeviceError, ModelError
from qunlearn.model.device import choose_device, choose_dtype, describe_device, peak_memory_bytes
from qunlearn.utils.launch import process_count

Spans = tuple[tuple[int, int], ...]  # of the decoder blocks of each GPU: from, up to but not including

SHARDED = "fsdp"  # --device-map: each of several processes has a shard of every block, see sharded.py
# Names of what comes behind the last block; everything else outside the blocks comes before the first.
_BEHIND = {"norm", "final_layernorm", "final_layer_norm", "ln_f", "project_out"}


def chosen_devices(asked: str, device_map: str) -> tuple[torch.device, ...]:
    """The device asked for; all GPUs of this machine where a model is laid over them. Raises DeviceError, ConfigError.

    The last one has the output head, and is where rows, hidden states and losses are.
    """
    if device_map != "auto":
        return (choose_device(asked),)
    if asked not in ("auto", "cuda"):
        hint = "leave one of them out; CUDA_VISIBLE_DEVICES says which GPUs are used"
        raise ConfigError(f"of no use with --device {asked}", where=f"--device-map {device_map}", hint=hint)
    if process_count() > 1:
        hint = "start one process, without torchrun or accelerate launch"
        message = f"the GPUs are one process's; {process_count()} were launched"
        raise ConfigError(message, where=f"--device-map {device_map}", hint=hint)
    gpus = visible_gpus()
    if len(gpus) < 2:
        hint = "leave it out, or give --device cpu or cuda where a run has it; CUDA_VISIBLE_DEVICES says which are seen"
        raise DeviceError(
            f"it takes several GPUs, {len(gpus)} are there", where=f"--device-map {device_map}", hint=hint
        )
    return gpus


def visible_gpus() -> tuple[torch.device, ...]:
    """All CUDA devices of this machine that torch sees, in their order."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(torch.device("cuda", i) for i in range(count))


def least_dtype(devices: Sequence[torch.device]) -> torch.dtype:
    """Return what all of them compute in: fp16 where one of several GPUs has no bf16 (see `choose_dtype`)."""
    dtypes = {choose_dtype(device) for device in devices}
    return torch.float16 if torch.float16 in dtypes else dtypes.pop()


def describe_devices(devices: Sequence[torch.device]) -> str:
    """Return one or several devices in words."""
    return ", ".join(map(describe_device, devices))


def gpus_in_words(devices: Sequence[torch.device], spans: Spans) -> str:
    """Return which blocks are on which of several GPUs."""
    blocks = [f"{device}: blocks {start} to {stop - 1}" if stop > start else f"{device}: no block"
              for device, (start, stop) in zip(devices, spans, strict=True)]  # fmt: skip
    return f"{'; '.join(blocks)}; the output head is on {devices[-1]}"


def peak_on_any(devices: Sequence[torch.device]) -> int:
    """Highest memory so far on the device that had most (see `peak_memory_bytes`)."""
    return max(map(peak_memory_bytes, devices))


def module_devices(model: Any, blocks: Any, spans: Spans, gpus: Sequence[torch.device]) -> dict[str, str]:
    """The device of each module by name, blocks whole: what transformers takes as `device_map`.

    model: with any weights, on the meta device as well; blocks: its list of decoder blocks. Embeddings are on the first
    GPU, output head and last norm on the last; where the head shares their table, the embeddings too.
    Raises ModelError where the blocks are not as many as the spans say.
    """
    if len(spans) != len(gpus) or not spans or spans[-1][1] != len(blocks):
        placed = spans[-1][1] if spans else 0
        raise ModelError(f"the model has {len(blocks)} blocks, {placed} were placed", where="--device-map")
    head = model.get_output_embeddings()
    shared = head.weight is model.get_input_embeddings().weight
    of_block = [gpu for (start, stop), gpu in zip(spans, gpus, strict=True) for _ in range(start, stop)]
    found: dict[str, str] = {}
    for name, module in _outside(model, blocks):
        behind = shared or module is head or name.rsplit(".", 1)[-1] in _BEHIND
        found[name] = str(gpus[-1] if behind else gpus[0])
    path = next(name for name, module in model.named_modules() if module is blocks)
    return found | {f"{path}.{i}": str(gpu) for i, gpu in enumerate(of_block)}


def _outside(module: nn.Module, blocks: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest modules that hold no decoder block, in their order, by name."""
    for name, child in module.named_children():
        if child is blocks:
            continue
        full = f"{path}{name}"
        if any(inner is blocks for inner in child.modules()):
            yield from _outside(child, blocks, f"{full}.")
        else:
            yield full, child
