"""Fused norms and rotary embeddings: the numbers and gradients of transformers' own, and hands off anything else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from qunlearn.model.kernels.norm import fuse_norms
from qunlearn.model.kernels.rotary import fuse_rotary, rotated


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm])
def test_a_fused_norm_is_the_norm(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    ours, theirs = kind(24), kind(24)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(24))  # type: ignore[operator]
    ours.load_state_dict(theirs.state_dict())
    assert fuse_norms([ours]) == 1
    x = [torch.linspace(-3, 3, 72).view(3, 24).requires_grad_() for _ in "ab"]
    values = [module(t) for module, t in zip((ours, theirs), x, strict=True)]
    torch.testing.assert_close(*values)
    for value in values:
        value.square().sum().backward()
    torch.testing.assert_close(x[0].grad, x[1].grad)


def test_a_norm_of_another_formula_is_left_alone() -> None:
    """Gemma multiplies by 1 + weight."""
    norm = GemmaRMSNorm(24)
    nn.init.normal_(norm.weight)
    assert fuse_norms([norm, nn.LayerNorm(24)]) == 0
    assert "forward" not in vars(norm)


def test_rotated_is_apply_rotary_pos_emb() -> None:
    torch.manual_seed(0)
    angles = torch.randn(1, 7, 6).repeat(1, 1, 2).double()
    given = [[torch.randn(1, heads, 7, 12).double() for heads in (4, 2)]]
    given.append([t.clone() for t in given[0]])
    found = []
    for (q, k), turn in zip(given, (rotated, _theirs), strict=True):
        q.requires_grad_(), k.requires_grad_()
        out = turn(q, k, angles.cos(), angles.sin())
        sum((t * torch.linspace(-1, 2, t.numel()).view_as(t)).sum() for t in out).backward()  # type: ignore[union-attr]
        found.append([*out, q.grad, k.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


_theirs = modeling_llama.apply_rotary_pos_emb


class LlamaAttention(nn.Module):
    """Stands for the attention of a modelling file: this one."""


def test_the_function_of_the_models_file_is_replaced_where_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    here = __import__("sys").modules[__name__]
    monkeypatch.setattr(here, "apply_rotary_pos_emb", _theirs, raising=False)
    assert fuse_rotary(LlamaAttention())
    assert here.apply_rotary_pos_emb is rotated
    assert fuse_rotary(LlamaAttention())  # again: nothing to do
    other = lambda q, k, cos, sin: (q * cos.unsqueeze(1), k * cos.unsqueeze(1))  # noqa: E731
    monkeypatch.setattr(here, "apply_rotary_pos_emb", other)
    assert not fuse_rotary(LlamaAttention())
    assert here.apply_rotary_pos_emb is other
