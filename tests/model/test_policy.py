"""The frozen base, its adapter, and the checks around them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from qunlearn.config.settings import LoraConfig
from qunlearn.data.batch import ALL, Batch, collate
from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example
from qunlearn.errors import AdapterError, BaseChangedError, ModelError, NoGradientError
from qunlearn.model.device import choose_dtype
from qunlearn.model.host_embedding import keep_embeddings_on_host
from qunlearn.model.load import Base, LoadSpec, load_base
from qunlearn.model.policy import Policy, save_adapter

MakePolicy = Callable[..., Policy]


def rows(policy: Policy) -> Batch:
    examples = [Example(tuple(range(at, at + 12)), 1, 12, 1, Record((), "", 0, {})) for at in (4, 16)]
    return collate(examples, ALL, policy.tokenizer.pad_token_id)


def disturb(policy: Policy) -> None:
    """Give the fresh adapter, which is the identity, something to do."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.trainable().items():
            if ".lora_B." in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=g))


def test_four_bit_layers_are_real_and_the_head_has_no_adapter(new_policy: MakePolicy) -> None:
    policy = new_policy("nf4")
    linear = [m for m in policy.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linear) == 4 * 7
    assert all(m.weight.dtype is torch.uint8 and m.weight.quant_state.nested for m in linear)
    assert not any("lm_head" in name or "embed" in name for name in policy.trainable())
    assert len(policy.trainable()) == 2 * len(linear)


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8", "none"])
def test_a_fresh_adapter_is_the_base_and_the_reference_stays_it(new_policy: MakePolicy, quant: str) -> None:
    policy = new_policy(quant)
    batch = rows(policy)
    with torch.no_grad():
        fresh = policy.hidden(batch)
        disturb(policy)
        moved = policy.hidden(batch)
    with policy.reference():
        reference = policy.hidden(batch)
    assert torch.equal(fresh, reference)
    assert not torch.allclose(moved, reference, atol=1e-2)


def test_training_keeps_its_gradient_after_an_evaluation(new_policy: MakePolicy) -> None:
    """The CPU trap: one no-grad forward in eval mode may repack a 4-bit weight into a layout without a gradient."""
    policy = new_policy("nf4")
    disturb(policy)
    batch = rows(policy)

    def gradients() -> dict[str, Tensor]:
        policy.model.train()
        policy.model.zero_grad()
        torch.autograd.backward(policy.hidden(batch).float().square().mean())
        return {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}

    before = gradients()
    policy.model.eval()
    with torch.no_grad():
        policy.hidden(batch)
    with policy.reference():
        policy.hidden(batch)
    after = gradients()
    assert before.keys() == after.keys() == policy.trainable().keys()
    for name, gradient in before.items():
        assert gradient.count_nonzero(), name
        assert torch.equal(gradient, after[name]), name


def test_checkpointing_changes_memory_not_gradients(new_policy: MakePolicy) -> None:
    kept, grads = [], []
    blocks = len(new_policy("nf4").base.model.model.layers)
    for again in ({}, {"kept_blocks": 1}, {"kept_blocks": blocks}, {"checkpointing": False}):
        policy = new_policy("nf4", **again)
        disturb(policy)
        policy.model.train()
        numbers: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, n=numbers: n.append(t.numel()) or t, lambda t: t):
            loss = policy.hidden(rows(policy)).float().square().mean()
        kept.append(sum(numbers))
        torch.autograd.backward(loss)
        grads.append([p.grad for p in policy.trainable().values()])
    assert kept[0] < kept[1] / 3 < kept[1] < kept[3] <= kept[2] < 1.1 * kept[3]
    assert all(torch.equal(a, b) for others in grads[1:] for a, b in zip(grads[0], others, strict=True))


def test_a_missing_gradient_is_named(new_policy: MakePolicy) -> None:
    policy = new_policy("none")
    policy.model.train()
    torch.autograd.backward(policy.hidden(rows(policy)).float().square().mean())
    policy.check_gradients()
    name = next(n for n in policy.trainable() if ".layers.2.mlp.up_proj.lora_B." in n)
    policy.trainable()[name].grad = None
    with pytest.raises(NoGradientError, match=r"layers\.2\.mlp\.up_proj"):
        policy.check_gradients()


