"""A model laid over several GPUs: which module is where, and that what is computed there is the same.

No test has two GPUs. Numbers are compared on two devices of the CPU, which share their memory: accelerate's hooks run,
but a tensor that was left on the wrong one would not be noticed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.hooks
import pytest
import torch
from conftest import QUICK, call, few, sets
from safetensors.torch import load_file
from test_architectures import CONFIGS
from transformers import AutoModelForCausalLM

from qunlearn.config.settings import LoraConfig, ModelConfig
from qunlearn.data.batch import ALL, PrefixGroup, collate
from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example
from qunlearn.errors import ConfigError, DeviceError, DoesNotFitError, ModelError
from qunlearn.memory.plan import DeviceFacts
from qunlearn.model import gpus, load
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.load import Base, LoadSpec, decoder_blocks, load_base, load_spec
from qunlearn.model.policy import Policy
from qunlearn.sandbox import data_file
from qunlearn.training import prepare
from qunlearn.utils.file_names import ADAPTER, RECORD

TWO = (torch.device("cpu", 0), torch.device("cpu", 1))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices of the CPU in the place of two GPUs of 1 GiB.

    A tensor on either says `cpu`, so that accelerate would copy those that are in their place already.
    """
    facts = DeviceFacts("cuda", 4, 1 << 30, "a GPU")
    monkeypatch.setattr(gpus, "visible_gpus", lambda: TWO)
    monkeypatch.setattr(load, "device_facts", lambda _: facts)
    monkeypatch.setattr(prepare, "device_facts", lambda _: facts)
    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", lambda *_, **__: None)


def laid_over(folder: Path, quant: str = "nf4", spans: gpus.Spans = ((0, 2), (2, 4))) -> Base:
    return load_base(folder, LoadSpec(quant, device_map="auto", spans=spans))


def examples() -> list[Example]:
    return [Example(tuple(range(at, at + n)), 1, n, 1, Record((), "", 0, {})) for at, n in ((4, 12), (16, 7), (30, 9))]


# -- the same numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4", "int8", "none"])
def test_what_is_computed_is_the_same(
    quant: str, two_gpus: None, new_base: Callable[..., Base], sandbox_folder: Path
) -> None:
    plain, base = new_base(quant), laid_over(sandbox_folder, quant)
    assert base.gpus == TWO and base.device == TWO[1] and not plain.gpus
    assert base.blocks == 4 and base.model.hf_device_map["model.layers.2"] == "cpu:1"
    assert set(map(str, base.model.hf_device_map.values())) == {"cpu:0", "cpu:1"}
    batch = collate(examples(), ALL, base.tokenizer.pad_token_id)
    with torch.no_grad():
        assert torch.equal(base.hidden(batch), plain.hidden(batch))
        assert torch.equal(base.hidden_behind(batch, 0), plain.hidden_behind(batch, 0))
    prompts = [[1, 5, 9, 14], [1, 7]]
    how = Sampling(max_new_tokens=6)
    assert generate(base, prompts, how) == generate(plain, prompts, how)


