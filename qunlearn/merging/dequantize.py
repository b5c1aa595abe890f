"""Quantise and dequantise weights, to merge into the ones that the training saw."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
from torch import Tensor
from transformers.quantizers import AutoHfQuantizer

from qunlearn.errors import ModelError
from qunlearn.model.device import torch_threads
from qunlearn.model.load import LoadSpec, bnb_config

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Rounding:
    """The data type a base was loaded in (nf4, fp4 or int8), the dtype it computed in, and where to quantise it."""

    spec: LoadSpec
    dtype: torch.dtype
    device: torch.device
    threads: int = field(default_factory=torch.get_num_threads)

    def __call__(self, weight: Tensor) -> Tensor:
        """A weight (out, in) of the checkpoint -> what the training multiplied with (out, in), on the CPU.

        As transformers loads it: cast to the compute dtype, then quantised as a whole. For int8 the activations are
        quantised too when it computes; this is what the weight alone stands for.
        """
        with torch_threads(self.threads):
            return self._through(weight)

    def _through(self, weight: Tensor) -> Tensor:
        value = weight.to(self.device, self.dtype)
        parameter: Any
        if self.spec.quant == "int8":
            parameter = bnb.nn.Int8Params(value.cpu(), requires_grad=False).to(self.device)
            return _on_cpu(int8_vectorwise_dequant(parameter.data, parameter.SCB))
        parameter = bnb.nn.Params4bit(
            value, requires_grad=False, quant_type=self.spec.quant, compress_statistics=self.spec.double_quant
        ).to(self.device)
        return _on_cpu(dequantize_4bit(parameter.data, parameter.quant_state))


def compute_dtype(quantization: str, otherwise: torch.dtype) -> torch.dtype:
    """The dtype a run computed in, from its record's words ("nf4 + double quantisation, bf16 compute")."""
    match = re.search(r"\b(bf16|fp16|fp32) compute$", quantization)
    return _DTYPES[match[1]] if match else otherwise


def quantized_modules(model: Any, spec: LoadSpec, dtype: torch.dtype) -> frozenset[str]:
    """The modules of a skeleton that transformers would quantise while loading. Changes the skeleton."""
    quantizer = AutoHfQuantizer.from_config(bnb_config(spec, dtype))
    quantizer.preprocess_model(model=model, device_map=None)
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return frozenset(name for name, module in model.named_modules() if isinstance(module, kinds))


def restored(name: str, weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
    """Return what a stored quantised weight means (out, in), on the CPU. Raises ModelError."""
    try:
        scales, form = statistics.get(f"{name.removesuffix('weight')}SCB"), statistics.get(f"{name}_format")
        if form is not None and bool(form.any()):
            raise ValueError("int8 in another layout than row by row")
        if scales is not None:
            return _on_cpu(int8_vectorwise_dequant(weight, scales))
        return _on_cpu(dequantize_4bit(weight, QuantState.from_dict(dict(statistics), torch.device("cpu"))))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        message = f"its quantised weight cannot be read: {first}"
        raise ModelError(message, where=name, hint="download it again") from error


def _on_cpu(weight: Tensor) -> Tensor:
    return weight.cpu()
