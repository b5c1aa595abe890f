"""The streaming merge: peft's own numbers bit for bit, on every architecture, from every kind of checkpoint."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from conftest import Ran, call
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_architectures import CONFIGS, GROUPED
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, PreTrainedConfig, conversion_mapping
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

from qunlearn.hub.safetensors_file import header, read_tensors
from qunlearn.merging import read_ahead as ahead
from qunlearn.merging import shard_file as output
from qunlearn.merging.shard_file import ShardFile
from qunlearn.model.load import LoadSpec, load_base

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_fc", "c_proj"], "opt": ["fc1", "v_proj"]}
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


def as_run(folder: Path, adapter: Path, quant: str, double_quant: bool = True) -> Path:
    """A run folder around an adapter, for what it says about quantisation."""
    folder.mkdir()
    shutil.copytree(adapter, folder / "adapter")
    (folder / "config.yaml").write_text(f"model:\n  quant: {quant}\n  double_quant: {str(double_quant).lower()}\n")
    return folder


def silenced(adapter: Path) -> Path:
    """The same adapter with B = 0: what is merged then is the base itself."""
    tensors = load_file(adapter / WEIGHTS)
    save_file({n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}, adapter / WEIGHTS)
    return adapter


def seen_by_training(base: Path, spec: LoadSpec) -> dict[str, torch.Tensor]:
    """The weights of the quantised layers as their own kernels multiply with them, by parameter name, (out, in)."""
    seen = {}
    for name, module in load_base(base, spec).model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            seen[f"{name}.weight"] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
            seen[f"{name}.weight"] = module.weight.data.float() * scales[:, None] / 127
    return seen


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(("quant", "double"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True)])
def test_dequantized_is_what_training_saw(
    name: str, quant: str, double: bool, sandbox_folder: Path, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", CONFIGS[name], sandbox_folder, torch.float32)
    adapter = silenced(make_adapter(tmp_path / "adapter", base, target_modules=TARGETS[name]))
    ran = merge(as_run(tmp_path / "run", adapter, quant, double), tmp_path / "out", "--base", "dequantized")
    assert ran.code == 0, ran.stderr
    seen = seen_by_training(base, LoadSpec(quant, double, "cpu"))
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    assert seen and set(seen) < set(after) == set(before)
    for key, tensor in after.items():
        if key in seen:
            expected = seen[key].T if name == "gpt2" else seen[key]
            exact = torch.equal(tensor, expected.to(tensor.dtype))
            assert exact or (quant == "int8" and torch.allclose(tensor, expected, rtol=2**-22, atol=0)), key
            assert not torch.equal(tensor, before[key])
        else:
            assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_quantised_checkpoint_is_read_as_it_was_written(name: str, sandbox_folder: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", CONFIGS[name], sandbox_folder, torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base)
    for quant in ("nf4", "int8"):
        four = tmp_path / quant
        loaded = load_base(base, LoadSpec(quant, device="cpu"))
        loaded.model.save_pretrained(four)
        loaded.tokenizer.save_pretrained(four)
        seen = seen_by_training(four, LoadSpec(device="cpu"))
        args = (adapter, tmp_path / f"out-{quant}", "--base", "dequantized", "--model", four)
        ran = merge(*args)
        assert ran.code == 0, ran.stderr
        merged, info = AutoModelForCausalLM.from_pretrained(args[1], output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert "quantization_config" not in json.loads((args[1] / "config.json").read_text())
        state, factors = merged.state_dict(), load_file(adapter / WEIGHTS)
        assert len(seen) > 4
        for key, weight in seen.items():
            stem = f"base_model.model.{key.removesuffix('.weight')}.lora_"
            update = 1.5 * factors[f"{stem}B.weight"].double() @ factors[f"{stem}A.weight"].double()
            expected = weight.double() + update
            got = state[key].T if name == "gpt2" else state[key]
            ulp = 2**-8 if got.dtype is torch.bfloat16 else 2**-22
            torch.testing.assert_close(got.double(), expected, rtol=ulp, atol=1e-6)
        ran = merge(adapter, tmp_path / "no", "--model", four)
        refused(ran, tmp_path / "no", "is a quantised checkpoint", "--base dequantized")


@pytest.fixture(scope="module")
def llama(sandbox_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small fp32 base in several shards, and an adapter."""
    folder = tmp_path_factory.mktemp("llama")
    base = make_base(folder / "base", CONFIGS["llama"], sandbox_folder, torch.float32, max_shard_size="300KB")
    return base, make_adapter(folder / "adapter", base)


