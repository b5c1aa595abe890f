"""The memory plan's arithmetic, held against models that transformers, peft and bitsandbytes build."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from test_architectures import BASE, CONFIGS, GROUPED
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Starcoder2Config,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from qunlearn.config.resolve import resolve
from qunlearn.errors import DoesNotFitError, ModelError
from qunlearn.hub.known_configs import carried_config
from qunlearn.hub.short_names import SHORT_NAMES
from qunlearn.memory.architecture import Linear
from qunlearn.memory.families import FAMILIES, read_shape
from qunlearn.memory.fit import memory_plan
from qunlearn.memory.plan import DeviceFacts, run_choices, step_load
from qunlearn.memory.resident import Choices, adapted_names, adapter_parameters, loading_bytes, weight_bytes
from qunlearn.memory.step import CACHE_BYTES, GPU_CACHE_BYTES, Load, run_needs
from qunlearn.memory.tape import Tape

SHAPES: dict[str, PreTrainedConfig] = {
    **CONFIGS,
    "llama with biases, tied": LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama, wide heads": LlamaConfig(**GROUPED, head_dim=24),
    "gemma2": Gemma2Config(**GROUPED, head_dim=16),
    "phi3": Phi3Config(**GROUPED, pad_token_id=0),
    "phi, normed queries": PhiConfig(**BASE, intermediate_size=96, qk_layernorm=True),
    "opt, norms after": OPTConfig(**BASE, ffn_dim=96, do_layer_norm_before=False),
    "gpt_neox, in sequence": GPTNeoXConfig(
        **BASE, intermediate_size=96, use_parallel_residual=False, attention_bias=False
    ),
    "starcoder2": Starcoder2Config(**GROUPED),
    "starcoder2, no biases": Starcoder2Config(**GROUPED, use_bias=False, tie_word_embeddings=False),
    "olmo": OlmoConfig(**GROUPED),
    "olmo, tied": OlmoConfig(**GROUPED, tie_word_embeddings=True),
    "olmo2": Olmo2Config(**GROUPED),
}
GPU = DeviceFacts("cuda", 2)
STEP = Load(1024, 512, 1024, 512, 256)  # tokens of a step as the figures of small gpus are measured
DEFAULTS = run_choices(resolve(), GPU, "adamw", "device")
LLAMA_2_7B, LLAMA_31_8B = (read_shape(carried_config(SHORT_NAMES[n]) or {}) for n in ("llama-2-7b", "llama-3.1-8b"))


def choose(**changed: Any) -> Choices:
    return dataclasses.replace(DEFAULTS, **changed)


def on_meta(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linears(model: Any, wanted: Any = lambda name: True) -> Counter[tuple[str, int, int]]:
    """(last part of the name, inputs, outputs) of every linear layer but the head."""
    found: Counter[tuple[str, int, int]] = Counter()
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if module is model.get_output_embeddings() or not wanted(name):
            continue
        if isinstance(module, Conv1D):
            found[last, module.nx, module.nf] += 1
        elif isinstance(module, nn.Linear):
            found[last, module.in_features, module.out_features] += 1
    return found


# -- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_components_of_a_model(name: str) -> None:
    """Counted from the whole config, and from what save_pretrained writes of it."""
    model = on_meta(SHAPES[name])
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output.weight is embeddings.weight
    for config in (SHAPES[name].to_dict(), SHAPES[name].to_diff_dict()):
        shape = read_shape(config)
        expected = linears(model)
        assert Counter({(x.name, x.inputs, x.outputs): 0 for x, _ in shape.linears()}).keys() == expected.keys()
        counted: Counter[tuple[str, int, int]] = Counter()
        for x, n in shape.linears():
            counted[x.name, x.inputs, x.outputs] += n
        assert counted == expected
        positions = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding) and m is not embeddings]
        assert shape.embedding_parameters == embeddings.weight.numel() + sum(positions)
        assert shape.head_parameters == (0 if tied else output.weight.numel())
        assert shape.parameters == model.num_parameters()


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_quantised(name: str) -> None:
    shape, model = read_shape(SHAPES[name].to_dict()), on_meta(SHAPES[name])
    skipped = get_keys_to_not_convert(model)
    left = linears(model) - linears(model, lambda name: should_convert_module(name, skipped))
    assert {last for last, _, _ in left.elements()} == set(shape.unquantised)
    assert left.total() == len(shape.unquantised)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    config = PreTrainedConfig if model_type not in SHAPES else type(SHAPES[model_type])
    assert read_shape({"model_type": model_type}).parameters == on_meta(config()).num_parameters()


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj", "c_attn", "fc1, dense"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi", "phi3"])
def test_adapter_parameters(name: str, targets: str) -> None:
    shape = read_shape(SHAPES[name].to_dict())
    modules = targets if targets == "all-linear" else [part.strip() for part in targets.split(",")]
    config = PeftLoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2")
    try:
        model = get_peft_model(on_meta(SHAPES[name]), config)
    except ValueError:
        with pytest.raises(ModelError, match="no linear layers named"):
            adapted_names(shape, targets)
        return
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_parameters(shape, 4, adapted_names(shape, targets)) == trained


@pytest.mark.parametrize("size", [(704, 256), (100, 30)])
@pytest.mark.parametrize(("quant", "double"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)])
def test_bytes_of_a_frozen_matrix(quant: str, double: bool, size: tuple[int, int]) -> None:
    if quant == "int8":
        layer = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False).to("cpu")
        tensors = [layer.weight.data, layer.weight.SCB]
    else:
        layer = bnb.nn.Linear4bit(*size, bias=False, compress_statistics=double, quant_type=quant).to("cpu")
        state = layer.weight.quant_state
        tensors = [layer.weight.data, state.absmax, *([state.state2.absmax] if double else [])]
    choices = choose(quant=quant, double_quant=double)
    assert weight_bytes(Linear("x", *size), choices) == sum(t.numel() * t.itemsize for t in tensors)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_optimizer_state(optimizer: str) -> None:
    """r = 8 at width 64: some tensors are too small for 8 bits."""
    shape = read_shape(LlamaConfig(**{**GROUPED, "intermediate_size": 704}).to_dict())
    parameters = [
        nn.Parameter(torch.zeros(size))
        for x, n in shape.linears()
        for _ in range(n)
        for size in ((8, x.inputs), (x.outputs, 8))
    ]
    kind: Any = torch.optim.AdamW if optimizer == "adamw" else bnb.optim.AdamW8bit
    made = kind(parameters, lr=1e-3)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    made.step()
    states = [t for s in made.state.values() for k, t in s.items() if isinstance(t, torch.Tensor) and k != "step"]
    tables = {t.data_ptr() for s in made.state.values() for k, t in s.items() if k.startswith("qmap")}
    held = sum(t.numel() * t.itemsize for t in states if t.data_ptr() not in tables)
    needs = run_needs(shape, choose(r=8, optimizer=optimizer), STEP)
    assert next(p.size_bytes for p in needs.parts if p.name.startswith("optimizer")) == held


def test_weights_of_llama_2_7b() -> None:
    """Tensor by tensor: 32 blocks of 4 x 4096^2 and 3 x 4096 x 11008 in NF4, the rest in 16 bits."""
    matrices = [4096 * 4096] * 4 + [4096 * 11008] * 3
    nf4 = 32 * sum(m // 2 + m // 64 + 4 * (m // 64 // 256) for m in matrices)
    plain = 2 * (2 * 32000 * 4096 + 65 * 4096)
    parts = {part.name: part.size_bytes for part in run_needs(LLAMA_2_7B, DEFAULTS, STEP).parts}
    assert parts["weights, nf4 + double quantisation"] == nf4
    assert parts["embeddings, head, norms"] == plain
    assert 3.59 < (nf4 + plain) / 2**30 < 3.61


def test_what_small_gpus_are_promised() -> None:
    """r = 16 on every layer, 1,024 tokens a step: 7B in 4.9 GiB as it is, 8B in 5.8 with its embeddings on the host."""
    assert run_needs(LLAMA_2_7B, DEFAULTS, STEP).allocated_bytes <= 4.9 * 2**30
    needs = run_needs(LLAMA_31_8B, choose(embeddings="cpu"), STEP)
    assert needs.loading_bytes <= needs.allocated_bytes <= 5.8 * 2**30
    assert run_needs(LLAMA_31_8B, choose(optimizer="adamw8bit"), STEP).allocated_bytes > 5.8 * 2**30


@pytest.mark.parametrize("known", [m for m in SHORT_NAMES.values() if m.hub_id], ids=lambda known: known.name)
def test_carried_configs(known: Any) -> None:
    config = carried_config(known)
    assert config is not None
    assert read_shape(config).parameters == pytest.approx(known.params_b * 1e9, rel=0.01)


# -- the moments of a step -------------------------------------------------------------------------------


def test_a_tape_by_hand() -> None:
    """x -> a = f(x), kept -> b = g(a), kept -> y: 10, 20 and 5 bytes."""
    tape = Tape()
    x = tape.given(3)
    a = tape.op([x], 10, keeps_output=True)
    b = tape.op([a], 20, keeps=[a], backward=7)
    tape.op([b], 5, keeps=[b])
    assert tape.passing() == 30  # a and b; then b and y
    # Computed again up to b beside y's gradient (35), then b's gradient beside all that was kept (55), then a's: b
    # is gone, and 7 bytes are needed on the side.
    assert tape.recomputed() == 30
    assert tape.checkpointed().kept == 30
    assert tape.checkpointed().most == 30 + 5 + 20
    heavy = Tape()
    heavy.op([heavy.op([heavy.given(3)], 10, keeps_output=True, backward=70)], 5)
    assert heavy.checkpointed().most == 10 + 10 + 3 + 70


def test_gradients_that_meet_are_added() -> None:
    """Two uses of a value: the sum is a third tensor where the first gradient came from a matrix product."""

    def play(solid: bool) -> int:
        tape = Tape()
        x = tape.op([tape.given(0)], 10)
        tape.op([tape.op([x], 1, solid=solid), tape.op([x], 1, solid=solid)], 1, passes=True)
        return tape.remembered().most

    assert play(True) == 10 + 10 + 1
    assert play(False) == 10 + 10 + 10


def test_views_cost_nothing_forward() -> None:
    tape = Tape()
    both = tape.op([tape.given(0)], 8)
    left, right = tape.view(both, 4), tape.view(both, 4)
    tape.op([left, right], 4, keeps=[left, right])
    assert tape.passing() == 8 + 4
    assert tape.checkpointed().kept == 8


@pytest.mark.parametrize("name", SHAPES)
def test_more_work_never_needs_less(name: str) -> None:
    shape = read_shape(SHAPES[name].to_dict())

    def needed(**changed: Any) -> int:
        return run_needs(shape, DEFAULTS, dataclasses.replace(STEP, **changed)).allocated_bytes

    by_tokens = [needed(tokens=n, supervised=n) for n in (16, 64, 128, 500, 512, 2048, 9000)]
    assert by_tokens == sorted(set(by_tokens))
    for field, values in (
        ("row_tokens", (64, 128, 900)),
        ("supervised", (16, 512, 1024)),
        ("reference", (0, 400, 900)),
    ):
        by_field = [needed(**{field: n}) for n in values]
        assert by_field == sorted(by_field), field


def test_the_rank_counts_twice() -> None:
    def parts(r: int) -> dict[str, int]:
        return {p.name.partition(",")[0]: p.size_bytes for p in run_needs(LLAMA_2_7B, choose(r=r), STEP).parts}

    eight, sixteen = parts(8), parts(16)
    assert {name for name in eight if sixteen[name] == 2 * eight[name]} == {"adapters", "gradients", "optimizer state"}
    assert adapter_parameters(LLAMA_2_7B, 16, adapted_names(LLAMA_2_7B, "all-linear")) == 39_976_960


@pytest.mark.parametrize(
    "leaner",
    [
        {"optimizer": "adamw8bit"},
        {"embeddings": "cpu"},
        {"head": "8bit"},
        {"offload": True},
        {"r": 8},
        {"target_modules": "q_proj,v_proj"},
    ],
    ids=str,
)
def test_levers_help(leaner: dict[str, Any]) -> None:
    plain = run_needs(LLAMA_31_8B, DEFAULTS, STEP).allocated_bytes
    assert run_needs(LLAMA_31_8B, choose(**leaner), STEP).allocated_bytes < plain
    for heavier in ({"checkpointing": False}, {"quant": "int8"}, {"quant": "none"}, {"double_quant": False}):
        assert run_needs(LLAMA_31_8B, choose(**heavier), STEP).allocated_bytes > plain


def test_tied_embeddings_cannot_leave_the_gpu() -> None:
    shape = read_shape(carried_config(SHORT_NAMES["qwen2.5-3b"]) or {})
    needs = [run_needs(shape, choose(embeddings=place), STEP).allocated_bytes for place in ("device", "cpu")]
    assert needs[0] == needs[1]
    apart = run_needs(shape, choose(embeddings="cpu", head="8bit"), STEP).allocated_bytes
    assert needs[0] - apart == pytest.approx(0.5 * 2 * shape.embedding_parameters, rel=0.05)


def test_what_is_counted_adds_up() -> None:
    for shape in (LLAMA_2_7B, LLAMA_31_8B):
        needs = run_needs(shape, DEFAULTS, STEP)
        assert sum(part.counted_bytes for part in needs.parts) == needs.allocated_bytes
        assert all(0 <= part.counted_bytes <= part.size_bytes for part in needs.parts)


def test_what_is_on_a_gpu_while_a_model_is_loaded() -> None:
    """Llama-3.1-8B: both tables of 128,256 x 4,096 in 16 bits, one layer of 4,096 x 14,336 not quantised yet."""
    table, layer = 2 * 128256 * 4096, 2 * 4096 * 14336
    static = {part.name.partition(",")[0]: part.size_bytes for part in run_needs(LLAMA_31_8B, DEFAULTS, STEP).parts}
    loaded = static["weights"] + static["embeddings"]
    codes = table // 2 + 4 * (table // 2 // 256)
    for changed, most in (
        ({}, loaded + layer),
        ({"embeddings": "cpu"}, loaded + layer),
        ({"embeddings": "cpu", "head": "8bit"}, loaded + layer),
        ({"head": "8bit"}, loaded + codes),
    ):
        needs = run_needs(LLAMA_31_8B, choose(**changed), STEP)
        assert needs.loading_bytes == most, changed
        assert needs.total_bytes >= most + needs.context_bytes
    shared = read_shape(carried_config(SHORT_NAMES["gemma-2-9b"]) or {})
    plain, apart = (loading_bytes(shared, choose(**c)) for c in ({}, {"embeddings": "cpu", "head": "8bit"}))
    assert plain == apart  # the table is on the host when it is rounded
    assert run_needs(shared, dataclasses.replace(DEFAULTS, on_gpu=False), STEP).loading_bytes == 0


# -- fitting ---------------------------------------------------------------------------------------------


def plan(model: str, vram: str | None = None, longest_row: int | None = None, **settings: Any) -> Any:
    config = resolve(("test", {"model.vram": vram, **{k.replace("__", "."): v for k, v in settings.items()}}))
    return memory_plan(config, carried_config(SHORT_NAMES[model]) or {}, GPU, longest_row)


def test_auto_takes_the_harmless_way_first() -> None:
    assert plan("llama-3.1-8b", "8GiB").choices.embeddings == "device"
    on_host = plan("llama-3.1-8b", "7GiB")
    assert (on_host.choices.optimizer, on_host.choices.embeddings, on_host.fits) == ("adamw", "cpu", True)
    eight = plan("llama-3.1-8b", "6.5GiB")
    assert (eight.choices.optimizer, eight.choices.embeddings, eight.fits) == ("adamw8bit", "cpu", True)
    asked = plan("llama-3.1-8b", "8GiB", train__optimizer="paged_adamw8bit", model__embeddings="cpu")
    assert (asked.choices.optimizer, asked.choices.embeddings) == ("paged_adamw8bit", "cpu")
    settled = asked.settled(resolve())
    assert (settled.train.optimizer, settled.model.embeddings) == ("paged_adamw8bit", "cpu")


def test_a_shared_table_leaves_the_gpu_when_the_head_is_in_8_bits() -> None:
    """Beside the head's codes the table would be one more; without a GPU there is nowhere to go."""
    assert plan("llama-3.2-3b", "8GiB").choices.embeddings == "device"
    assert plan("llama-3.2-3b", "8GiB", model__head="8bit").choices.embeddings == "cpu"
    kept = plan("llama-3.2-3b", "8GiB", model__head="8bit", model__embeddings="device")
    assert kept.choices.embeddings == "device"
    needs = {where: plan("gemma-2-9b", "8GB", model__head=where, train__max_tokens=2048) for where in ("full", "8bit")}
    assert not needs["full"].fits
    assert needs["8bit"].fits


