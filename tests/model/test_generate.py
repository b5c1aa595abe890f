"""Batched generation: a batch that is broken off and goes on says what each row would say alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import GenerationConfig

from qunlearn.config.settings import LoraConfig
from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import choose_template, encode, end_of_turn
from qunlearn.model.generate import Sampling, draw, generate, stop_ids, stream
from qunlearn.model.kernels.unpacked import unpacked, unpacked_bytes
from qunlearn.model.load import Base, load_tokenizer
from qunlearn.model.policy import Policy
from qunlearn.sandbox import data_file


@pytest.fixture(scope="module")
def base(new_base: Callable[..., Base]) -> Base:
    return new_base("none")


@pytest.fixture(scope="module")
def policy(new_base: Callable[..., Base]) -> Policy:
    return Policy.new(new_base("none"), LoraConfig(), seed=0, checkpointing=False)


@pytest.fixture(scope="module")
def prompts(base: Base) -> list[list[int]]:
    """Of four kinds, whose answers are of many lengths."""
    out = []
    for kind in ("hallucination", "harm", "code", "copyright"):
        dataset = read_dataset(data_file(kind, "forget"))
        rows = encode(dataset, base.tokenizer, choose_template(base.tokenizer, "auto", dataset), 64).examples
        out += [list(e.input_ids[: e.probe]) for e in rows[:12]]
    return out


@pytest.fixture
def batches(base: Base, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of the library's `generate`."""
    sizes: list[int] = []
    theirs = base.model.generate

    def counted(**given: Any) -> Any:
        sizes.append(len(given["input_ids"]))
        return theirs(**given)

    monkeypatch.setattr(base.model, "generate", counted)
    return sizes


@pytest.mark.medium
def test_those_that_go_on_say_what_they_say_alone(base: Base, prompts: list[list[int]], batches: list[int]) -> None:
    together = generate(base, prompts, Sampling(40))
    shrinking = list(batches)
    assert together == [generate(base, [prompt], Sampling(40))[0] for prompt in prompts]
    assert len(shrinking) > 1
    assert all(2 * later <= earlier for earlier, later in itertools.pairwise(shrinking))
    assert len({len(ids) for ids in together}) > 5


def test_no_answer_is_longer_than_asked_or_has_an_end_in_it(
    base: Base, prompts: list[list[int]], batches: list[int]
) -> None:
    sampled = generate(base, prompts, Sampling(20, 1.0, seed=3))
    assert len(batches) > 1
    assert max(map(len, sampled)) == 20
    assert not any(stop_ids(base).intersection(ids) for ids in sampled)
    whole = generate(base, prompts, Sampling(40))
    end = whole[0][2]
    cut = generate(base, prompts, Sampling(40, stop=(end,)))
    assert cut == [ids[: ids.index(end)] if end in ids else ids for ids in whole]


def test_an_answer_ends_where_the_template_closes_it(
    base: Base, prompts: list[list[int]], with_control: Callable[..., Any]
) -> None:
    """Some base models know turns: what ends one is named by their template alone."""
    whole = generate(base, prompts[:4], Sampling(12))
    end = whole[0][2]
    tokenizer = with_control(end)
    closing = "\n" + tokenizer.convert_ids_to_tokens(end) + "<|user|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", closing)
    other = replace(base, tokenizer=tokenizer)
    assert stop_ids(other) == stop_ids(base) | {end}
    assert generate(other, prompts[:4], Sampling(12)) == [i[: i.index(end)] if end in i else i for i in whole]


@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('no') }}", "{% for m in messages %}{{ m.content }}{% endfor %}"]
)
def test_a_template_without_an_end_ends_nothing(template: str | None, base: Base, sandbox_folder: Path) -> None:
    tokenizer = load_tokenizer(sandbox_folder)
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) is None
    assert stop_ids(replace(base, tokenizer=tokenizer)) == stop_ids(base)


