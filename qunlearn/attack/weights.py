"""Family D: the adapter merged and rounded again, scaled, or cut in its rank; nothing on the disk changes.

A merged weight is rounded layer by layer as it is used, and kept only where all of them are small: no second model is
in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant, quantize_4bit
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qunlearn.attack import formats
from qunlearn.attack.bench import Bench
from qunlearn.attack.cells import Cell
from qunlearn.model.policy import Policy

_KEPT_BYTES = 1 << 30
_ORIGINAL = "-original"


def run(bench: Bench, name: str) -> Cell:
    """Return the open questions' outcomes with the adapter in another form; none where that form is not there."""
    try:
        with _form(bench.policy, name):
            return formats.run(bench, "open")
    except _Absent as error:
        bench.notes.append(str(error))
        return Cell([None] * len(bench.facts), {})


class _Absent(Exception):
    pass


def _form(policy: Policy, name: str) -> contextlib.AbstractContextManager[None]:
    if name.startswith("scale"):
        return scaled(policy, int(name.removeprefix("scale")) / 100)
    if name == "half-rank":
        if all(len(_matrices(layer)[0]) == 1 for layer in policy.layers):
            raise _Absent("an adapter of rank 1 has no half of it")
        return half_rank(policy)
    form = name.removesuffix(_ORIGINAL)
    return rounded(policy, form, policy.base.folder if name.endswith(_ORIGINAL) else None)


# -- the adapter itself ------------------------------------------------------------------------------------


@contextlib.contextmanager
def scaled(policy: Policy, factor: float) -> Iterator[None]:
    """The policy with the update under audit times a factor: 0 is the base, 1 the policy itself."""
    held = [(layer, name := next(iter(layer.lora_A)), layer.scaling[name]) for layer in policy.layers]
    try:
        for layer, name, scaling in held:
            layer.scaling[name] = factor * scaling
        yield
    finally:
        for layer, name, scaling in held:
            layer.scaling[name] = scaling


@contextlib.contextmanager
def half_rank(policy: Policy) -> Iterator[None]:
    """The policy with the larger half of the singular values of each update alone."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in policy.layers:
                a, b = _matrices(layer)
                kept.append((a.clone(), b.clone()))
                q, r = torch.linalg.qr(b.float())  # B A = Q (R A): the decomposition of a small matrix is enough
                u, s, v = torch.linalg.svd(r @ a.float(), full_matrices=False)
                s = torch.where(torch.arange(len(s), device=s.device) < max(1, len(s) // 2), s, torch.zeros_like(s))
                b.copy_(q @ u)
                a.copy_(s.unsqueeze(1) * v)
        yield
    finally:
        with torch.no_grad():
            for layer, (old_a, old_b) in zip(policy.layers, kept, strict=False):
                a, b = _matrices(layer)
                a.copy_(old_a)
                b.copy_(old_b)


def _matrices(layer: Any) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of the adapter under audit, which is the first."""
    name = next(iter(layer.lora_A))
    return layer.lora_A[name].weight, layer.lora_B[name].weight


# -- merged and rounded ------------------------------------------------------------------------------------


@contextlib.contextmanager
def rounded(policy: Policy, form: str, original: Path | None = None) -> Iterator[None]:
    """The policy as if merged, and rounded to nearest in a form; into the 16-bit weights of a folder where one is
    given, else into what the loaded weights mean."""
    layers = [(n, m) for n, m in policy.model.named_modules() if m in set(policy.layers)]
    size = sum(2 * m.in_features * m.out_features for _, m in layers)
    before = [layer.__dict__.get("forward") for _, layer in layers]
    try:
        for name, layer in layers:
            stored = None if original is None else _stored(original, name)
            made = partial(_merged, layer, form, stored, policy.dtype)
            weight = made() if size <= _KEPT_BYTES else None
            layer.forward = partial(_forward, layer, made if weight is None else partial(_same, weight))
        yield
    finally:
        for (_, layer), forward in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _same(weight: Tensor) -> Tensor:
    return weight


def _forward(layer: Any, weight: Callable[[], Tensor], x: Tensor) -> Tensor:
    w = weight()
    bias = layer.base_layer.bias
    return torch.nn.functional.linear(x.to(w.dtype), w, None if bias is None else bias.to(w.dtype))


@torch.no_grad()
def _merged(layer: Any, form: str, stored: Callable[[], Tensor] | None, dtype: torch.dtype) -> Tensor:
    """(out, in): what the rounded sum of weight and update means."""
    a, b = _matrices(layer)
    scaling = layer.scaling[next(iter(layer.lora_A))]
    weight = (meaning(layer.base_layer) if stored is None else stored()).to(a.device)
    return round_to(weight.float() + scaling * (b.float() @ a.float()), form, dtype)


def meaning(layer: Any) -> Tensor:
    """Return the weight (out, in) that a linear layer multiplies with, whatever it is stored in."""
    weight = layer.weight
    if isinstance(weight, bnb.nn.Params4bit) and weight.quant_state is not None:
        return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
    if isinstance(weight, bnb.nn.Int8Params):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return int8_vectorwise_dequant(weight.data, scales)  # type: ignore[no-any-return]
    return weight  # type: ignore[no-any-return]


def round_to(weight: Tensor, form: str, dtype: torch.dtype) -> Tensor:
    """Round a weight (out, in) to nearest: nf4 and fp4 in blocks of 64 (bitsandbytes), int8 by rows, int4gN in groups
    of N along a row, both with the largest size as the scale (absmax / 127, absmax / 7). Returns its meaning."""
    if form in ("nf4", "fp4"):
        packed, state = quantize_4bit(weight.to(dtype).contiguous(), quant_type=form)
        return dequantize_4bit(packed, state).to(dtype)  # type: ignore[no-any-return]
    if form == "int8":
        return nearest(weight, 127, weight.shape[1]).to(dtype)
    return nearest(weight, 7, int(form.removeprefix("int4g"))).to(dtype)


def nearest(weight: Tensor, levels: int, group: int) -> Tensor:
    """Round (out, in) to whole multiples of absmax / levels of each group along a row; the last group may be short."""
    out, width = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -width % group)).view(out, -1, group)
    scale = padded.abs().amax(dim=2, keepdim=True).clamp(min=1e-12) / levels
    return ((padded / scale).round() * scale).view(out, -1)[:, :width]


def _stored(folder: Path, module: str) -> Callable[[], Tensor]:
    """Return what reads a layer's weight from a checkpoint. Raises _Absent where it has another name there."""
    name = module.removeprefix("base_model.model.") + ".weight"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                if name in file.keys():  # noqa: SIM118 - not a dictionary
                    return partial(_read, path, name)
        except SafetensorError:
            continue
    raise _Absent("the checkpoint keeps its weights under other names: not merged into the 16-bit base")


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
