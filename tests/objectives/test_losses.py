"""The losses against the paper's formulas in float64, written from the formulas with plain loops over logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qunlearn.config.objective import ObjectiveConfig
from qunlearn.model import head as head_module
from qunlearn.model.head import Head, token_kl, token_log_odds, token_logps, token_soft_ce
from qunlearn.objectives.losses import Supervised, ascent, nll, reference_kl
from qunlearn.objectives.table import ROWS, TOKEN, terms_of

N, D, V = 13, 8, 31


def make(*, bias: bool = False, scale: float = 1.0, cap: float | None = None) -> tuple[Supervised, Tensor]:
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(V, D, generator=g)
    head = Head(weight, torch.randn(V, generator=g) if bias else None, scale, cap)
    h = torch.randn(N, D, generator=g).requires_grad_()
    h_ref = torch.randn(N, D, generator=g)
    labels = torch.randint(V, (N,), generator=g)
    return Supervised(h, h_ref, labels, head), torch.rand(N, generator=g)


def logits64(h: Tensor, head: Head) -> Tensor:
    z = h.double() @ head.weight.double().T
    if head.bias is not None:
        z = z + head.bias.double()
    z = z * head.scale
    return head.soft_cap * torch.tanh(z / head.soft_cap) if head.soft_cap else z


def logps64(h: Tensor, s: Supervised) -> Tensor:
    z = logits64(h, s.head)
    return torch.stack([z[i, s.labels[i]] - z[i].exp().sum().log() for i in range(N)])


def log_odds64(h: Tensor, s: Supervised) -> Tensor:
    """log p - log(1 - p), 1 - p added up of the others: in float64 too, 1 less a p that is 1 would be 0."""
    p = logits64(h, s.head).softmax(1)
    others = [p[i].sum() - p[i, s.labels[i]] for i in range(N)]
    return logps64(h, s) - torch.stack(others).log()


def compare(ours: Tensor, theirs: Tensor, h: Tensor, h64: Tensor, upstream: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    (g,) = torch.autograd.grad((ours * upstream).sum(), h)
    (g64,) = torch.autograd.grad((theirs * upstream.double()).sum(), h64)
    torch.testing.assert_close(g.double(), g64, rtol=1e-4, atol=1e-5)


HEADS = [{}, {"bias": True}, {"scale": 0.25}, {"cap": 5.0}, {"bias": True, "scale": 2.0, "cap": 3.0}]


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize(("tile", "block"), [(1, 1), (5, 2), (100, 3), (100, 100)])
def test_heads(monkeypatch: pytest.MonkeyPatch, options: dict[str, float], tile: int, block: int) -> None:
    monkeypatch.setattr(head_module, "tile_tokens", lambda *size, on_gpu: tile)
    monkeypatch.setattr(head_module, "block_tokens", lambda vocabulary, on_gpu: block)
    s, upstream = make(**options)  # type: ignore[arg-type]
    h64 = s.h.detach().double().requires_grad_()
    compare(token_logps(s.h, s.labels, s.head), logps64(h64, s), s.h, h64, upstream)
    compare(token_log_odds(s.h, s.labels, s.head), log_odds64(h64, s), s.h, h64, upstream)
    assert s.h_ref is not None
    p = logits64(s.h_ref, s.head).softmax(1)
    kl = (p * (p.log() - logits64(h64, s.head).log_softmax(1))).sum(1)
    compare(token_kl(s.h, s.h_ref, s.head), kl, s.h, h64, upstream)
    without = p.scatter(1, s.labels.unsqueeze(1), 0.0)  # a target of which the label is cut out, not renormalised
    soft = -(without * logits64(h64, s.head).log_softmax(1)).sum(1)

    def target(z_ref: Tensor, y: Tensor) -> Tensor:
        return z_ref.softmax(1).scatter(1, y.unsqueeze(1), 0.0)

    compare(token_soft_ce(s.h, s.h_ref, s.labels, s.head, target), soft, s.h, h64, upstream)


def test_ascent_is_log_p_and_stops_at_the_floor() -> None:
    s, upstream = make()
    h64 = s.h.detach().double().requires_grad_()
    compare(ascent(s, math.inf), logps64(h64, s), s.h, h64, upstream)
    floor = float(-logps64(h64, s).detach().median())
    ours = ascent(s, floor)
    (g,) = torch.autograd.grad(ours.sum(), s.h)
    below = -logps64(h64, s).detach() > floor
    assert 0 < int(below.sum()) < N
    assert not g[below].any()
    assert g[~below].abs().sum(1).min() > 0
    torch.testing.assert_close(ours.double()[below], torch.full((int(below.sum()),), -floor).double())


def test_mismatch_is_cross_entropy() -> None:
    s, upstream = make()
    h64 = s.h.detach().double().requires_grad_()
    compare(nll(s), -logps64(h64, s), s.h, h64, upstream)


def test_kl_is_forward_zero_at_the_reference_and_needs_one() -> None:
    s, _ = make()
    same = Supervised(s.h, s.h.detach(), s.labels, s.head)
    loss = reference_kl(same)
    (g,) = torch.autograd.grad(loss.sum(), s.h)
    assert loss.abs().max() < 1e-6
    assert g.abs().max() < 1e-6
    assert s.h_ref is not None
    swapped = reference_kl(Supervised(s.h_ref, s.h.detach(), s.labels, s.head))
    assert not torch.allclose(swapped, reference_kl(s), rtol=0.05)  # KL is not symmetric: the direction is tested
    with pytest.raises(ValueError, match="reference"):
        reference_kl(Supervised(s.h, None, s.labels, s.head))


def test_no_positions() -> None:
    s, _ = make()
    empty = Supervised(s.h[:0], s.h_ref[:0] if s.h_ref is not None else None, s.labels[:0], s.head)
    for loss in (ascent(empty, 3.0), nll(empty), reference_kl(empty)):
        assert loss.shape == (0,)
        assert loss.sum().requires_grad


def test_no_logits_are_kept_for_backward() -> None:
    """The bytes kept are those of hidden states and labels, not of N x V logits."""
    kept: list[int] = []
    g = torch.Generator().manual_seed(0)
    head = Head(torch.randn(5000, D, generator=g), None)
    h = torch.randn(64, D, generator=g).requires_grad_()
    y = torch.zeros(64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        token_logps(h, y, head)
        token_log_odds(h, y, head)
        token_kl(h, h.detach(), head)
        token_soft_ce(h, h.detach(), y, head, lambda z, _: z.softmax(1))
    assert kept == [h.nbytes] * 4  # of 4 * 64 * 5000 logits


def test_halves_are_multiplied_and_floats_are_summed() -> None:
    """bf16 weights: values and gradients as close to float64 as bf16 inputs allow, and in the inputs' dtype."""
    g = torch.Generator().manual_seed(0)
    head = Head(torch.randn(500, 32, generator=g).bfloat16(), None)
    h = torch.randn(20, 32, generator=g).bfloat16().requires_grad_()
    y = torch.randint(500, (20,), generator=g)
    logps = token_logps(h, y, head)
    (grad,) = torch.autograd.grad(logps.sum(), h)
    h64 = h.detach().double().requires_grad_()
    exact = (h64 @ head.weight.double().T).log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
    (grad64,) = torch.autograd.grad(exact.sum(), h64)
    assert (logps.dtype, grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(logps.double(), exact, rtol=2e-2, atol=0.1)
    assert (grad.double() - grad64).norm() < 1e-2 * grad64.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("biased", "scale", "cap"), [(False, 1.0, None), (True, 0.5, 30.0)])
