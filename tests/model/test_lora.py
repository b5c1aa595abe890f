"""The lean LoRA layers: peft's values and gradients, from what they should be, in less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from qunlearn.config.settings import LoraConfig
from qunlearn.data.batch import ALL, collate
from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example
from qunlearn.model.head import Head
from qunlearn.model.kernels.attention import use_layouts
from qunlearn.model.kernels.lora import _Adapted, _AdaptedLinear4bit, _Matrices, cast_once, make_lean, make_plain
from qunlearn.model.load import Base
from qunlearn.model.policy import Policy

N, IN, OUT, R = (2, 7), 12, 10, 4


def adapted(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return _Adapted.apply(y, x, a, b, _Matrices.of(a, b, scaling, y.dtype))  # type: ignore[no-any-return, no-untyped-call]


def numbers(*size: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.parametrize("view", [False, True])
def test_gradients_of_every_input(view: bool) -> None:
    y, x, a, b = numbers(*N, OUT, seed=0), numbers(*N, IN, seed=1), numbers(R, IN, seed=2), numbers(OUT, R, seed=3)

    def of_inputs(*inputs: Tensor) -> Tensor:
        y = inputs[0].flatten(0, 1).clone().view(*N, OUT) if view else inputs[0].clone()
        return adapted(y, *inputs[1:], 0.7)

    inputs = [t.requires_grad_() for t in (y, x, a, b)]
    torch.testing.assert_close(of_inputs(*inputs), y + 0.7 * x @ a.T @ b.T)
    assert torch.autograd.gradcheck(of_inputs, inputs)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 0.02), (torch.float16, 0.01)])
def test_halves_are_multiplied_and_the_adapters_own_numbers_are_not_lost(dtype: torch.dtype, rtol: float) -> None:
    """As early in training: B nearly 0 and gradients small; multiplied, fp16 can hardly tell them from 0."""
    y, x, a = numbers(*N, OUT, seed=0), numbers(*N, IN, seed=1), numbers(R, IN, seed=2, scale=0.3)
    b, upstream = numbers(OUT, R, seed=3, scale=2e-4), numbers(*N, OUT, seed=4, scale=1e-3)
    halves = [y.to(dtype), x.to(dtype).requires_grad_(), a.float().requires_grad_(), b.float().requires_grad_()]
    exact = [halves[0].double(), *(t.detach().double().requires_grad_() for t in halves[1:])]
    ours = adapted(halves[0].clone(), *halves[1:], 2.0)
    theirs = exact[0] + 2.0 * exact[1] @ exact[2].T @ exact[3].T
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=rtol)
    found = torch.autograd.grad(ours, halves[1:], upstream.to(dtype))
    wanted = torch.autograd.grad(theirs, exact[1:], upstream.to(dtype).double())
    assert [g.dtype for g in found] == [dtype, torch.float32, torch.float32]
    for g, g64 in zip(found[1:], wanted[1:], strict=True):
        assert float((g.double() - g64).norm()) <= rtol * float(g64.norm())


def test_the_input_is_kept_and_little_else() -> None:
    kept: dict[int, int] = {}
    a, b = nn.Parameter(torch.randn(4, 64)), nn.Parameter(torch.randn(96, 4))
    x = torch.randn(50, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        made = [adapted(torch.zeros(50, 96), x, a, b, 1.0) for _ in "qkv"]
    assert len(made) == 3  # alive, and what they keep
    assert sum(kept.values()) == x.nbytes + 3 * 50 * 4 * 4


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_policy_is_what_peft_makes_of_it(new_policy: Callable[..., Policy], quant: str, dropout: float) -> None:
    compare(new_policy(quant, dropout=dropout))


def test_layers_with_biases_and_weights_the_other_way_round() -> None:
    """GPT-2's results are views, which are not written to."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=1600, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model: Any = AutoModelForCausalLM.from_config(config)
    use_layouts(model)
    model.requires_grad_(False)
    compare(Policy.new(Base(model, None, Head.of(model), torch.device("cpu"), None, "", ()), LoraConfig()))  # type: ignore[arg-type]


def compare(policy: Policy) -> None:
    """Hidden states and gradients of the adapters, lean and plain, with the same random numbers."""
    with torch.no_grad():
        for name, p in policy.trainable().items():
            if ".lora_B." in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    policy.model.train()
    examples = [Example(tuple(range(5, 25 + n)), 1, 25 + n - 5, 1, Record((), "", 0, {})) for n in range(2)]
    batch = collate(examples, ALL, 0)
    found = []
    for make in (make_lean, make_plain):
        make(policy.layers)
        assert all(("forward" in vars(layer)) == (make is make_lean) for layer in policy.layers)
        torch.manual_seed(3)
        policy.model.zero_grad()
        h = policy.hidden(batch)
        h.float().square().mean().backward()
        gradients = [p.grad for p in policy.trainable().values()]
        assert all(g is not None and bool(g.any()) for g in gradients)
        found.append([h.detach().float(), *(g for g in gradients if g is not None)])
    with policy.reference():
        off = policy.hidden(batch)
    assert not torch.equal(off, found[0][0].to(off.dtype))
    tolerance = 2e-3 if policy.dtype == torch.float32 else 0.06
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


def test_a_4_bit_layer_with_its_adapter_in_one(new_policy: Callable[..., Policy]) -> None:
    """What a GPU takes: the values and gradients of the layer and its adapter apart."""
    policy = new_policy("nf4")
    layer, dtype = policy.layers[0], policy.dtype
    base, out = layer.base_layer, layer.base_layer.out_features
    x = numbers(3, 5, base.in_features, seed=1).to(dtype).requires_grad_()
    a, b = (numbers(*size, seed=2, scale=0.1).float().requires_grad_() for size in ((R, base.in_features), (out, R)))
    cast = _Matrices.of(a, b, 0.7, dtype)
    ours = _AdaptedLinear4bit.apply(x, a, b, cast, base)  # type: ignore[no-untyped-call]
    theirs = adapted(base(x), x, a, b, 0.7)
    torch.testing.assert_close(ours, theirs)
    upstream = numbers(*ours.shape, seed=4).to(dtype)
    found, wanted = (torch.autograd.grad(y, (x, a, b), upstream) for y in (ours, theirs))
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.05)


def test_what_is_cast_once_is_the_adapter_of_the_step(new_policy: Callable[..., Policy]) -> None:
    """The copies of one step lie where those of the step before lay, and are gone when it ends."""
    policy = new_policy("nf4")
    x = torch.randn(2, 3, policy.layers[0].base_layer.in_features)
    places = []
    for step in range(2):
        for p in policy.trainable().values():
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(step))
        alone = policy.layers[0](x)
        with cast_once(policy.layers, torch.float32):
            torch.testing.assert_close(policy.layers[0](x), alone)
            places.append([layer.__dict__["_qunlearn_cast"].b.data_ptr() for layer in policy.layers])
        assert not any("_qunlearn_cast" in layer.__dict__ for layer in policy.layers)
    assert places[0] == places[1]
