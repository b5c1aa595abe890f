"""Every row of the table against its paper's formula in float64, its limits, and that it runs: on the sandbox."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import call
from qunlearn.config import OBJECTIVE_NAMES, PRESETS, Config, ObjectiveConfig, resolve
from qunlearn.errors import ConfigError
from qunlearn.model.head import Head
from qunlearn.objectives import losses
from qunlearn.objectives.control import Controller, make_controller
from qunlearn.objectives.descent import common_descent, min_norm_weights
from qunlearn.objectives.losses import Supervised
from qunlearn.objectives.table import OBJECTIVES, RETAIN, direction, terms_of

LENGTHS = (3, 4, 2, 4)  # four answers
N, D, V = sum(LENGTHS), 8, 31


@pytest.fixture
def s() -> Supervised:
    g = torch.Generator().manual_seed(5)
    head = Head(torch.randn(V, D, generator=g), None)
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    return Supervised(
        torch.randn(N, D, generator=g).requires_grad_(),
        torch.randn(N, D, generator=g),
        torch.randint(V, (N,), generator=g),
        head,
        0.5 + torch.rand(N, generator=g),
        owner,
    )


class Exact:
    """The same positions in float64, with whole logits."""

    def __init__(self, s: Supervised) -> None:
        weight = s.head.weight.double()
        self.h = s.h.detach().double().requires_grad_()
        self.z, self.z_ref = self.h @ weight.T, s.reference.double() @ weight.T
        assert s.weights is not None
        self.y, self.w = s.labels, s.weights.double()
        self.logp = torch.stack([self.z[n, y] - self.z[n].exp().sum().log() for n, y in enumerate(s.labels.tolist())])
        self.logp_ref = torch.stack(
            [self.z_ref[n, y] - self.z_ref[n].exp().sum().log() for n, y in enumerate(s.labels.tolist())]
        )

    def answers(self, values: Tensor) -> list[Tensor]:
        at, out = 0, []
        for n in LENGTHS:
            out.append((self.w[at : at + n] * values[at : at + n]).sum())
            at += n
        return out


def log_sigmoid(x: Tensor) -> Tensor:
    return -(1 + (-x).exp()).log()


def cross_entropy(target: Tensor, z: Tensor) -> Tensor:
    return -(target * (z - z.exp().sum().log())).sum()


def nucleus64(p: Tensor, top_p: float) -> Tensor:
    order = sorted(range(V), key=lambda v: -float(p[v]))
    kept, mass = [], 0.0
    for v in order:
        kept.append(v)
        mass += float(p[v])
        if mass >= top_p:
            break
    q = torch.zeros_like(p)
    q[kept] = p[kept] / p[kept].sum()
    return q


def prod64(e: Exact, top_p: float, temperature: float, alpha: float) -> Tensor:
    out = []
    for n, y in enumerate(e.y.tolist()):
        z = e.z_ref[n].clone()
        p_y = z.softmax(0)[y]
        z[y] = -math.inf
        inside = nucleus64(z.softmax(0), top_p) > 0
        q = torch.where(inside, z / temperature, torch.full_like(z, -math.inf)).softmax(0)
        q[y] = -alpha * p_y
        out.append(cross_entropy(q, e.z[n]))
    return torch.stack(out)


def without_label(z: Tensor, y: int) -> Tensor:
    z = z.detach().clone()
    z[y] = -math.inf
    return z.softmax(0)


def lowered(z: Tensor, y: int, beta: float) -> Tensor:
    z = z.clone()
    z[y] -= beta
    return z.softmax(0)


U = direction(D, 0)
CASES: dict[str, tuple[Callable[[Supervised], Tensor], Callable[[Exact], Tensor]]] = {
    "ascent": (lambda s: losses.ascent(s, math.inf), lambda e: e.logp),
    "wga": (lambda s: losses.weighted_ascent(s, 2.0), lambda e: e.logp.detach().exp() ** 2 * e.logp),
    "satimp": (
        lambda s: losses.saturation_importance(s, 2.0, 0.5),
        lambda e: e.logp.detach().exp() ** 2 * (1 - e.logp.detach().exp()) ** 0.5 * e.logp,
    ),
    "npo": (
        lambda s: losses.npo(s, 0.3),
        lambda e: torch.stack([-2 / 0.3 * log_sigmoid(-0.3 * r) for r in e.answers(e.logp - e.logp_ref)]),
    ),
    "simnpo": (
        lambda s: losses.simnpo(s, 2.5, 0.4),
        lambda e: torch.stack(
            [
                -2 / 2.5 * log_sigmoid(2.5 * (nll / n - 0.4))
                for nll, n in zip(e.answers(-e.logp), e.answers(torch.ones_like(e.logp)), strict=True)
            ]
        ),
    ),
    "preference": (
        lambda s: losses.preference(s, 0.2),
        lambda e: torch.stack(
            [
                -2 / 0.2 * log_sigmoid(0.2 * (other - bad))
                for bad, other in [
                    tuple(e.answers(e.logp - e.logp_ref)[:2]),
                    tuple(e.answers(e.logp - e.logp_ref)[2:]),
                ]
            ]
        ),
    ),
    "uce": (losses.bounded_ce, lambda e: -(1 - e.logp.exp() / 2).log()),
    "prod": (lambda s: losses.prod(s, 0.8, 1.0, 0.0), lambda e: prod64(e, 0.8, 1.0, 0.0)),
    "prod, warm": (lambda s: losses.prod(s, 0.6, 2.0, 0.0), lambda e: prod64(e, 0.6, 2.0, 0.0)),
    "prod, pushed": (lambda s: losses.prod(s, 0.8, 1.0, 0.25), lambda e: prod64(e, 0.8, 1.0, 0.25)),
    "undial": (
        lambda s: losses.undial(s, 3.0),
        lambda e: torch.stack(
            [cross_entropy(lowered(e.z_ref[n], y, 3.0), e.z[n]) for n, y in enumerate(e.y.tolist())]
        ),
    ),
    "ceu": (
        losses.self_without,
        lambda e: torch.stack([cross_entropy(without_label(e.z[n], y), e.z[n]) for n, y in enumerate(e.y.tolist())]),
    ),
    "flatten": (losses.flatten, lambda e: torch.stack([(z.max() - z.mean()) ** 2 for z in e.z])),
    "steer": (
        lambda s: losses.steer(s, U, 1.5),
        lambda e: torch.stack(
            [
                ((e.h[n] - 1.5 * ref.norm() * U.double()) ** 2).sum() / D
                for n, ref in enumerate(REFERENCE[0].double())
            ]
        ),
    ),
    "hold": (
        losses.hold,
        lambda e: torch.stack([((e.h[n] - ref) ** 2).sum() / D for n, ref in enumerate(REFERENCE[0].double())]),
    ),
}
REFERENCE: list[Tensor] = []


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_its_papers(name: str, s: Supervised) -> None:
    REFERENCE[:] = [s.reference]
    ours, theirs = CASES[name][0](s), None
    e = Exact(s)
    theirs = CASES[name][1](e)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)
    upstream = torch.rand(len(ours), generator=torch.Generator().manual_seed(1))
    (g,) = torch.autograd.grad((ours * upstream).sum(), s.h)
    (g64,) = torch.autograd.grad((theirs * upstream.double()).sum(), e.h)
    torch.testing.assert_close(g.double(), g64, rtol=2e-4, atol=2e-5)


# -- limits ----------------------------------------------------------------------------------------------


def test_npo_becomes_ascent_as_beta_falls(s: Supervised) -> None:
    """grad NPO -> grad sum log p (arXiv 2404.05868, Prop. 1)."""
    (npo,) = torch.autograd.grad(losses.npo(s, 1e-5).sum(), s.h)
    (ga,) = torch.autograd.grad(s.answer_sums(losses.ascent(s, math.inf)).sum(), s.h)
    torch.testing.assert_close(npo, ga, rtol=1e-3, atol=1e-5)


def test_values_at_the_start(s: Supervised) -> None:
    """Policy = reference: NPO and DPO are 2/beta log 2, KL and hold 0."""
    start = replace(s, h=s.reference.clone().requires_grad_())
    two = torch.full((4,), 2 / 0.1 * math.log(2))
    torch.testing.assert_close(losses.npo(start, 0.1), two)
    torch.testing.assert_close(losses.preference(start, 0.1), two[:2])
    assert losses.reference_kl(start).abs().max() < 1e-5
    assert float(losses.hold(start).sum().detach()) == 0.0


def sure(logit: float) -> Supervised:
    """One token of 31 with a logit that much above all others."""
    head = Head(torch.eye(V, D), None)
    h = torch.zeros(1, D)
    h[0, 0] = logit
    return Supervised(h.requires_grad_(), h.detach().clone(), torch.tensor([0]), head, torch.ones(1), torch.tensor([0]))


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_losses_are_finite_where_ascent_blows_up(logit: float) -> None:
    x = sure(logit)
    bounded: dict[str, Callable[[Supervised], Tensor]] = {
        "npo": lambda s: losses.npo(s, 0.1),
        "uce": losses.bounded_ce,
        "wga": lambda s: losses.weighted_ascent(s, 1.0),
        "prod": lambda s: losses.prod(s, 0.8, 1.0, 0.0),
        "undial": lambda s: losses.undial(s, 10.0),
        "ceu": losses.self_without,
    }
    for name, loss in bounded.items():
        value = loss(x)
        (g,) = torch.autograd.grad(value.sum(), x.h)
        assert torch.isfinite(value).all() and torch.isfinite(g).all(), name
    if logit < 0:
        assert float(losses.ascent(x, math.inf)) < -190  # unbounded: this is what explodes


def test_bounded_ce_is_bounded_and_rests_at_zero() -> None:
    assert float(losses.bounded_ce(sure(200.0))) == pytest.approx(math.log(2), rel=1e-5)
    x = sure(-200.0)
    (g,) = torch.autograd.grad(losses.bounded_ce(x).sum(), x.h)
    assert float(g.abs().max()) < 1e-8


def test_weights_scale_what_an_answer_says(s: Supervised) -> None:
    assert s.weights is not None
    doubled = replace(s, weights=2 * s.weights)
    torch.testing.assert_close(losses.npo(doubled, 0.1), losses.npo(s, 0.2) * 2, rtol=1e-5, atol=1e-5)
    # A length-normalised method does not care.
    torch.testing.assert_close(losses.simnpo(doubled, 0.1, 0.0), losses.simnpo(s, 0.1, 0.0))


# -- the common descent direction ------------------------------------------------------------------------


def test_min_norm_weights_are_the_minimum() -> None:
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 3):
        for _ in range(20):
            vectors = torch.randn(n, 4, generator=g, dtype=torch.float64)
            gram = vectors @ vectors.T
            found = torch.tensor(min_norm_weights(gram), dtype=torch.float64)
            assert float(found.sum()) == pytest.approx(1) and float(found.min()) >= 0
            value = float(found @ gram @ found)
            others = torch.distributions.Dirichlet(torch.ones(n, dtype=torch.float64)).sample((4000,))
            assert value <= float((others @ gram * others).sum(1).min()) + 1e-9


def test_the_direction_descends_for_every_loss() -> None:
    g = torch.Generator().manual_seed(2)
    gradients = [[torch.randn(3, 2, generator=g) * size, torch.randn(4, generator=g) * size] for size in (1e-6, 1, 50)]
    mixed, shares = common_descent(gradients)
    assert sum(shares) == pytest.approx(1)
    for of_loss in gradients:
        assert sum(float((d * x).sum()) for d, x in zip(mixed, of_loss, strict=True)) > 0


def test_a_loss_without_a_gradient_has_no_say() -> None:
    """At the first step the KL to the base has none, and the plain min-norm point would be 0."""
    one, none = [torch.tensor([3.0, 4.0])], [torch.zeros(2)]
    mixed, shares = common_descent([one, none])
    assert shares == [1.0, 0.0]
    torch.testing.assert_close(mixed[0], torch.tensor([0.6, 0.8]))


# -- budgeted forgetting ---------------------------------------------------------------------------------


def test_the_multiplier_rises_above_the_budget_and_falls_below() -> None:
    c = Controller(budget=0.1, target=0.05, rate=0.1)
    for _ in range(50):
        c.step(0.3)
    high = c.retain
    assert high > 2
    for _ in range(50):
        c.step(0.0)
    assert c.retain < high / 2
    c.look(0.01, 0.02, has_kl=True)
    assert c.forget == 0.0 and c.scale("forget") == c.scale("mismatch") == 0.0
    c.look(0.5, 0.02, has_kl=True)
    assert c.forget == 1.0
    again = Controller(budget=0.1, target=0.05, rate=0.1)
    again.load_state(c.state())
    assert again == c


def test_a_budget_makes_a_controller() -> None:
    assert make_controller(Config()) is None
    assert make_controller(resolve(("x", {"objective.retain_budget": 0.03}))) is not None
    assert make_controller(resolve(("x", {"objective.name": "pdu"}))) is not None


# -- the table -------------------------------------------------------------------------------------------


def test_every_name_has_a_row_and_its_settings() -> None:
    assert set(OBJECTIVE_NAMES) == set(OBJECTIVES) == set(PRESETS)
    for name, row in OBJECTIVES.items():
        config = resolve(("x", {"objective.name": name})).objective
        assert row.retain in RETAIN
        assert {t.role for t in terms_of(config)} <= {"forget", "mismatch", "pair", "retain"}
        for key, value in PRESETS[name].items():
            assert getattr(config, key) == value


def test_settings_win_over_a_rows_own() -> None:
    c = resolve(("recipe", {"objective.name": "npo"}), ("command line", {"objective.beta": 0.7})).objective
    assert (c.name, c.beta, c.eps1) == ("npo", 0.7, PRESETS["npo"]["eps1"])


def test_layers_do_not_mix() -> None:
    with pytest.raises(ConfigError, match="different layers"):
        terms_of(ObjectiveConfig(name="rmu", retain="kl"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_forgets_on_the_sandbox(name: str, tmp_path: Any) -> None:
    """A few steps of every row: the bad answers become less probable, the base stays bit-identical (checked inside)."""
    steps = {"mollm": 14, "rmu": 30, "pdu": 20, "ga": 6}.get(name, 10)
    ran = call(
        "forget", "--model", "sandbox", "--bad", "sandbox:hallucination/forget", "--normal", "sandbox:hallucination/retain",
        "--objective", name, "--steps", steps, "--set", "stop.max_drift=100", "--set", "train.warmup=2",
        "--set", f"stop.check_every={steps}", "--set", "stop.table_rows=8", "--set", "stop.probe_rows=8",
        "--set", "stop.target=0", "-o", tmp_path / "run", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.stderr
    looks = ran.json["training"]["probes"]
    assert looks[-1]["forget"] < looks[0]["forget"] - 0.002, looks
