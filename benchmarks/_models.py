"""Models of a true shape with random weights, made directly in 4 bits: nothing is fetched, no 16-bit model exists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from qunlearn.model.device import choose_dtype
from qunlearn.model.head import Head
from qunlearn.model.kernels.attention import use_layouts
from qunlearn.model.kernels.fused import fuse
from qunlearn.model.load import Base

_STD = 0.02  # as transformers initialises these families


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder. `family` is llama or qwen2 (which has biases on query, key and value)."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    family: str = "llama"
    rope_theta: float = 10000.0

    def config(self) -> Any:
        kind = Qwen2Config if self.family == "qwen2" else LlamaConfig
        return kind(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            max_position_embeddings=4096,
            use_cache=False,
        )


# From the config.json of each model; positions and rope scaling aside, which cost nothing.
TRUE_SHAPES = (
    Shape("Llama-2-7B", 4096, 32, 32, 32, 11008, 32000, tied=False),
    Shape("Llama-3.1-8B", 4096, 32, 32, 8, 14336, 128256, tied=False, rope_theta=500000.0),
    Shape("Qwen2.5-7B", 3584, 28, 28, 4, 18944, 152064, tied=False, family="qwen2", rope_theta=1000000.0),
    Shape("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152, tied=True, rope_theta=100000.0),
    Shape("Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151936, tied=True, family="qwen2", rope_theta=1000000.0),
    Shape("Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128256, tied=True, rope_theta=500000.0),
    Shape("Llama-3.2-3B", 3072, 28, 24, 8, 8192, 128256, tied=True, rope_theta=500000.0),
)


def random_base(shape: Shape, device: torch.device, *, seed: int = 0, drawn: bool = True) -> Base:
    """A frozen base as `load_base` leaves it: NF4 with double quantisation, embeddings and head in the compute dtype.

    The same seed on the same device gives the same weights; not `drawn`, they are shapes alone, in bf16. Its tokenizer
    is a pad id and nothing else.
    """
    dtype = choose_dtype(device) if drawn else torch.bfloat16
    generator = torch.Generator(device).manual_seed(seed) if drawn else None
    config = shape.config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _fill(model, config, device, dtype, generator)
    if shape.tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(f"{shape.name}: {left[0]} was not made; does this transformers build the model otherwise?")
    model.is_loaded_in_4bit = True  # what peft asks to choose its 4-bit adapters
    use_layouts(model)
    if device.type == "cuda":
        fuse(model)
    model.requires_grad_(False)
    model.eval()
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    return Base(model, tokenizer, Head.of(model), device, Path(shape.name), "nf4 + double quantisation, random", ())


def _fill(model: Any, config: Any, device: torch.device, dtype: torch.dtype, generator: torch.Generator | None) -> None:
    """Make every tensor of a model on the meta device, one layer at a time."""

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(_STD)

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not model.lm_head:
                setattr(parent, name, _linear_4bit(child, random, device, dtype))
            elif next(child.buffers(recurse=False), None) is not None:  # rotary tables are computed, not drawn
                setattr(parent, name, type(child)(config).to(device))
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta and not isinstance(module, bnb.nn.Linear4bit):
                value = torch.ones(p.shape, device=device, dtype=dtype) if p.dim() == 1 else random(*p.shape)
                setattr(module, name, nn.Parameter(value, requires_grad=False))


def _linear_4bit(linear: nn.Linear, random: Any, device: torch.device, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = random(linear.out_features, linear.in_features)
    layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, module=layer).to(device)
    if linear.bias is not None:
        layer.bias = nn.Parameter(random(linear.out_features), requires_grad=False)
    layer.support_avx512bf16_for_cpu = False  # as load_base does: the inference layout has no gradient
    return layer