def test_a_step_has_the_same_gradients(two_gpus: None, new_base: Callable[..., Base], sandbox_folder: Path) -> None:
    """Through checkpointing and padding-free rows, whose layout goes from GPU to GPU."""

    def gradients(base: Base) -> dict[str, torch.Tensor]:
        policy = Policy.new(base, LoraConfig(), seed=3)
        policy.model.train()
        rows = [[PrefixGroup((i,), 1, len(e.input_ids))] for i, e in enumerate(examples())]
        batch = policy.collate(examples(), [ALL] * 3, rows, pack=True)
        assert batch.layout is not None
        torch.autograd.backward(policy.hidden(batch).float().square().mean())
        assert not policy.records
        return {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}

    ours, theirs = gradients(laid_over(sandbox_folder)), gradients(new_base("nf4"))
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 4 * 7
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.medium
def test_a_run_is_the_same_and_says_where_it_was(two_gpus: None, tmp_path: Path) -> None:
    bad, normal = (few(tmp_path, data_file("hallucination", split), 16) for split in ("forget", "retain"))
    folder, alone = tmp_path / "run", tmp_path / "alone"
    flags = ["--model", "sandbox", "--bad", bad, "--normal", normal, "--own-share", 0]
    flags += sets({**QUICK, "train.steps": 2, "stop.table_rows": 4})
    ran = call("forget", *flags, "-o", folder, "--device-map", "auto")
    assert ran.code == call("forget", *flags, "-o", alone, "--device", "cpu").code == 5, (
        ran.stderr
    )  # two steps reach nothing
    assert re.search(r"^ 0 +blocks 0 to \d", ran.stderr, re.M) and "the output head is on cpu:1" in ran.stderr
    ours, theirs = (load_file(run / ADAPTER / "adapter_model.safetensors") for run in (folder, alone))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(bool(ours[name].any()) for name in ours if ".lora_B." in name), "the steps have moved it"
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    assert [gpu["device"][:3] for gpu in record["gpus"]] == ["cpu", "cpu"]
    assert [b for gpu in record["gpus"] for b in range(gpu["start"], gpu["stop"])] == [0, 1, 2, 3]
    assert "gpus" not in json.loads((alone / RECORD).read_text(encoding="utf-8"))
    asked = ("--forget", bad, "--rows", 4, "--json")
    measured, plain = call("eval", folder, *asked), call("eval", folder, *asked, "--fresh", "--device", "cpu")
    assert measured.code == plain.code == 0, measured.stderr
    assert measured.json["measures"] == plain.json["measures"]


# -- every module on the right GPU ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_module_is_on_one_gpu_in_the_order_it_computes(name: str) -> None:
    """Once past a GPU, nothing but a table that the head shares is behind it; what comes last is with the head."""
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[name])
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    placed = gpus.module_devices(model, decoder_blocks(model), ((0, 1), (1, 2)), TWO)
    names = [n for n, _ in (*model.named_parameters(), *model.named_buffers())]
    assert all(sum(n.startswith(f"{module}.") for module in placed) == 1 for n in names)
    order: list[str] = []
    for module, device in placed.items():
        model.get_submodule(module).register_forward_pre_hook(lambda *_, device=device: order.append(device))
    model(input_ids=torch.arange(8).unsqueeze(0))
    first = order.index("cpu:0")
    assert order[0] == ("cpu:1" if shared else "cpu:0") and order[-1] == "cpu:1"
    assert order[first:] == sorted(order[first:])
    assert shared or first == 0


def test_blocks_that_were_not_planned_are_refused(new_base: Callable[..., Base]) -> None:
    model = new_base("none").model
    with pytest.raises(ModelError, match="has 4 blocks, 3 were placed"):
        gpus.module_devices(model, decoder_blocks(model), ((0, 2), (2, 3)), TWO)


# -- what is refused -------------------------------------------------------------------------------------


def test_one_gpu_or_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="several GPUs, 0 are there"):
        gpus.chosen_devices("auto", "auto")
    bad = data_file("hallucination", "forget")
    ran = call("forget", "--model", "sandbox", "--bad", bad, "-o", tmp_path / "run", "--device-map", "auto")
    assert ran.code == 7 and "--device-map auto" in ran.stderr and "hint: leave it out" in ran.stderr
    assert not (tmp_path / "run").exists()


def test_a_device_beside_the_map_and_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "visible_gpus", lambda: TWO)
    with pytest.raises(ConfigError, match="of no use with --device cuda:1"):
        gpus.chosen_devices("cuda:1", "auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 were launched"):
        gpus.chosen_devices("auto", "auto")


def test_gpus_that_are_too_small_are_refused(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, sandbox_folder: Path
) -> None:
    monkeypatch.setattr(load, "device_facts", lambda _: DeviceFacts("cuda", 4, 400 << 20))
    with pytest.raises(DoesNotFitError, match=r"2 GPUs of 400\.0 MiB do not hold"):
        laid_over(sandbox_folder, spans=())


def test_a_named_device_takes_a_run_off_its_gpus() -> None:
    model = ModelConfig(name="m", device_map="auto")
    assert load_spec(model).device_map == load_spec(model, device="auto").device_map == "auto"
    assert load_spec(model, device="cpu").device_map == "none"
