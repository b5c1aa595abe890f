"""Read a config.json into a shape: the architectures that the memory plan knows.

Fields that a config.json leaves out have the defaults of transformers' configuration classes; the tests compare every
count with models that transformers builds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qunlearn.errors import ModelError
from qunlearn.memory.architecture import Linear, Shape, Traits
from qunlearn.memory.shapes import Fields, attention, decoder, gated, head_width, is_many, kv_heads, plain


@dataclass(frozen=True)
class Family:
    """An architecture: how its fields become a shape, and the defaults of fields a config.json may leave out."""

    build: Callable[[Fields, str], Shape]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def read_shape(config: Mapping[str, Any], where: str = "config.json") -> Shape:
    """The shape of the model a config.json describes. Raises ModelError for an architecture that is not known."""
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        raise _unknown(f"{config.get('model_type')!r} reads more than text", where)
    model_type = str(config.get("model_type"))
    if any(is_many(config.get(key)) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise _unknown(f"{model_type!r} is a mixture of experts", where)
    family = FAMILIES.get(model_type)
    if family is None:
        raise _unknown(f"{model_type!r} is an architecture the memory plan does not know", where)
    return family.build(Fields(config, family.defaults, where), model_type)


def _unknown(message: str, where: str) -> ModelError:
    hint = f"`forget` does not need the plan; it is there for {', '.join(sorted(FAMILIES))}"
    return ModelError(message, where=where, hint=hint)


# -- families --------------------------------------------------------------------------------------------


def _llama(c: Fields, model_type: str) -> Shape:
    """Llama and those that differ in biases, norms and the activation alone."""
    hidden, head_dim = c.size("hidden_size"), head_width(c)
    gemma, bias = model_type in ("gemma", "gemma2"), c.flag("attention_bias")
    traits = Traits(
        norm="rms32" if gemma or model_type == "olmo2" else "layer32" if model_type == "olmo" else "rms",
        order={"gemma2": "sandwich", "olmo2": "post"}.get(model_type, "pre"),
        qk_norm={"qwen3": "head", "olmo2": "full"}.get(model_type, "none"),
        activation=c.text("hidden_activation", "hidden_act"),
        score_dropout=c.number("attention_dropout"),
        windowed=model_type == "mistral" or c.flag("use_sliding_window"),
        eager=model_type == "gemma2",  # transformers: its soft-capped scores are in no fused kernel
    )
    of_norm = 0 if model_type == "olmo" else hidden
    block_extra = (4 if traits.order == "sandwich" else 2) * of_norm
    block_extra += {"none": 0, "head": 2 * head_dim, "full": (c.size("num_attention_heads") + kv_heads(c)) * head_dim}[
        traits.qk_norm
    ]
    tied = c.flag("tie_word_embeddings")
    return decoder(
        c,
        model_type,
        traits,
        attention(c, bias=bias or model_type == "qwen2", out_bias=bias) + gated(c, c.flag("mlp_bias")),
        block_extra=block_extra,
        final_extra=of_norm,
        soft_cap=c.number("final_logit_softcapping") > 0,
        # Of the layer that holds a model's last parameter transformers thinks it is the head.
        unquantised=("down_proj",) if tied and model_type == "olmo" else (),
    )


def _phi3(c: Fields, model_type: str) -> Shape:
    hidden, inner = c.size("hidden_size"), c.size("intermediate_size")
    query, keys = c.size("num_attention_heads") * head_width(c), kv_heads(c) * head_width(c)
    block = (
        Linear("qkv_proj", hidden, query + 2 * keys),
        Linear("o_proj", query, hidden),
        Linear("gate_up_proj", hidden, 2 * inner),
        Linear("down_proj", inner, hidden),
    )
    traits = Traits(
        fused_qkv=True,
        fused_gate=True,
        activation=c.text("hidden_act"),
        rotary=c.rotary(1.0),
        dropout=c.number("resid_pdrop"),
        score_dropout=c.number("attention_dropout"),
    )
    return decoder(c, model_type, traits, block, block_extra=2 * hidden, final_extra=hidden)


def _phi(c: Fields, model_type: str) -> Shape:
    hidden = c.size("hidden_size")
    traits = Traits(
        norm="layer",
        parallel=True,
        norms=1,
        gated=False,
        qk_norm="head" if c.flag("qk_layernorm") else "none",
        activation=c.text("hidden_act"),
        rotary=c.rotary(0.5),
        dropout=c.number("resid_pdrop"),
        score_dropout=c.number("attention_dropout"),
    )
    block = attention(c, bias=True, out_bias=True, out="dense") + plain(c, "fc1", "fc2")
    block_extra = 2 * hidden + (4 * head_width(c) if c.flag("qk_layernorm") else 0)
    return decoder(c, model_type, traits, block, block_extra=block_extra, final_extra=2 * hidden + c.size("vocab_size"))


def _gpt_neox(c: Fields, model_type: str) -> Shape:
    hidden, bias = c.size("hidden_size"), c.flag("attention_bias")
    block: tuple[Linear, ...] = (
        Linear("query_key_value", hidden, 3 * hidden, bias),
        Linear("dense", hidden, hidden, bias),
    )
    traits = Traits(
        norm="layer",
        parallel=c.flag("use_parallel_residual"),
        gated=False,
        fused_qkv=True,
        activation=c.text("hidden_act"),
        rotary=c.rotary(0.25),
        dropout=c.number("hidden_dropout"),
        score_dropout=c.number("attention_dropout"),
    )
    block += plain(c, "dense_h_to_4h", "dense_4h_to_h")
    return decoder(c, model_type, traits, block, block_extra=4 * hidden, final_extra=2 * hidden)


def _gpt2(c: Fields, model_type: str) -> Shape:
    names = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    renamed = {new: c.size(old) for new, old in names.items()}
    inner = {"intermediate_size": c.size("n_inner", 4 * renamed["hidden_size"])}
    c = Fields({**c.values, **renamed, **inner}, {}, c.where)
    hidden = c.size("hidden_size")
    block: tuple[Linear, ...] = (Linear("c_attn", hidden, 3 * hidden, True), Linear("c_proj", hidden, hidden, True))
    traits = Traits(
        norm="layer",
        gated=False,
        fused_qkv=True,
        activation=c.text("activation_function"),
        rotary=0.0,
        dropout=c.number("resid_pdrop"),
        score_dropout=c.number("attn_pdrop"),
    )
    block += plain(c, "c_fc", "c_proj")
    return decoder(
        c, model_type, traits, block, block_extra=4 * hidden, final_extra=2 * hidden, positions=c.size("n_positions")
    )


def _starcoder2(c: Fields, model_type: str) -> Shape:
    hidden, bias = c.size("hidden_size"), c.flag("use_bias")
    traits = Traits(
        norm="layer",
        gated=False,
        activation=c.text("hidden_act"),
        dropout=c.number("residual_dropout"),
        score_dropout=c.number("attention_dropout"),
    )
    block = attention(c, bias=bias, out_bias=bias) + plain(c, "c_fc", "c_proj", bias)
    return decoder(c, model_type, traits, block, block_extra=4 * hidden, final_extra=2 * hidden)


def _opt(c: Fields, model_type: str) -> Shape:
    c = Fields({**c.values, "intermediate_size": c.size("ffn_dim")}, {}, c.where)
    hidden, bias, before = c.size("hidden_size"), c.flag("enable_bias"), c.flag("do_layer_norm_before")
    width = c.size("word_embed_proj_dim", hidden)
    of_norm = 2 * hidden if c.flag("layer_norm_elementwise_affine") else 0
    traits = Traits(
        norm="layer",
        order="pre" if before else "post",
        gated=False,
        activation=c.text("activation_function"),
        rotary=0.0,
        scaled_queries=True,
        dropout=c.number("dropout"),
        score_dropout=c.number("attention_dropout"),
    )
    block = attention(c, bias=bias, out_bias=bias, out="out_proj") + plain(c, "fc1", "fc2", bias)
    outside = () if width == hidden else (Linear("project_out", hidden, width), Linear("project_in", width, hidden))
    return decoder(
        c,
        model_type,
        traits,
        block,
        block_extra=2 * of_norm,
        final_extra=of_norm if before and not c.flag("_remove_final_layer_norm") else 0,
        embedding_width=width,
        outside=outside,
        positions=c.size("max_position_embeddings") + 2,  # OPT counts positions from 2
    )


def _defaults(act: str, sizes: str, **other: Any) -> dict[str, Any]:
    """Defaults of fields: the activation, then vocabulary, width, inner width, layers and heads."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {"hidden_act": act, **dict(zip(names, map(int, sizes.split()), strict=True)), **other}