def test_the_largest_budget_is_the_largest() -> None:
    found = plan("llama-7b", "6GiB", train__compile="off")
    assert found.fits
    assert found.largest_tokens % 16 == 0
    asked = {
        "train__compile": "off",
        "train__optimizer": found.choices.optimizer,
        "model__embeddings": found.choices.embeddings,
    }
    assert plan("llama-7b", "6GiB", train__max_tokens=found.largest_tokens, **asked).fits
    assert not plan("llama-7b", "6GiB", train__max_tokens=found.largest_tokens + 32, **asked).fits


@pytest.mark.parametrize(
    ("model", "vram", "settings", "change"),
    [
        ("llama-3.1-8b", "6GiB", {"train__max_tokens": 2048}, r"it fits with --max-tokens \d+"),
        ("llama-3.1-8b", "6.5GiB", {"model__embeddings": "device", "train__max_tokens": 512}, "--embeddings cpu"),
        ("llama-7b", "4930MiB", {"train__max_tokens": 512, "train__optimizer": "adamw"}, "--set train.offload=true"),
        ("gemma-2-9b", "6.5GiB", {"train__max_tokens": 2048}, r"--max-tokens \d+ --set model.head=8bit"),
        ("gemma-2-9b", "6.5GiB", {}, "it fits with --set model.head=8bit"),
        ("llama-3.1-8b", "5.5GiB", {}, "--model .* fits"),  # not while it is loaded, its table on the GPU
        ("llama-7b", "6GiB", {"model__quant": "int8"}, "--quant nf4"),
        ("llama-13b", "6GiB", {}, "--model .* fits"),
        ("gpt2", "300MiB", {}, "no model with a short name fits"),
    ],
)
def test_the_least_change(model: str, vram: str, settings: dict[str, Any], change: str) -> None:
    found = plan(model, vram, **settings)
    with pytest.raises(DoesNotFitError) as caught:
        found.check()
    assert found.change is not None
    assert caught.value.hint == found.change
    assert caught.value.exit_code == 4
    assert re.search(change, found.change), found.change