def test_a_changed_base_is_named(new_policy: MakePolicy) -> None:
    policy = new_policy("nf4")
    policy.seal_base()
    disturb(policy)
    policy.check_base()
    layer = policy.base.model.model.layers[1].mlp.down_proj.base_layer
    layer.weight.data[0, 0] ^= 1
    with pytest.raises(BaseChangedError, match=r"layers\.1\.mlp\.down_proj"):
        policy.check_base()


def test_a_changed_quantisation_constant_is_noticed(new_policy: MakePolicy) -> None:
    policy = new_policy("nf4")
    policy.seal_base()
    policy.base.model.model.layers[0].self_attn.q_proj.base_layer.weight.quant_state.absmax.view(-1)[0] += 1
    with pytest.raises(BaseChangedError, match="absmax"):
        policy.check_base()


def test_same_seed_same_adapter(new_policy: MakePolicy) -> None:
    a, b, c = (Policy.new(new_policy("none").base, LoraConfig(), seed=s) for s in (1, 1, 2))
    first, second, third = (p.adapter_state() for p in (a, b, c))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert any(not torch.equal(first[n], third[n]) for n in first)


@pytest.mark.parametrize(
    ("units", "dtype"),
    [({}, torch.float32), ({"avx512_f": True}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)],
)
def test_bf16_only_where_the_processor_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, units: dict[str, bool], dtype: torch.dtype
) -> None:
    """Emulated bf16 made the demo seven times as slow."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert choose_dtype(torch.device("cpu")) is dtype


def test_the_adapter_loads_with_plain_peft(new_policy: MakePolicy, sandbox_folder: Path, tmp_path: Path) -> None:
    policy = new_policy("none")
    policy.model.float()  # halves are rounded by kernels that differ from machine to machine
    policy.head = replace(policy.head, weight=policy.base.model.get_output_embeddings().weight)
    disturb(policy)
    save_adapter(policy, tmp_path / "a")
    plain = AutoModelForCausalLM.from_pretrained(sandbox_folder, dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, str(tmp_path / "a")).eval()
    policy.model.eval()
    batch = rows(policy)
    with torch.no_grad():
        expected = policy.head.logits(policy.hidden(batch).flatten(0, 1))
        logits = peft(input_ids=batch.input_ids).logits.flatten(0, 1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_an_adapter_of_another_base_is_refused(
    new_policy: MakePolicy, new_base: Callable[..., Base], tmp_path: Path
) -> None:
    policy = new_policy("none", target_modules="q_proj,v_proj")
    save_adapter(policy, tmp_path / "a")
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    (tmp_path / "a" / "adapter_config.json").write_text(text.replace('"q_proj"', '"k_proj"'))
    with pytest.raises(AdapterError, match="not those of this model"):
        Policy.load(new_base("none"), tmp_path / "a")


def test_a_damaged_adapter_is_refused(new_policy: MakePolicy, new_base: Callable[..., Base], tmp_path: Path) -> None:
    save_adapter(new_policy("none"), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="damaged"):
        Policy.load(new_base("none"), tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(AdapterError, match="no adapter in the folder"):
        Policy.load(new_base("none"), tmp_path / "a")


def test_unknown_target_modules(new_base: Callable[..., Base]) -> None:
    with pytest.raises(ModelError, match="query_proj"):
        Policy.new(new_base("none"), LoraConfig(target_modules="query_proj"))


def test_embeddings_on_the_host_change_nothing(sandbox_folder: Path) -> None:
    plain = load_base(sandbox_folder, LoadSpec("nf4", device="cpu"))
    model, head = plain.model, plain.model.get_output_embeddings()
    shared = head.weight is model.get_input_embeddings().weight
    note = keep_embeddings_on_host(model)
    if shared:  # then the table is the head's too: untie it to try the rest
        assert "stays on the device" in note
        model.lm_head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        note = keep_embeddings_on_host(model)
    assert "stay in the host's memory" in note
    ids = torch.arange(4, 20).unsqueeze(0)
    fresh = load_base(sandbox_folder, LoadSpec("nf4", device="cpu"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, fresh.model(input_ids=ids).logits)
    assert model.get_input_embeddings().weight.device.type == "cpu"