def peft_merge(base: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.state_dict()  # type: ignore[no-any-return]


def merged(output: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict()  # type: ignore[no-any-return]


def differing(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> list[str]:
    assert theirs.keys() == ours.keys()
    return [name for name in theirs if not torch.equal(theirs[name], ours[name])]


PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 6},
    "alpha_pattern": {"layers.0.self_attn.v_proj": 11, "down_proj": 3},
}


def test_rslora_and_patterns_as_peft_has_them(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = llama
    adapter = make_adapter(tmp_path / "adapter", base, **PATTERNS)
    assert merge(adapter, tmp_path / "out").code == 0
    assert differing(peft_merge(base, adapter), merged(tmp_path / "out")) == []


def test_several_adapters_in_order(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, first = llama
    second = make_adapter(tmp_path / "second", base, seed=2, r=3, target_modules=["q_proj", "up_proj"])
    ran = call("merge", first, second, "-o", tmp_path / "out", "--no-measure", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["tensors"] == 2 * (2 * 7 + 2 * 2)
    assert differing(peft_merge(base, first, second), merged(tmp_path / "out")) == []
    again = call("merge", first, first, "-o", tmp_path / "no", "--no-measure")
    assert again.code == 2 and "twice" in again.stderr


def test_many_blocks_and_many_shards(llama: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    base, adapter = llama
    monkeypatch.setattr("qunlearn.merging.compute._NUMBERS", 1)  # 64 rows at a time: 96 take two blocks
    monkeypatch.setattr("qunlearn.merging.compute._RAW_BYTES", 1000)
    monkeypatch.setattr("qunlearn.merging.plan.SHARD_BYTES", 100_000)
    ran = merge(adapter, tmp_path / "out", "--json")
    assert ran.json["shards"] > 4
    assert differing(peft_merge(base, adapter), merged(tmp_path / "out")) == []


def renamed(base: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    shutil.copytree(base, folder)
    for path in folder.glob("*.safetensors"):
        save_file({rename(n): t for n, t in load_file(path).items()}, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {rename(n): shard for n, shard in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    return folder


def test_a_checkpoint_without_the_models_prefix(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    bare = renamed(base, tmp_path / "bare", lambda name: name.removeprefix("model."))
    assert merge(adapter, tmp_path / "out", "--model", bare).code == 0
    assert "layers.0.self_attn.q_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert differing(peft_merge(base, adapter), merged(tmp_path / "out")) == []


def test_a_tensor_that_has_another_name_in_the_checkpoint(sandbox_folder: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", CONFIGS["gpt_neox"], sandbox_folder, torch.float32)
    assert "embed_out.weight" in load_file(base / "model.safetensors")  # the module is lm_head
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["lm_head", "dense"])
    assert merge(adapter, tmp_path / "out").code == 0
    assert differing(peft_merge(base, adapter), merged(tmp_path / "out")) == []


def test_experts_stay_as_they_are_stored(sandbox_folder: Path, tmp_path: Path) -> None:
    config = MixtralConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=2)
    base = make_base(tmp_path / "base", config, sandbox_folder, torch.float32)
    names = set(load_file(base / "model.safetensors"))
    assert any("experts.0.w1" in name for name in names)  # one by one; the module has them in one parameter
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "o_proj"])
    assert merge(adapter, tmp_path / "out").code == 0
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == names
    assert differing(peft_merge(base, adapter), merged(tmp_path / "out")) == []


def test_an_update_of_experts_is_refused_by_name(sandbox_folder: Path, tmp_path: Path) -> None:
    config = MixtralConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=2)
    base = make_base(tmp_path / "base", config, sandbox_folder, torch.float32)
    adapter = make_adapter(
        tmp_path / "adapter", base, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    refused(merge(adapter, tmp_path / "out"), tmp_path / "out", "target_parameters")


def test_a_weight_that_is_stored_fused_is_refused_by_name(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """In the checkpoint gate and up are halves of one tensor: the update of neither has a tensor of its own."""
    base, adapter = llama
    fused = tmp_path / "fused"
    shutil.copytree(base, fused, ignore=shutil.ignore_patterns("model*"))
    tensors = {n: t for path in base.glob("*.safetensors") for n, t in load_file(path).items()}
    for i in range(2):
        halves = [tensors.pop(f"model.layers.{i}.mlp.{half}_proj.weight") for half in ("gate", "up")]
        tensors[f"model.layers.{i}.mlp.both.weight"] = torch.cat(halves)
    save_file(tensors, fused / "model.safetensors", {"format": "pt"})
    only = make_adapter(tmp_path / "only", base, target_modules=["q_proj", "down_proj"])
    rule = WeightConverter("mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])
    register_checkpoint_conversion_mapping("llama", [rule])
    try:
        ran = merge(adapter, tmp_path / "out", "--model", fused)
        refused(ran, tmp_path / "out", "mlp.gate_proj.weight", "makes it from other tensors")
        assert merge(only, tmp_path / "out", "--model", fused).code == 0
        assert "model.layers.0.mlp.both.weight" in load_file(tmp_path / "out" / "model.safetensors")
        assert differing(peft_merge(base, only), merged(tmp_path / "out")) == []
    finally:
        conversion_mapping._checkpoint_conversion_mapping_cache.pop("llama")


def test_a_hub_snapshot_of_links(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    cache = tmp_path / "models--some--base"
    snapshot = cache / "snapshots" / "0a1b"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        shutil.copyfile(path, cache / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert merge(adapter, tmp_path / "out", "--model", snapshot).code == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert differing(peft_merge(base, adapter), merged(tmp_path / "out")) == []


def test_what_is_not_merged_is_the_same_bytes(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    assert merge(adapter, tmp_path / "out").code == 0
    for path in base.iterdir():
        if not path.name.startswith("model") and path.name != "config.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert json.loads((base / "config.json").read_text()) == json.loads((tmp_path / "out" / "config.json").read_text())
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o600}
    record = json.loads((tmp_path / "out" / "qunlearn.json").read_text())
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert record["files"]["model.safetensors"] == {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_our_headers_are_the_librarys(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "é": torch.zeros(0, 4), "a": torch.ones(3).half()}
    names = {torch.float32: "F32", torch.float16: "F16"}
    order = [(n, names[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items()]
    path = tmp_path / "own.safetensors"
    path.write_bytes(header(order) + b"".join(t.numpy().tobytes() for t in tensors.values()))
    loaded = load_file(path)
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype is t.dtype for n, t in tensors.items())
    assert [(t.name, t.dtype, t.shape, t.bytes) for t in read_tensors(path)] == order
    assert (int.from_bytes(path.read_bytes()[:8], "little") + 8) % 8 == 0


# -- what is refused, with nothing written -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"trainable_token_indices": [1]}, "trained tokens"),
        ({"layer_replication": [[0, 2]]}, "replicated"),
        ({"something_new": {"x": 1}}, "something_new"),
        ({"r": 5}, "has rank 4, adapter_config.json says 5"),
        ({"alpha_pattern": {"(q+)+": 2}}, "not understood"),
        ({"rank_pattern": {"q_proj": "4"}}, "not a number"),
        ({"lora_alpha": float("nan")}, "not a number"),
    ],
)
def test_an_adapter_of_another_kind(
    llama: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    shutil.copytree(llama[1], tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(merge(tmp_path / "a", tmp_path / "out"), tmp_path / "out", words)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({Q.replace("layers.0", "layers.7") + f"{x}.weight": torch.zeros(4, 4) for x in "AB"}, "layers.7"),
        ({f"{Q}A.weight": None}, "no lora_A"),
        ({f"{Q}magnitude_vector": torch.zeros(64)}, "magnitude_vector"),
        ({"base_model.model.lm_head.weight": torch.zeros(3, 3)}, "lm_head.weight"),
        ({f"{Q}B.weight": torch.zeros(32, 4)}, "an update of [32, 64]"),
        ({f"{Q}B.weight": torch.zeros(64, 5)}, "do not fit together"),
        ({f"{Q}B.weight": torch.zeros(64, 4, dtype=torch.int32)}, "I32"),
        ({f"{Q}B.weight": torch.full((64, 4), torch.inf)}, "not finite"),
        (
            {Q.replace("self_attn.q_proj", "input_layernorm") + f"{x}.weight": torch.zeros(4, 4) for x in "AB"},
            "not a linear layer",
        ),
    ],
)
def test_a_tensor_that_has_no_place(
    llama: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    shutil.copytree(llama[1], tmp_path / "a")
    tensors = {**load_file(tmp_path / "a" / WEIGHTS), **change}
    save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / "a" / WEIGHTS)
    refused(merge(tmp_path / "a", tmp_path / "out"), tmp_path / "out", words)


def test_the_head_of_tied_embeddings(sandbox_folder: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", CONFIGS["gemma"], sandbox_folder, torch.float32)
    adapter = make_adapter(tmp_path / "a", base, target_modules=["q_proj", "lm_head"])
    refused(merge(adapter, tmp_path / "out"), tmp_path / "out", "lm_head.weight", "shares its weight")


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/x.safetensors", "a/../../x.safetensors"])
def test_a_shard_outside_the_folder(llama: tuple[Path, Path], tmp_path: Path, shard: str) -> None:
    shutil.copytree(llama[0], tmp_path / "base")
    shutil.copyfile(next(llama[0].glob("*.safetensors")), tmp_path / "elsewhere.safetensors")
    path = tmp_path / "base" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = shard
    path.write_text(json.dumps(index))
    refused(merge(llama[1], tmp_path / "out", "--model", tmp_path / "base"), tmp_path / "out", "outside the folder")


def test_a_tensor_in_two_shards(llama: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(llama[0], tmp_path / "base")
    first, second = sorted((tmp_path / "base").glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second, {"format": "pt"})
    ran = merge(llama[1], tmp_path / "out", "--model", tmp_path / "base")
    refused(ran, tmp_path / "out", name, first.name, second.name)


def test_a_link_out_of_the_base_is_not_followed(llama: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(llama[0], tmp_path / "base")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "base" / "merges.txt").symlink_to(tmp_path / "secret")
    ran = merge(llama[1], tmp_path / "out", "--model", tmp_path / "base")
    refused(ran, tmp_path / "out", "leaves the model folder")


def test_overwrite_replaces_models_only(llama: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "home" / "photos").mkdir(parents=True)
    (tmp_path / "home" / "config.json").write_text("{}")
    ran = merge(llama[1], tmp_path / "home", "--overwrite")
    assert ran.code == 9 and "no qunlearn.json of ours" in ran.stderr
    assert (tmp_path / "home" / "photos").is_dir()
    for _ in range(2):
        assert merge(llama[1], tmp_path / "out", "--overwrite").code == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# -- the file --------------------------------------------------------------------------------------------


def test_reading_ahead_asks_for_all_of_the_files_in_order_up_to_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *span: asked.append(span[:2]), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    mib = 1 << 20
    for name, size in (("b", 4 * mib), ("a", 2 * mib + 5)):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(size))
    ahead._read(tmp_path, 4 * mib + 5)
    assert asked == [(0, mib), (mib, mib), (0, mib), (mib, mib)]
    assert ahead.advise(0, 7, 5) == 7


def test_reading_ahead_is_advice_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "a.safetensors").write_bytes(bytes(1 << 21))
    monkeypatch.setattr(os, "posix_fadvise", refuses, raising=False)
    ahead._read(tmp_path, 1 << 21)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert ahead.advise(0, 0, 1 << 21) == 0
    ahead._read(tmp_path / "none", 1 << 21)


@pytest.mark.parametrize("sizes", [[0], [1], [4095, 1, 4096], [5000, 4 << 20, 3], [(33 << 20) + 17]], ids=str)
@pytest.mark.parametrize(
    "way", ["direct", "no such flag", "not opened so", "not written so", "written in part", "no pwrite"]
)
def test_a_file_has_every_byte_in_order(
    way: str, sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the page cache or through it, and whenever the file system turns out not to take the first."""
    open_, write = os.open, os.pwrite
    direct = getattr(os, "O_DIRECT", 0)

    def opening(path: Any, flags: int, *more: Any) -> int:
        if flags & direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_(path, flags, *more)

    def writing(descriptor: int, data: memoryview, at: int) -> int:
        if direct and fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct:
            if way == "not written so":
                raise OSError(errno.EINVAL, "Invalid argument")
            return write(descriptor, data[: max(4096, len(data) // 8192 * 4096)], at)
        return write(descriptor, data[: max(1, len(data) // 2)], at)

    if way == "no such flag":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    elif way == "not opened so":
        monkeypatch.setattr(os, "open", opening)
    elif way == "no pwrite":
        monkeypatch.delattr(os, "pwrite")
        monkeypatch.setattr(output, "_WRITES", 1)
    elif way != "direct":
        monkeypatch.setattr(os, "pwrite", writing)
    blocks = [random.Random(n).randbytes(n) for n in sizes]
    file = ShardFile(tmp_path / "a")
    for block in blocks:
        file.write(memoryview(block))
    file.close()
    whole = b"".join(blocks)
    assert (tmp_path / "a").read_bytes() == whole
    assert (file.size, file.digest.hexdigest()) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