@pytest.mark.parametrize("model", ["llama-7b", "llama-3.1-8b", "gemma-2-9b", "llama-13b"])
@pytest.mark.parametrize("vram", ["5GiB", "6GiB", "8GiB"])
def test_a_change_that_is_named_helps(model: str, vram: str) -> None:
    found = plan(model, vram)
    if found.fits:
        found.check()
        return
    words = found.change.split()
    flags = {
        "--max-tokens": "train__max_tokens",
        "--embeddings": "model__embeddings",
        "--optimizer": "train__optimizer",
        "--lora-r": "lora__r",
        "--max-length": "data__max_length",
        "--model": "model",
    }
    asked: dict[str, Any] = {}
    for flag, value in itertools.pairwise(words):
        if flag == "--set":
            key, _, setting = value.partition("=")
            asked[key.replace(".", "__")] = setting
        elif flag in flags:
            asked[flags[flag]] = value
    assert plan(asked.pop("model", model), vram, **asked).fits


def test_short_rows_need_less() -> None:
    config, whole = resolve(("x", {"objective.name": "llmu"})), {"train__compile": "off"}
    known, unknown = step_load(config, 40), step_load(config, None)
    assert known.tokens == 24 * 80 < unknown.tokens == 2048
    assert step_load(resolve(("x", {"train.max_tokens": 64})), None).tokens == 512, "a row is never split"
    short, long = plan("llama-7b", "6GiB", 40, **whole), plan("llama-7b", "6GiB", **whole)
    assert short.needs.total_bytes < long.needs.total_bytes


