"""The configurations of the models with short names: the memory plan needs no download for them.

Only the fields that decide about sizes, as the repositories' config.json have them (and litgpt's config.py, which
repeats most of them with their addresses). The tests hold the parameters they add up to against names.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qunlearn.hub.short_names import KnownModel

Config = Mapping[str, Any]


def carried_config(known: KnownModel) -> Config | None:
    """Return what config.json says of a model with a short name; None for the sandbox, which comes with its own."""
    return _CONFIGS.get(known.name)


def _of(model_type: str, sizes: str, **other: Any) -> Config:
    """A config from its vocabulary, width, inner width, layers, query heads and key-value heads."""
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names.append("num_key_value_heads")
    return {"model_type": model_type, **dict(zip(names, map(int, sizes.split()), strict=True)), **other}


_LLAMA_7B = _of("llama", "32000 4096 11008 32 32 32")
_LLAMA_31_8B = _of("llama", "128256 4096 14336 32 32 8")
_LLAMA_32_1B = _of("llama", "128256 2048 8192 16 32 8", tie_word_embeddings=True, head_dim=64)
_LLAMA_32_3B = _of("llama", "128256 3072 8192 28 24 8", tie_word_embeddings=True, head_dim=128)
_MISTRAL_7B = _of("mistral", "32768 4096 14336 32 32 8", sliding_window=None)
_QWEN_25_7B = _of("qwen2", "152064 3584 18944 28 28 4")
_PHI_2 = _of("phi", "51200 2560 10240 32 32 32", partial_rotary_factor=0.4, resid_pdrop=0.1, hidden_act="gelu_new")


def _pythia(vocabulary: int, hidden: int, layers: int, heads: int) -> Config:
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    }


def _opt(hidden: int, layers: int) -> Config:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": hidden,
        "activation_function": "relu",
        "dropout": 0.1,
    }


def _gemma2(sizes: str) -> Config:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return _of("gemma2", sizes, head_dim=256, hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True, **caps)


_CONFIGS: dict[str, Config] = {
    "llama-7b": _LLAMA_7B,
    "llama-13b": _of("llama", "32000 5120 13824 40 40 40"),
    "llama-70b": _of("llama", "32000 8192 28672 80 64 8"),
    "llama-2-7b": _LLAMA_7B,
    "llama-2-7b-chat": _LLAMA_7B,
    "llama-3.1-8b": _LLAMA_31_8B,
    "llama-3.1-8b-instruct": _LLAMA_31_8B,
    "llama-3.2-1b": _LLAMA_32_1B,
    "llama-3.2-1b-instruct": _LLAMA_32_1B,
    "llama-3.2-3b": _LLAMA_32_3B,
    "llama-3.2-3b-instruct": _LLAMA_32_3B,
    "mistral-7b": _MISTRAL_7B,
    "mistral-7b-instruct": _MISTRAL_7B,
    "qwen2.5-0.5b": _of("qwen2", "151936 896 4864 24 14 2", tie_word_embeddings=True),
    "qwen2.5-1.5b": _of("qwen2", "151936 1536 8960 28 12 2", tie_word_embeddings=True),
    "qwen2.5-3b": _of("qwen2", "151936 2048 11008 36 16 2", tie_word_embeddings=True),
    "qwen2.5-7b": _QWEN_25_7B,
    "qwen2.5-7b-instruct": _QWEN_25_7B,
    "qwen2.5-coder-7b": _QWEN_25_7B,
    "qwen3-0.6b": _of("qwen3", "151936 1024 3072 28 16 8", head_dim=128, tie_word_embeddings=True),
    "qwen3-1.7b": _of("qwen3", "151936 2048 6144 28 16 8", head_dim=128, tie_word_embeddings=True),
    "qwen3-4b": _of("qwen3", "151936 2560 9728 36 32 8", head_dim=128, tie_word_embeddings=True),
    "qwen3-8b": _of("qwen3", "151936 4096 12288 36 32 8", head_dim=128),
    "gemma-2b": _of("gemma", "256000 2048 16384 18 8 1", head_dim=256, tie_word_embeddings=True),
    "gemma-2-2b": _gemma2("256000 2304 9216 26 8 4"),
    "gemma-2-9b": _gemma2("256000 3584 14336 42 16 8"),
    "phi-2": _PHI_2,
    "phi-3-mini": _of("phi3", "32064 3072 8192 32 32 32"),
    "opt-1.3b": _opt(2048, 24),
    "opt-2.7b": _opt(2560, 32),
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
    },
    "pythia-1.4b": _pythia(50304, 2048, 24, 16),
    "pythia-2.8b": _pythia(50304, 2560, 32, 32),
    "pythia-6.9b": _pythia(50432, 4096, 32, 32),
    "codellama-7b": _of("llama", "32016 4096 11008 32 32 32"),
    "deepseek-coder-6.7b": _of("llama", "32256 4096 11008 32 32 32"),
    "starcoder2-3b": _of("starcoder2", "49152 3072 12288 30 24 2", use_bias=True, tie_word_embeddings=True),
    "olmo-7b": _of("olmo", "50304 4096 11008 32 32 32"),
    "tinyllama-1.1b": _of("llama", "32000 2048 5632 22 32 4"),
    "smollm2-1.7b": _of("llama", "49152 2048 8192 24 32 32", tie_word_embeddings=True),
}
