"""What is in memory throughout a run: the frozen model, the adapters, the optimizer's state."""

from __future__ import annotations

from dataclasses import dataclass

from qunlearn.errors import ModelError
from qunlearn.model.architecture import Linear, Shape

# torch keeps one workspace for cuBLAS (CUBLAS_WORKSPACE_CONFIG's default, 4096:2:16:8); Hopper's is 32 MiB.
CUBLAS_BYTES = 8_519_680

_FP32 = 4
_PAGED_FROM = 100_000  # numbers; bitsandbytes pages no smaller state
_EIGHT_BIT_FROM = 4096  # numbers; nor does it keep smaller state in 8 bits


@dataclass(frozen=True)
class Choices:
    """Every decision that memory depends on. `optimizer`: adamw, adamw8bit or paged_adamw8bit; `embeddings`: device or
    cpu; `compute_bytes`: of a number in the dtype that computes; `packed`: rows hold several examples, under a mask."""

    quant: str
    double_quant: bool
    compute_bytes: int
    on_card: bool
    r: int
    target_modules: str
    optimizer: str
    embeddings: str
    offload: bool
    checkpointing: bool
    packed: bool


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
    c = choices.compute_bytes
    frozen = sum(n * weight_bytes(x, choices) for x, n in shape.linears())
    for name in shape.unquantised:
        x = next(x for x in shape.block if x.name == name)
        frozen += x.weights * c - weight_bytes(x, choices)
    biases = sum(n * x.outputs for x, n in shape.linears() if x.bias)
    plain = c * (biases + shape.head_parameters + shape.extra)
    if choices.embeddings == "device" or shape.tied:
        plain += c * shape.embedding_parameters
    else:
        plain += c * shape.positions * shape.hidden
    return {
        "weights": frozen,
        "embeddings": plain,
        "adapters": _FP32 * adapter_parameters(shape, choices.r, adapted),
        "optimizer state": _optimizer_bytes(shape, choices, adapted),
        "workspace": CUBLAS_BYTES if choices.on_card else 0,
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
    """Both moments of AdamW. In 8 bits: a byte a number and an absmax in fp32 for each 256 of them."""
    total = 0
    for x, n in shape.linears():
        if x.name not in adapted:
            continue
        for numbers in (choices.r * x.inputs, choices.r * x.outputs):
            state = 2 * _FP32 * numbers
            if choices.optimizer != "adamw" and numbers >= _EIGHT_BIT_FROM:
                paged = choices.optimizer.startswith("paged") and choices.on_card and numbers >= _PAGED_FROM
                state = (0 if paged else 2 * numbers) + 2 * _FP32 * -(-numbers // 256)
            total += n * state
    return total