def test_a_pass_that_is_not_recorded_holds_the_whole_step_where_there_is_room() -> None:
    """Launched piece by piece it takes as long for few tokens as for many; of a CPU that is not so."""
    whole = step_load(resolve(("x", {"train.max_tokens": 1 << 17})), 256).tokens
    roomy, tight = (plan("llama-7b", vram, 256, train__compile="off") for vram in ("24GiB", "7GiB"))
    assert (roomy.max_tokens, roomy.load.tokens) == (whole, whole)
    assert 2048 < tight.max_tokens < whole and tight.needs.total_bytes <= 0.9 * tight.limit_bytes
    assert plan("llama-7b", "24GiB", 256, train__compile="off", train__max_tokens=2048).max_tokens == 2048
    assert roomy.settled(resolve()).train.max_tokens == whole
    small = {"model_type": "llama", "hidden_size": 160, "num_hidden_layers": 4, "vocab_size": 3000}
    assert memory_plan(resolve(), small, DeviceFacts("cpu", 4), 256).max_tokens == resolve().train.pass_tokens == 2048


def test_fewer_tokens_of_a_pass_are_the_last_thing_that_is_tried() -> None:
    """Behind 8-bit state and embeddings on the host, down to the longest row."""
    fewer = plan("llama-3.1-8b", "6GiB")
    assert fewer.fits and 512 <= fewer.max_tokens < 2048
    assert (fewer.choices.optimizer, fewer.choices.embeddings) == ("adamw8bit", "cpu")
    assert not plan("llama-3.1-8b", "6GiB", train__max_tokens=fewer.max_tokens + 32).fits
    assert not plan("llama-3.1-8b", "5GiB").fits


