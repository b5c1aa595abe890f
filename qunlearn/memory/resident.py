"""Estimate what stays in memory throughout a run: the frozen model, the adapter, the optimizer's state."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qunlearn.errors import ModelError
from qunlearn.memory.architecture import Linear, Shape
from qunlearn.memory.tiles import HEAD_BLOCK

# torch keeps one workspace for cuBLAS (CUBLAS_WORKSPACE_CONFIG's default, 4096:2:16:8); Hopper's is 32 MiB.
CUBLAS_BYTES = 8_519_680

_FP32 = 4
_PAGED_FROM = 100_000  # numbers; bitsandbytes pages no smaller state
_EIGHT_BIT_FROM = 4096  # numbers; nor does it keep smaller state in 8 bits


@dataclass(frozen=True)
class Choices:
    """Every decision that memory depends on. `optimizer`: adamw, adamw8bit or paged_adamw8bit; `embeddings`: device or
    cpu; `head`: full or 8bit; `compute_bytes`: of a number in the dtype that computes; `packed`: rows hold several
    examples, under a mask; `recorded`: passes are CUDA graphs; `apart`: losses whose gradients are kept apart;
    `kept_blocks`: with checkpointing, of the last blocks so many are not recomputed."""

    quant: str
    double_quant: bool
    compute_bytes: int
    on_gpu: bool
    r: int
    target_modules: str
    optimizer: str
    embeddings: str
    head: str
    offload: bool
    checkpointing: bool
    packed: bool
    recorded: bool = False
    apart: int = 0
    kept_blocks: int = 0

    @property
    def activations(self) -> str:
        """Return what becomes of activations, for people."""
        if not self.checkpointing:
            return "kept"
        return f"recomputed but for the last {self.kept_blocks} blocks" if self.kept_blocks else "recomputed"


def adapted_names(shape: Shape, target_modules: str) -> frozenset[str]:
    """The linear layers that get an adapter. Raises ModelError when there is none of these names."""
    there = {linear.name for linear, _ in shape.linears()}
    if target_modules == "all-linear":
        return frozenset(there)
    asked = {name.strip().rsplit(".", 1)[-1] for name in target_modules.split(",")}
    if not asked & there:
        hint = f"all-linear, or some of {', '.join(sorted(there))}"
        message = f"{shape.model_type} has no linear layers named {target_modules[:60]!r}"
        raise ModelError(message, where="--target-modules", hint=hint)
    return frozenset(asked & there)


def adapter_parameters(shape: Shape, r: int, adapted: frozenset[str]) -> int:
    """Numbers of the matrices A (r, in) and B (out, r) of all adapted layers."""
    return sum(n * r * (x.inputs + x.outputs) for x, n in shape.linears() if x.name in adapted)


def resident_bytes(shape: Shape, choices: Choices, adapted: frozenset[str]) -> dict[str, int]:
    """By component: the frozen model, the adapters, the optimizer's state."""
    return {
        "weights": _frozen_bytes(shape, choices),
        "embeddings": sum(other_bytes(shape, choices).values()),
        # As they are trained, and in the dtype that computes.
        "adapters": (_FP32 + choices.compute_bytes) * adapter_parameters(shape, choices.r, adapted),
        "optimizer state": _optimizer_bytes(shape, choices, adapted),
        "workspace": CUBLAS_BYTES if choices.on_gpu else 0,
    }


def loading_bytes(shape: Shape, choices: Choices) -> int:
    """The most that is on the device while the frozen model is loaded (model/load.py).

    Everything comes to the device first, one linear layer at a time in the dtype that computes before it is quantised;
    then the embeddings leave for the host, and then the head is rounded, both forms of it there until it is done.
    """
    c, frozen = choices.compute_bytes, _frozen_bytes(shape, choices)
    arriving = 0 if choices.quant == "none" else c * max(x.weights for x, _ in shape.linears())
    parts = other_bytes(shape, replace(choices, embeddings="device", head="full"))
    most = frozen + sum(parts.values()) + arriving
    if choices.head == "8bit":
        if choices.embeddings == "cpu":
            parts["table"] = c * shape.positions * shape.hidden
        most = max(most, frozen + sum(parts.values()) + other_bytes(shape, choices)["head"])
    return most


def _frozen_bytes(shape: Shape, choices: Choices) -> int:
    frozen = sum(n * weight_bytes(x, choices) for x, n in shape.linears())
    for name in shape.unquantised:
        x = next(x for x in shape.block if x.name == name)
        frozen += x.weights * choices.compute_bytes - weight_bytes(x, choices)
    return frozen


def other_bytes(shape: Shape, choices: Choices) -> dict[str, int]:
    """Return the bytes in no quantised layer: embeddings, the head where it has its own table, norms and biases."""
    c, numbers = choices.compute_bytes, shape.vocabulary * shape.embedding_width
    biases = sum(n * x.outputs for x, n in shape.linears() if x.bias)
    rounded = choices.head == "8bit"
    on_device = choices.embeddings == "device" or (shape.tied and not rounded)
    return {
        "table": c * (shape.embedding_parameters if on_device else shape.positions * shape.hidden),
        "head": numbers + _FP32 * -(-numbers // HEAD_BLOCK) if rounded else c * shape.head_parameters,
        "norms": c * (biases + shape.extra),
    }


def weight_bytes(x: Linear, choices: Choices) -> int:
    """A frozen matrix as bitsandbytes stores it: packed, with its scales."""
    if choices.quant == "none":
        return x.weights * choices.compute_bytes
    if choices.quant == "int8":
        return x.weights + _FP32 * x.outputs
    blocks = -(-x.weights // 64)
    scales = blocks + _FP32 * -(-blocks // 256) if choices.double_quant else _FP32 * blocks
    return -(-x.weights // 2) + scales


def _optimizer_bytes(shape: Shape, choices: Choices, adapted: frozenset[str]) -> int:
    return sum(n * state_bytes(x, choices) for x, n in shape.linears() if x.name in adapted)


def state_bytes(x: Linear, choices: Choices) -> int:
    """Both moments of AdamW of a layer's A and B. In 8 bits: a byte a number, an absmax in fp32 for each 256."""
    total = 0
    for numbers in (choices.r * x.inputs, choices.r * x.outputs):
        state = 2 * _FP32 * numbers
        if choices.optimizer != "adamw" and numbers >= _EIGHT_BIT_FROM:
            paged = choices.optimizer.startswith("paged") and choices.on_gpu and numbers >= _PAGED_FROM
            state = (0 if paged else 2 * numbers) + 2 * _FP32 * -(-numbers // 256)
        total += state
    return total


def scale_bytes(x: Linear, choices: Choices) -> int:
    """Of a frozen matrix the scales alone."""
    if choices.quant == "none":
        return 0
    return weight_bytes(x, choices) - (x.weights if choices.quant == "int8" else -(-x.weights // 2))
