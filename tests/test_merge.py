"""`merge` and `export`: what is written loads with plain transformers and peft, and says what the adapter says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qunlearn.errors import ModelError
from qunlearn.evaluate.metrics import SetScore
from qunlearn.merge import _is_back, _merged
from qunlearn.model.load import LoadSpec, dequantized, load_base
from qunlearn.run import ADAPTER


def logits(model: object) -> torch.Tensor:
    ids = torch.arange(4, 44).reshape(2, 20)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()  # type: ignore[no-any-return, operator]


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_merged_is_base_plus_adapter(quick_run: Path, sandbox_folder: Path, tmp_path: Path, base: str) -> None:
    ran = call("merge", quick_run, "-o", tmp_path / "m", "--base", base, "--json")
    report = ran.json
    # Into the original weights some of it may come back, for the adapter was trained on quantised ones.
    assert ran.code == (5 if report["status"] == "came back" else 0), ran.stderr
    assert base == "original" or ran.code == 0
    assert report["tensors"] == len(load_file(quick_run / ADAPTER / "adapter_model.safetensors")) == 2 * 4 * 7
    assert report["divergence"] < 0.1
    assert set(report["scores"]) == {"base", "adapter", "merged"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template
    spec = LoadSpec("none", device="cpu")
    plain = load_base(sandbox_folder, spec)
    if base == "dequantized":
        plain = dequantized(load_base(sandbox_folder, LoadSpec("nf4", device="cpu")))
    expected = logits(PeftModel.from_pretrained(plain.model, str(quick_run / ADAPTER)))
    difference = (logits(merged).log_softmax(-1) - expected.log_softmax(-1)).abs()
    assert difference.mean() < 0.05  # bf16 rounding of the sum
    assert sorted(p.suffix for p in (tmp_path / "m").iterdir() if p.suffix in (".bin", ".pt", ".pkl")) == []


def test_the_update_is_the_scaled_product(quick_run: Path, sandbox_folder: Path, tmp_path: Path) -> None:
    """W + (alpha / r) B A, in float64 from the files alone."""
    assert call("merge", quick_run, "-o", tmp_path / "m").code in (0, 5)
    adapter = load_file(quick_run / ADAPTER / "adapter_model.safetensors")
    config = json.loads((quick_run / ADAPTER / "adapter_config.json").read_text())
    base, merged = (load_file(f / "model.safetensors") for f in (sandbox_folder, tmp_path / "m"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    expected = set()
    for name in adapter:
        if ".lora_A." not in name:
            continue
        weight = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        a, b = adapter[name].double(), adapter[name.replace(".lora_A.", ".lora_B.")].double()
        update = config["lora_alpha"] / config["r"] * b @ a
        torch.testing.assert_close(merged[weight].double(), base[weight].double() + update, rtol=2**-7, atol=2**-9)
        expected.add(weight)
    assert changed <= expected
    assert len(changed) > 0.9 * len(expected)


def test_shards(quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qunlearn.merge._SHARD", "1MB")
    ran = call("merge", quick_run, "-o", tmp_path / "m", "--base", "dequantized", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["shards"] > 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_a_foreign_tensor_is_not_passed_over(quick_run: Path, sandbox_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(quick_run / ADAPTER, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(16, 160)
    save_file(tensors, path)
    with pytest.raises(ModelError, match="not those of this model"):
        _merged(load_base(sandbox_folder, LoadSpec("none", device="cpu")), tmp_path / "a")


def test_coming_back() -> None:
    def score(probability: float, exact: float) -> SetScore:
        return SetScore(40, probability, exact, 2.0)

    assert not _is_back(score(0.01, 0), score(0.02, 0), 0.05)
    assert not _is_back(score(0.2, 0), score(0.3, 0), 0.05)
    assert _is_back(score(0.01, 0), score(0.1, 0), 0.05)
    assert _is_back(score(0.01, 0), score(0.01, 0.1), 0.05)


def test_what_came_back_has_its_exit_code(quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qunlearn.merge._is_back", lambda *_: True)
    ran = call("merge", quick_run, "-o", tmp_path / "m", "--json")
    assert ran.code == 5
    assert "came back" in ran.stderr
    assert (tmp_path / "m" / "config.json").is_file()


def test_merge_without_the_bad_file_says_so(quick_run: Path, tmp_path: Path) -> None:
    shutil.copytree(quick_run / ADAPTER, tmp_path / "a")
    ran = call("merge", tmp_path / "a", "-o", tmp_path / "m", "--json")
    assert ran.code == 0, ran.stderr
    assert "nothing is measured" in ran.stderr
    assert ran.json["divergence"] is None


def test_an_output_is_not_overwritten_unasked(quick_run: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("mine")
    ran = call("merge", quick_run, "-o", tmp_path / "m")
    assert ran.code == 9
    assert (tmp_path / "m" / "mine").read_text() == "mine"


def test_export_is_the_adapter_alone(quick_run: Path, sandbox_folder: Path, tmp_path: Path) -> None:
    ran = call("export", quick_run, "-o", tmp_path / "e", "--json")
    assert ran.code == 0, ran.stderr
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert ran.json["files"] == names == sorted(p.name for p in (tmp_path / "e").iterdir())
    for name in names:
        assert (tmp_path / "e" / name).read_bytes() == (quick_run / ADAPTER / name).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(sandbox_folder)
    PeftModel.from_pretrained(base, str(tmp_path / "e"))
    card = (tmp_path / "e" / "README.md").read_text()
    assert card.startswith("---\nbase_model:")
    assert "exact match" in card