def test_passes_are_recorded_where_there_is_room_and_made_smaller_for_it() -> None:
    """On a GPU, beside an unrecorded pass and the gradients twice; not with anything on the host."""
    roomy, tight = plan("llama-7b", "16GiB"), plan("llama-7b", "6GiB")
    assert (roomy.choices.recorded, roomy.max_tokens) == (True, 2048)
    assert (tight.choices.recorded, tight.max_tokens) == (True, 512)
    settled = tight.settled(resolve()).train
    assert (settled.compile, settled.max_tokens) == ("graphs", 512)
    off = plan("llama-7b", "6GiB", train__compile="off")
    assert (off.choices.recorded, off.max_tokens, off.settled(resolve()).train.compile) == (False, 2048, "off")
    assert not plan("llama-7b", "4900MiB").choices.recorded  # too little room for it
    for settings in ({"model__embeddings": "cpu"}, {"train__offload": True}, {"train__pack": False}):
        assert not plan("llama-7b", "16GiB", **settings).choices.recorded
    carried = carried_config(SHORT_NAMES["llama-7b"]) or {}
    assert not memory_plan(resolve(), carried, DeviceFacts("cpu", 4)).choices.recorded
    for apart in ({"lora__dropout": 0.1}, {"objective__name": "mollm"}):  # no recording draws, or keeps losses apart
        assert not plan("llama-7b", "16GiB", **apart).choices.recorded
    mollm, usual = (plan("llama-7b", "16GiB", objective__name=name, train__compile="off") for name in ("mollm", "wga"))
    kept = [next(p.size_bytes for p in made.needs.parts if p.name == "gradients") for made in (mollm, usual)]
    assert kept[0] == 5 * kept[1]


