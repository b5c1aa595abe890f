"""The streaming merge: peft's own numbers bit for bit, on every architecture, from every kind of checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, call
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_architectures import CONFIGS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from qunlearn.model.load import LoadSpec, load_base
from qunlearn.model.tensorfile import header, read_tensors

WEIGHTS = "adapter_model.safetensors"


def make_base(folder: Path, config: PreTrainedConfig, sandbox: Path, dtype: torch.dtype, **save: Any) -> Path:
    """A model folder of random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, **save)
    AutoTokenizer.from_pretrained(sandbox).save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, seed: int = 1, **options: Any) -> Path:
    """An adapter whose update is as large as the weights: B is not zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    policy.peft_config["default"].base_model_name_or_path = str(base)
    policy.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(4, 44).reshape(2, 20)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits  # type: ignore[no-any-return]


def merge(adapter: Path, output: Path, *args: object) -> Ran:
    return call("merge", adapter, "-o", output, "--no-measure", "--device", "cpu", *args)


def refused(ran: Ran, output: Path, *words: str) -> None:
    assert ran.code == 6, ran.stderr
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}*")), "something was left"
    for word in words:
        assert word in ran.stderr


# -- the numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_is_pefts_own_merge_bit_for_bit(name: str, sandbox_folder: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", CONFIGS[name], sandbox_folder, torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base)
    ran = merge(adapter, tmp_path / "out")
    assert ran.code == 0, ran.stderr
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs, ours = expected.state_dict(), merged.state_dict()
    assert [k for k in theirs if not torch.equal(theirs[k], ours[k])] == []
    assert int((logits(expected) != logits(merged)).sum()) == 0
    assert float((logits(merged) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max()) > 0.01