def test_a_small_drift_is_not_lost_in_the_rounding_of_logits(
    dtype: torch.dtype, biased: bool, scale: float, cap: float | None
) -> None:
    """In half precision, where logits of 10 to 16 are rounded to 0.06, a KL of 1e-5 and its gradient are right."""
    g = torch.Generator().manual_seed(0)
    bias = torch.randn(500, generator=g).to(dtype) if biased else None
    head = Head(torch.randn(500, 32, generator=g).to(dtype), bias, scale, cap)
    h_ref = (3 * torch.randn(20, 32, generator=g)).to(dtype)
    h = (h_ref + 6e-3 * torch.randn(20, 32, generator=g)).to(dtype).requires_grad_()
    h64 = h.detach().double().requires_grad_()
    log_p, log_q = logits64(h_ref, head).log_softmax(1), logits64(h64, head).log_softmax(1)
    exact = (log_p.exp() * (log_p - log_q)).sum(1)
    ours = token_kl(h, h_ref, head)
    (grad,), (grad64,) = torch.autograd.grad(ours.sum(), h), torch.autograd.grad(exact.sum(), h64)
    exact, grad = exact.detach(), grad.double()
    assert 1e-6 < exact.mean() < 1e-3
    assert (ours.detach().double() - exact).abs().mean() < 0.1 * exact.mean()
    assert torch.cosine_similarity(grad, grad64, dim=1).median() > 0.98


def test_the_row_is_llmu() -> None:
    c = ObjectiveConfig("llmu")
    terms = {t.name: t for t in terms_of(c)}
    weights = {n: t.weight(c) for n, t in terms.items()}
    assert weights == {"ascent": c.eps1, "mismatch": c.eps2, "kl": c.eps3, "instead": c.eps2, "taught": c.eps5}
    assert {n: (t.role, t.span.name, t.reference, t.per) for n, t in terms.items()} == {
        "ascent": ("forget", "answer", False, ROWS),
        "mismatch": ("mismatch", "closed", False, TOKEN),
        "kl": ("retain", "all", True, TOKEN),
        "instead": ("instead", "closed", False, ROWS),  # these two where a run has other answers, whatever the row
        "taught": ("taught", "closed", False, ROWS),
    }


def test_the_floor_is_passed_on() -> None:
    s, _ = make()
    term = terms_of(ObjectiveConfig("llmu"))[0]
    assert torch.equal(term.loss(s, ObjectiveConfig(floor_nll=2.0)), ascent(s, 2.0))
