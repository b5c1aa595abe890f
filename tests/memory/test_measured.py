"""The memory plan against torch's own allocator: one block of many architectures, and whole steps of the engine.

The plan's promise is 10 % above and 3 % below. Sizes are such that a step's own tensors outweigh everything small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_probe import peak_bytes
from test_step import SHAPES
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig

from qunlearn.config.resolve import resolve
from qunlearn.config.settings import LoraConfig
from qunlearn.data.batch import Batch
from qunlearn.data.tokenize import Example
from qunlearn.memory.block_ops import BlockPass, block_tape
from qunlearn.memory.families import read_shape
from qunlearn.memory.plan import DeviceFacts, run_choices
from qunlearn.memory.resident import loading_bytes
from qunlearn.memory.step import Load, Needs, run_needs
from qunlearn.model import gpus
from qunlearn.model.device import choose_dtype
from qunlearn.model.load import LoadSpec, backbone, load_base
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Live
from qunlearn.objectives.table import terms_of
from qunlearn.training.gradients import backward
from qunlearn.training.sampler import make_step

NUMBER = choose_dtype(torch.device("cpu")).itemsize
LENGTH = 64


def within(planned: float, measured: float) -> bool:
    return 0.97 * measured <= planned <= 1.10 * measured


@pytest.fixture
def new_random_policy(tmp_path: Path, sandbox_folder: Path) -> Callable[..., Policy]:
    """A policy on a random model of a given config."""

    def make(config: PreTrainedConfig, quant: str = "nf4", head: str = "full") -> Policy:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(sandbox_folder).save_pretrained(tmp_path)
        return Policy.new(load_base(tmp_path, LoadSpec(quant, device="cpu", head=head)), LoraConfig())

    return make


def wider(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture, wide enough that a block's tensors are most of what is alive."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "ffn_dim": 704, "num_attention_heads": 8, "n_embd": 256}
    sizes |= {"n_head": 8, "word_embed_proj_dim": 256, "attn_pdrop": 0.0}
    values = config.to_dict()
    for name in [*sizes, "head_dim"]:
        if values.get(name) is not None:
            values[name] = sizes.get(name, 32)
    return type(config).from_dict(values)


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        *((name, "nf4") for name in ("llama", "gemma2", "opt", "gpt2", "gpt_neox")),
        *(pytest.param(name, "nf4", marks=pytest.mark.slow) for name in ("qwen3", "phi", "phi3", "olmo2")),
        *(pytest.param(name, "none", marks=pytest.mark.slow) for name in ("llama", "phi3", "starcoder2")),
        ("llama", "int8"),
    ],
)
def test_a_backward_pass(
    name: str, quant: str, new_random_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "choose_dtype", lambda device: torch.float32)  # the same on every processor
    policy = new_random_policy(wider(SHAPES[name]), quant)
    planned, measured = backward_pass(policy, quant, rows=4)
    assert within(planned, measured), f"{planned / measured:.3f}"


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("llama", "nf4"),
        ("gpt2", "nf4"),
        *(pytest.param(name, "nf4", marks=pytest.mark.slow) for name in ("gemma2", "opt", "gpt_neox", "phi", "olmo2")),
        pytest.param("llama", "none", marks=pytest.mark.slow),
    ],
)
def test_a_backward_pass_in_bf16(
    name: str, quant: str, new_random_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; whatever this processor computes in."""
    monkeypatch.setattr(gpus, "choose_dtype", lambda device: torch.bfloat16)
    policy = new_random_policy(wider(SHAPES[name]), quant)
    assert policy.dtype is torch.bfloat16
    planned, measured = backward_pass(policy, quant, rows=1)
    assert within(planned, measured), f"{planned / measured:.3f}"