def test_activations_are_kept_where_there_is_room() -> None:
    """On a GPU within nine tenths of a known memory, on a CPU within 2 GiB; never where inputs are offloaded."""
    roomy, tight = plan("llama-3.2-1b", "40GiB"), plan("llama-3.2-1b", "4GiB")
    assert (roomy.choices.checkpointing, roomy.settled(resolve()).train.checkpointing) == (False, "never")
    assert roomy.needs.total_bytes <= 0.9 * roomy.limit_bytes
    assert (tight.choices.checkpointing, tight.settled(resolve()).train.checkpointing) == (True, "always")
    assert plan("llama-3.2-1b").choices.checkpointing
    assert plan("llama-3.2-1b", "40GiB", train__checkpointing="always").choices.checkpointing
    assert plan("llama-3.2-1b", "40GiB", train__offload=True).choices.checkpointing
    # A longer pass is never ruled out by what was chosen for a short one.
    assert roomy.largest_tokens == plan("llama-3.2-1b", "40GiB", train__checkpointing="always").largest_tokens
    small = {"model_type": "llama", "hidden_size": 160, "num_hidden_layers": 4, "vocab_size": 3000}
    assert not memory_plan(resolve(), small, DeviceFacts("cpu", 4)).choices.checkpointing
    carried = carried_config(SHORT_NAMES["llama-7b"]) or {}
    assert memory_plan(resolve(), carried, DeviceFacts("cpu", 4)).choices.checkpointing


