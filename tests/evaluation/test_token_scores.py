"""Per-token scores against the whole distribution in float64."""

from __future__ import annotations

import pytest
import torch

from qunlearn.evaluation import token_scores as head_scores
from qunlearn.evaluation.token_scores import token_scores
from qunlearn.model.head import Head

N, D, V = 11, 6, 29


@pytest.mark.parametrize(("bias", "cap"), [(False, None), (True, 4.0)])
@pytest.mark.parametrize("tile_rows", [1, 4, 100])
def test_token_scores(monkeypatch: pytest.MonkeyPatch, bias: bool, cap: float | None, tile_rows: int) -> None:
    monkeypatch.setattr(head_scores, "_TILE_LOGITS", tile_rows * V)
    g = torch.Generator().manual_seed(1)
    head = Head(torch.randn(V, D, generator=g), torch.randn(V, generator=g) if bias else None, 1.0, cap)
    h = torch.randn(N, D, generator=g)
    z = h.double() @ head.weight.double().T + (head.bias.double() if head.bias is not None else 0)
    z = cap * torch.tanh(z / cap) if cap else z
    labels = torch.randint(V, (N,), generator=g)
    labels[:3] = z[:3].argmax(1)
    found = token_scores(h, labels, head)
    for i in range(N):
        p = z[i].exp() / z[i].exp().sum()
        mean = float((p * p.log()).sum())
        variance = float((p * p.log() ** 2).sum()) - mean**2
        assert float(found.logps[i]) == pytest.approx(float(p[labels[i]].log()), abs=1e-5)
        assert float(found.means[i]) == pytest.approx(mean, abs=1e-5)
        assert float(found.stds[i]) == pytest.approx(variance**0.5, abs=1e-5)
        assert bool(found.hits[i]) == (int(z[i].argmax()) == int(labels[i]))
    assert found.hits[:3].all()
    assert not found.hits.all()


def test_no_tokens_and_tokens_ruled_out() -> None:
    head = Head(torch.randn(V, D), None)
    assert token_scores(torch.zeros(0, D), torch.zeros(0, dtype=torch.long), head).logps.shape == (0,)
    ruled_out = torch.full((V,), float("-inf"))
    ruled_out[:2] = 0.0
    found = token_scores(torch.zeros(1, D), torch.tensor([1]), Head(torch.zeros(V, D), ruled_out))
    assert float(found.logps[0]) == pytest.approx(-0.693147, abs=1e-5)
    assert float(found.stds[0]) == pytest.approx(0.0, abs=1e-5)
    assert bool(found.hits[0])  # a tie for the first place counts


def test_memory_does_not_grow_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor with the vocabulary's width has more rows than a tile."""
    monkeypatch.setattr(head_scores, "_TILE_LOGITS", 8 * V)
    seen: list[int] = []
    real = Head.logits

    def logits(self: Head, h: torch.Tensor) -> torch.Tensor:
        seen.append(h.shape[0])
        return real(self, h)

    monkeypatch.setattr(Head, "logits", logits)
    token_scores(torch.randn(50, D), torch.zeros(50, dtype=torch.long), Head(torch.randn(V, D), None))
    assert max(seen) == 8
    assert sum(seen) == 50