def backward_pass(policy: Policy, quant: str, rows: int) -> tuple[float, int]:
    """Planned and measured: two blocks under a 4-D mask, their inputs, the last one computed again, its gradients."""
    policy.model.train()
    config, number = policy.base.model.config, policy.dtype.itemsize
    shape, width = read_shape(config.to_dict()), policy.hidden_size
    ids = torch.randint(5, 1000, (rows, LENGTH))
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(rows, 1, LENGTH, LENGTH).contiguous()
    positions = torch.arange(LENGTH).expand(rows, LENGTH)
    upstream = torch.randn(rows, LENGTH, width, dtype=policy.dtype)

    def step() -> None:
        body = backbone(policy.base.model)
        with (
            policy.cast_once(),
            torch.backends.mkldnn.flags(enabled=False),
        ):  # its workspace for bf16 is none of a GPU's
            body(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state.backward(upstream)

    step()  # the adapters' gradients are there from now on
    tokens = rows * LENGTH
    adapted = frozenset(linear.name for linear, _ in shape.linears())
    run = BlockPass(tokens, LENGTH, number, LoraConfig().r, adapted, quant, on_gpu=False)
    outside = shape.layers * shape.hidden + width * (2 if shape.positions else 1)  # inputs, outputs, embeddings
    outside += int(2 * shape.head_dim * shape.traits.rotary)  # sines and cosines
    if quant == "int8":  # bitsandbytes keeps every product's input, in both blocks
        outside += shape.layers * (2 * shape.hidden + shape.heads * shape.head_dim + shape.intermediate)
    planned = tokens * number * outside + block_tape(shape, run).checkpointed().most
    return planned, peak_bytes(step)


def test_loading(tmp_path: Path, sandbox_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it beside the layer that arrives; not counting the file, which is in the host's memory in any case."""
    monkeypatch.setattr(gpus, "choose_dtype", lambda device: torch.float32)
    config = LlamaConfig(vocab_size=32000, hidden_size=256, intermediate_size=704, num_hidden_layers=8)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(sandbox_folder).save_pretrained(tmp_path)
    kept: list[Any] = []
    measured = peak_bytes(lambda: kept.append(load_base(tmp_path, LoadSpec("nf4", device="cpu"))))
    choices = run_choices(resolve(), DeviceFacts("cpu", 4), "adamw", "device")
    planned = loading_bytes(read_shape(config.to_dict()), choices)
    measured -= (tmp_path / "model.safetensors").stat().st_size
    assert within(planned, measured), f"{planned / measured:.3f}"


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a step on it."""

    vocabulary: int = 2000
    width: int = 256
    heads: tuple[int, int] = (4, 4)
    rows: tuple[int, int] = (4, 4)  # bad, normal
    length: int = 128
    prompt: int = 8
    max_tokens: int = 2048
    k: int = 1
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_hidden_layers=4,
            num_attention_heads=self.heads[0],
            num_key_value_heads=self.heads[1],
        )


CASES = {
    "large vocabulary": Case(vocabulary=32000, rows=(2, 2)),
    "large vocabulary, small passes": Case(vocabulary=32000, rows=(2, 2), max_tokens=256),
    "large vocabulary, head in 8 bits": Case(vocabulary=32000, rows=(2, 2), settings=(("model.head", "8bit"),)),
    "huge vocabulary": Case(vocabulary=128000, width=128, rows=(2, 2)),
    "many tokens": Case(),
    "long rows, K = 5": Case(width=384, heads=(6, 2), length=192, prompt=96, max_tokens=1024, k=5),
    "grouped heads, not packed": Case(heads=(4, 1), settings=(("train.pack", False),)),
    "nothing computed again": Case(rows=(2, 2), settings=(("train.checkpointing", "never"),)),
    "the last block kept": Case(settings=(("train.kept_blocks", 1),)),
    "all blocks but one kept": Case(settings=(("train.kept_blocks", 3),)),
}


_QUICK = ("large vocabulary, head in 8 bits", "all blocks but one kept")
_BELOW = "long rows, K = 5"  # the plan is 3.9 % too low here: docs/guide/memory.md says so


def _marks(name: str) -> list[pytest.MarkDecorator]:
    marks = [] if name in _QUICK else [pytest.mark.slow]
    return [*marks, pytest.mark.xfail(strict=True, reason="the plan is 4 % too low")] if name == _BELOW else marks


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in CASES])
def test_a_step(name: str, new_random_policy: Callable[..., Policy]) -> None:
    case = CASES[name]
    settings = {"objective.name": "llmu", "objective.mismatch_k": case.k, "train.max_tokens": case.max_tokens}
    config = resolve(("test", {**settings, **dict(case.settings)}))
    policy = new_random_policy(case.config, head=config.model.head)
    kept = config.train.kept_blocks or (0 if config.train.recomputes else len(policy.base.model.model.layers))
    for block in list(policy.base.model.model.layers)[::-1][:kept]:
        block.gradient_checkpointing = False
    policy.model.train()
    run, largest = engine_step(policy, case, config)
    reference = case.rows[1] * (case.length - 1)
    tokens, (_, width), places = largest.input_ids.numel(), largest.places.shape, largest.places.numel()
    load = Load(tokens, width, largest.supervised_tokens, reference, case.length, places)
    choices = run_choices(config, DeviceFacts("cpu", NUMBER), "adamw", "device")
    masked = largest.mask is not None or (largest.layout is not None and largest.layout.mask is not None)
    needs = run_needs(read_shape(case.config.to_dict()), dataclasses.replace(choices, packed=masked), load)
    measured = peak_bytes(run)
    planned = beyond_the_model(needs)
    assert within(planned, measured), f"{planned / measured:.3f} in {needs.moment}"


def engine_step(policy: Policy, case: Case, config: Any) -> tuple[Callable[[], object], Batch]:
    """One step from no gradients, run once already, and its largest batch."""

    def example(prompt: int, answer: int) -> Example:
        draw = [torch.Generator().manual_seed(seed) for seed in (prompt, answer)]
        sizes = (case.prompt, case.length - case.prompt)
        parts = [torch.randint(5, case.vocabulary, (n,), generator=g) for n, g in zip(sizes, draw, strict=True)]
        return Example(tuple(torch.cat(parts).tolist()), case.prompt, case.length - 1, case.prompt, None)  # type: ignore[arg-type]

    bad = [example(i, 1000 + i) for i in range(case.rows[0])]
    drawn = [
        {"forget": [e], "mismatch": [example(i, 2000 + 100 * i + j) for j in range(case.k)]} for i, e in enumerate(bad)
    ]
    step = make_step(terms_of(config.objective), drawn, [example(500 + i, 3000 + i) for i in range(case.rows[1])])
    live, hidden, seen = Live(policy, case.max_tokens, config.train.pack), policy.hidden, list[Batch]()

    def run() -> None:
        policy.model.zero_grad(set_to_none=True)
        with policy.cast_once():
            backward(policy, step, live, config, case.max_tokens)

    policy.hidden = lambda batch, layer=None: (seen.append(batch), hidden(batch, layer))[1]  # type: ignore[method-assign, func-returns-value]
    run()
    policy.hidden = hidden  # type: ignore[method-assign]
    largest = max(seen, key=lambda batch: batch.input_ids.numel())
    policy.model.zero_grad(set_to_none=True)
    return run, largest


def beyond_the_model(needs: Needs) -> int:
    """What a step needs beside the frozen model, its adapters and the optimizer's state."""
    there = ("weights", "embeddings", "adapters", "optimizer")
    return sum(part.counted_bytes for part in needs.parts if not part.name.startswith(there))
