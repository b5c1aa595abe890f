"""GGUF files of a Llama, laid out as llama.cpp's converter does, without llama.cpp: for tests that read them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_BLOCKS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama_gguf(folder: Path, made: Path, form: str, blocks: int | None = None) -> Path:
    """Write a model folder as a GGUF file, f32 or q8_0, of its first so many blocks; return the file."""
    gguf = pytest.importorskip("gguf")
    config = json.loads((folder / "config.json").read_text())
    heads, blocks = config["num_attention_heads"], blocks or config["num_hidden_layers"]
    writer = gguf.GGUFWriter(str(made), "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(blocks)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    for key, tensor in load_file(folder / "model.safetensors").items():
        name = _named(key.removesuffix(".weight"), blocks)
        if name is None:
            continue
        weight = tensor.float().numpy()
        if name.endswith(("attn_q", "attn_k")):  # the two halves of a head that are turned together lie side by side
            weight = np.swapaxes(weight.reshape(heads, 2, -1, weight.shape[1]), 1, 2).reshape(weight.shape)
        kind = gguf.GGMLQuantizationType[form.upper() if weight.ndim > 1 else "F32"]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def _named(key: str, blocks: int) -> str | None:
    if key in _NAMES:
        return _NAMES[key]
    _, _, number, rest = key.split(".", 3)
    return f"blk.{number}.{_IN_BLOCKS[rest]}" if int(number) < blocks else None