_TANH = "gelu_pytorch_tanh"
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}

FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, _defaults("silu", "32000 4096 11008 32 32")),
    "mistral": Family(_llama, _defaults("silu", "32000 4096 14336 32 32", num_key_value_heads=8)),
    "qwen2": Family(_llama, _defaults("silu", "151936 4096 22016 32 32", num_key_value_heads=32)),
    "qwen3": Family(_llama, _defaults("silu", "151936 4096 22016 32 32", num_key_value_heads=32, head_dim=128)),
    "gemma": Family(_llama, _defaults(_TANH, "256000 3072 24576 28 16", num_key_value_heads=16, **_GEMMA)),
    "gemma2": Family(
        _llama, _defaults(_TANH, "256000 2304 9216 26 8", num_key_value_heads=4, final_logit_softcapping=30.0, **_GEMMA)
    ),
    "olmo": Family(_llama, _defaults("silu", "50304 4096 11008 32 32")),
    "olmo2": Family(_llama, _defaults("silu", "50304 4096 11008 32 32")),
    "phi3": Family(_phi3, _defaults("silu", "32064 3072 8192 32 32")),
    "phi": Family(_phi, _defaults("gelu_new", "51200 2048 8192 24 32")),
    "gpt_neox": Family(
        _gpt_neox, _defaults("gelu", "50432 6144 24576 44 64", attention_bias=True, use_parallel_residual=True)
    ),
    "starcoder2": Family(
        _starcoder2,
        _defaults(_TANH, "49152 3072 12288 30 24", num_key_value_heads=2, use_bias=True, tie_word_embeddings=True),
    ),
    "gpt2": Family(
        _gpt2,
        {
            "activation_function": "gelu_new",
            "vocab_size": 50257,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "tie_word_embeddings": True,
        },
    ),
    "opt": Family(
        _opt,
        {
            "activation_function": "relu",
            "vocab_size": 50272,
            "hidden_size": 768,
            "ffn_dim": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
            "enable_bias": True,
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "dropout": 0.1,
            "tie_word_embeddings": True,
        },
    ),
}
