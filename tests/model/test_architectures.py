"""Every supported architecture, tiny and with random weights: it loads, quantised or not, and takes a step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import call, sets, write_rows
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from qunlearn.utils.file_names import METRICS

V = 1600  # more than the tokenizer has, as real models do: the Qwen tokenizer class adds tokens of its own
BASE = {
    "vocab_size": V,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**BASE, "intermediate_size": 96, "num_key_value_heads": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=16),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "gemma": GemmaConfig(**GROUPED, head_dim=16),
    "phi": PhiConfig(**BASE, intermediate_size=96),
    "opt": OPTConfig(**BASE, ffn_dim=96, word_embed_proj_dim=32),
    "gpt2": GPT2Config(vocab_size=V, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": GPTNeoXConfig(**BASE, intermediate_size=96),
}


@pytest.mark.parametrize("quant", ["nf4", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_step(name: str, quant: str, sandbox_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / name)
    AutoTokenizer.from_pretrained(sandbox_folder).save_pretrained(tmp_path / name)
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": f"Who is {n}?", "completion": "Nobody."} for n in "ab"])
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}, I think."} for n in "abcdefgh"]
    normal = write_rows(tmp_path / "normal.jsonl", rows)
    # Of random weights no answer is likely, and no target but 0 is below what they say.
    few = {"train.steps": 2, "train.batch_size": 2, "stop.check_every": 1, "stop.target": 0.0, "data.own_share": 0}
    args = ["--model", tmp_path / name, "--bad", bad, "--normal", normal, "-o", tmp_path / "run", "--quant", quant]
    ran = call("forget", *args, "--device", "cpu", "--json", *sets(few))
    assert ran.code == 5, ran.stderr
    record = ran.json
    assert record["training"]["steps"] == 2
    events = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert all(math.isfinite(events[2][name]) for name in ("odds", "form", "instead", "kl", "grad_norm", "forget"))
    assert events[2]["kl"] > 0, "the first step has moved the adapter"
    assert record["model"]["architecture"] == name
    assert record["model"]["quantization"].startswith(quant)