def test_as_many_blocks_as_there_is_room_for_keep_their_activations() -> None:
    """The last ones, up to nine tenths of the memory; all are recomputed where that was asked for."""
    some = plan("llama-7b", "12GiB")
    blocks = some.choices.kept_blocks
    assert some.choices.checkpointing and 0 < blocks < some.shape.layers - 1
    assert f"but for the last {blocks} blocks" in some.choices.activations
    settled = some.settled(resolve()).train
    assert (settled.checkpointing, settled.kept_blocks) == ("always", blocks)
    asked = {n: plan("llama-7b", "12GiB", train__kept_blocks=n).needs.total_bytes for n in (blocks, blocks + 1)}
    assert asked[blocks] == some.needs.total_bytes <= 0.9 * some.limit_bytes < asked[blocks + 1]
    assert plan("llama-7b", "12GiB", train__checkpointing="always").choices.kept_blocks == 0
    assert plan("llama-7b", "12GiB", train__offload=True).choices.kept_blocks == 0
    assert plan("llama-7b", "80GiB").choices.activations == "kept"
    every, kept = (plan("llama-7b", "80GiB", **way).needs for way in ({"train__kept_blocks": 32}, {}))
    assert every.total_bytes == kept.total_bytes, "all of them kept is no checkpointing"


def test_who_asked_for_kept_activations_is_told_to_recompute() -> None:
    kept = plan("llama-3.2-1b", "6GiB", train__checkpointing="never", train__max_tokens=4096, train__compile="off")
    assert (kept.fits, kept.change) == (False, f"it fits with --max-tokens {kept.largest_tokens}")
    long = plan("llama-3.2-1b", "6GiB", train__checkpointing="never", data__max_length=4096, train__compile="off")
    assert (long.fits, long.change) == (False, "it fits with --set train.checkpointing=always")


def test_answers_take_what_is_there() -> None:
    """A batch of answers never makes a step's memory too little, and is larger where there is more."""
    tight, wide, huge = (plan("llama-3.1-8b", size) for size in ("8GiB", "12GiB", "140GiB"))
    assert tight.needs.answering_bytes <= tight.needs.allocated_bytes
    assert tight.cache_bytes < CACHE_BYTES <= wide.cache_bytes < huge.cache_bytes == GPU_CACHE_BYTES
    for size in (12, 16, 24):
        found = plan("llama-3.1-8b", f"{size}GiB")
        assert CACHE_BYTES <= found.cache_bytes < (size << 30) - found.needs.idle_bytes
    assert plan("llama-3.1-8b").cache_bytes == CACHE_BYTES


def test_the_smaller_of_asked_and_there() -> None:
    config = resolve(("x", {"model.vram": "8GiB"}))
    carried = carried_config(SHORT_NAMES["llama-7b"]) or {}
    small = memory_plan(config, carried, DeviceFacts("cuda", 2, 6 << 30))
    assert small.limit_bytes == 6 << 30
    assert memory_plan(config, carried, DeviceFacts("cuda", 2, 80 << 30)).limit_bytes == 8 << 30
    assert memory_plan(resolve(), carried, DeviceFacts("cpu", 4, None)).limit_bytes is None


def test_a_checkpoint_keeps_its_quantisation() -> None:
    carried = carried_config(SHORT_NAMES["llama-7b"]) or {}
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = resolve(("x", {"model.quant": "none"}))
    assert memory_plan(config, {**carried, "quantization_config": stored}, GPU).choices.quant == "nf4"
    with pytest.raises(ModelError, match="gptq"):
        memory_plan(config, {**carried, "quantization_config": {"quant_method": "gptq", "bits": 4}}, GPU)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is an architecture"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "'mixtral' is a mixture of experts"),
        ({"model_type": "gemma3", "text_config": {}}, "more than text"),
        ({"model_type": "llama", "hidden_size": -1}, "hidden_size is not a size"),
        ({"model_type": "llama", "num_hidden_layers": "many"}, "num_hidden_layers is not a size"),
        ({"model_type": "phi", "resid_pdrop": "much"}, "resid_pdrop is not a number"),
    ],
)
def test_what_is_not_a_known_model(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_shape(config)