def test_sampling_hangs_on_its_seed_alone(base: Base, prompts: list[list[int]]) -> None:
    before = torch.random.get_rng_state()
    first = generate(base, prompts, Sampling(20, 1.0, seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)
    assert generate(base, prompts, Sampling(20, 1.0, seed=3)) == first
    assert generate(base, prompts, Sampling(20, 1.0, seed=4)) != first


@pytest.mark.parametrize("settings_of", ["the base", "the policy's base", "the policy"])
def test_the_models_own_settings_change_nothing(
    settings_of: str,
    base: Base,
    policy: Policy,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Many chat models come with a repetition penalty: what they said was not their likeliest answer."""
    lm: Any = base if settings_of == "the base" else policy
    plain, heard = generate(lm, prompts[:4], Sampling(12)), []
    penalties = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "suppress_tokens": plain[0][:3]}
    settings = GenerationConfig(**penalties, max_length=64)
    holder = policy.model if settings_of == "the policy" else lm.base.model if lm is policy else base.model
    monkeypatch.setattr(holder, "generation_config", settings)
    assert lm.model.generation_config is settings
    assert generate(lm, prompts[:4], Sampling(12)) == plain
    stream(lm, prompts[0], Sampling(12), heard.append)
    assert "".join(heard) == base.tokenizer.decode(plain[0])
    assert "max_length" not in caplog.text
    assert lm.model.generation_config is settings
    assert settings.max_length == 64 and penalties.items() <= settings.to_dict().items()


def test_the_head_is_given_rows_in_one_piece(base: Base, prompts: list[list[int]]) -> None:
    """Of a slice torch multiplied every row by a copy of the head: 15 GB where the plan had 1.7."""
    head, seen = base.model.get_output_embeddings(), []
    hook = head.register_forward_hook(lambda _, given, __: seen.append(given[0].is_contiguous()))
    try:
        generate(base, prompts[:8], Sampling(4))
    finally:
        hook.remove()
    assert len(seen) >= 4 and all(seen)
    assert not head._forward_pre_hooks


def test_unpacked_weights_say_the_same(new_base: Callable[..., Base], prompts: list[list[int]]) -> None:
    base = new_base("nf4")
    assert 0 < unpacked_bytes(base.model) <= base.cache_bytes / 4
    forwards: set[bool] = set()
    layer = next(module for module in base.model.modules() if type(module).__name__ == "Linear4bit")
    layer.register_forward_pre_hook(lambda module, _: forwards.add("forward" in module.__dict__))
    held = generate(base, prompts, Sampling(12))
    assert forwards == {True}
    assert "forward" not in layer.__dict__
    forwards.clear()
    tight = replace(base, cache_bytes=4 * unpacked_bytes(base.model) - 1)
    assert generate(tight, prompts, Sampling(12)) == held
    assert forwards == {False}


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_was_packed_from_another_dtype_computes_the_same(bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear4bit(64, 96, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict({name: torch.randn_like(tensor) for name, tensor in layer.state_dict().items()})
    layer = layer.half().to("cpu")
    model = torch.nn.ModuleDict({"layer": layer})
    model.dtype, x = torch.float32, torch.randn(3, 5, 64)
    with torch.no_grad():
        packed = layer(x)
        with unpacked(model):
            assert torch.equal(layer(x), packed)
        with pytest.raises(RuntimeError, match="out of it"), unpacked(model):
            raise RuntimeError("out of it")
    assert unpacked_bytes(model) == 2 * 64 * 96
    assert "forward" not in layer.__dict__


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05, 0.0])
    torch.manual_seed(0)
    for top_p, inside in ((1.0, 5), (0.8, 3), (0.4, 1), (0.41, 2)):
        drawn = draw(p.expand(20_000, -1), top_p).bincount(minlength=6) / 20_000
        expected = p[:inside] / p[:inside].sum()
        assert drawn[inside:].sum() == 0
        assert (drawn[:inside] - expected).abs().max() < 0.015  # four standard errors
