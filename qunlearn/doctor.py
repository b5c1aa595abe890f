"""`qunlearn doctor`: check the installation and print what a bug report needs; no paths, no names."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from qunlearn import __version__

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "tokenizers", "numpy")
_LITTLE_DISK_BYTES = 1 << 30
OK, BROKEN, NOTE = "ok", "broken", "note"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ok, broken, or worth a note."""

    name: str
    state: str
    text: str
    hint: str | None = None


def examine() -> list[Finding]:
    """Everything there is to look at, the cheap first. Raises nothing: what fails is a finding."""
    looks: Sequence[tuple[str, Callable[[], Finding]]] = (
        ("system", _system),
        ("packages", _packages),
        ("memory", _memory),
        ("disk", _disk),
        ("cuda", _cuda),
        ("bitsandbytes, 4-bit", _four_bit),
        ("bitsandbytes, 8-bit optimizer", _eight_bit),
        ("sandbox", _sandbox),
    )
    return [_looked(name, look) for name, look in looks]


def _looked(name: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:  # noqa: BLE001 - a broken installation may raise anything, and that is the finding
        first = (str(error).strip().splitlines() or [""])[0][:200]
        return Finding(name, BROKEN, f"{type(error).__name__}: {_without_paths(first)}", "install the package again")


def _without_paths(text: str) -> str:
    """A message without where on this machine things are."""
    return " ".join("(a path)" if any(slash in word for slash in "/\\") else word for word in text.split())


def _system() -> Finding:
    cores = os.cpu_count() or 0
    text = f"qunlearn {__version__}, python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Finding("system", OK if sys.version_info >= (3, 10) else BROKEN, f"{text}, {cores} cores")


def _packages() -> Finding:
    found, absent = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            absent.append(name)
    for name in set(_PACKAGES) - set(absent):
        importlib.import_module(name)
    if absent:
        return Finding("packages", BROKEN, f"not installed: {', '.join(absent)}", "pip install qunlearn again")
    return Finding("packages", OK, ", ".join(found))


def _memory() -> Finding:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return Finding("memory", NOTE, "the system does not say")
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    free = os.sysconf("SC_AVPHYS_PAGES") * page if "SC_AVPHYS_PAGES" in names else 0
    return Finding("memory", OK, f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of it free")


def _disk() -> Finding:
    free = shutil.disk_usage(Path()).free
    try:
        with tempfile.TemporaryFile(dir=".") as file:
            file.write(b"0")
    except OSError as error:
        text = f"this folder cannot be written: {error.strerror}"
        return Finding("disk", NOTE, text, "runs need an --output that can be written")
    if free < _LITTLE_DISK_BYTES:
        return Finding("disk", NOTE, f"{free / 2**20:.0f} MiB free here", "checkpoints and merges may not fit")
    return Finding("disk", OK, f"{free / 2**30:.1f} GiB free here, and it can be written")


def _cuda() -> Finding:
    import torch

    from qunlearn.model.device import choose_dtype, describe_device

    cpu = describe_device(torch.device("cpu"))
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for the CPU"
        return Finding("cuda", NOTE, f"no GPU: {built}; {cpu}")
    gpus = []
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        product = torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
        if float(product.sum()) != 512.0:
            return Finding("cuda", BROKEN, f"{describe_device(device)} does not multiply", "check the driver")
        gpus.append(f"{describe_device(device)}, computing in {str(choose_dtype(device)).removeprefix('torch.')}")
    return Finding("cuda", OK, f"CUDA {torch.version.cuda}; {'; '.join(gpus)}")


def _device() -> Any:
    from qunlearn.model.device import choose_device

    return choose_device("auto")


def _four_bit() -> Finding:
    """A 4-bit layer against the weights it says it has: its output, and the gradient of its input."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from qunlearn.model.load import keep_training_path

    device = _device()
    layer = Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    keep_training_path(layer)
    layer = layer.to(device)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    x = torch.linspace(-1, 1, 256, device=device).reshape(2, 128).requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    wrong = [
        name
        for name, ours, theirs in (("output", y, x @ weight.T), ("gradient", gradient[0], weight.sum(0)))
        if not torch.allclose(ours.float(), theirs, rtol=1e-3, atol=1e-3)
    ]
    name = "bitsandbytes, 4-bit"
    if wrong:
        return Finding(name, BROKEN, f"the {' and the '.join(wrong)} of a 4-bit layer is wrong on {device.type}")
    return Finding(name, OK, f"output and gradient of an nf4 layer are right on {device.type}")


def _eight_bit() -> Finding:
    """One step from zero moves every number by the learning rate, whatever its gradient's size."""
    import torch

    from qunlearn.config.training import TrainConfig
    from qunlearn.training.optimizer import make_optimizer

    device, name = _device(), "bitsandbytes, 8-bit optimizer"
    p = torch.nn.Parameter(torch.zeros(64, 128, device=device))
    optimizer = make_optimizer([p], TrainConfig(optimizer="adamw8bit"), 1e-3)
    p.grad = torch.where(torch.arange(p.numel(), device=device) % 2 == 0, 1.0, -1.0).view_as(p)
    optimizer.step()
    if not torch.allclose(p.detach(), -1e-3 * p.grad, rtol=0.05):
        return Finding(name, BROKEN, f"its step is wrong on {device.type}", "--optimizer adamw does without it")
    return Finding(name, OK, f"its step is right on {device.type}")


def _sandbox() -> Finding:
    from qunlearn.hub.preflight import preflight_folder
    from qunlearn.sandbox import ASSETS

    facts = preflight_folder(ASSETS / "model")
    return Finding("sandbox", OK, f"the embedded model is whole, {facts.tensors} tensors")


def as_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """For --json."""
    state = BROKEN if any(f.state == BROKEN for f in findings) else OK
    return {"status": state, "findings": [asdict(f) for f in findings]}
