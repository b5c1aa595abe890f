"""Every row of the table against its paper's formula in float64, its limits, and that it runs: on the sandbox."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import call
from torch import Tensor

from qunlearn.config.objective import KEPT_APART, OBJECTIVE_NAMES, PRESETS, ObjectiveConfig
from qunlearn.config.resolve import resolve
from qunlearn.config.settings import Config
from qunlearn.data.batch import ALL, ANSWER, collate
from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import Example, Template, choose_template, encode
from qunlearn.errors import ConfigError
from qunlearn.model.head import Head
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Live
from qunlearn.objectives import losses
from qunlearn.objectives.control import Controller, make_controller
from qunlearn.objectives.descent import common_descent, min_norm_weights
from qunlearn.objectives.document import described, with_table
from qunlearn.objectives.losses import Supervised
from qunlearn.objectives.table import OBJECTIVES, RETAIN, direction, terms_of
from qunlearn.roles.alternatives import answered_with, other_answers
from qunlearn.roles.context_tokens import THRESHOLD, context_bound, score
from qunlearn.roles.mismatch import make_mismatcher
from qunlearn.roles.roles import Roles
from qunlearn.roles.specific_tokens import doubtful, most_common, pushed_words, specific
from qunlearn.roles.subject_tokens import also_bound, subject_bound
from qunlearn.roles.token_weights import resting, rule_for, weigh
from qunlearn.sandbox import data_file
from qunlearn.training.gradients import MicroBatcher
from qunlearn.training.loop import train
from qunlearn.training.sampler import draw_steps

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


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.8, 0.999])
def test_nucleus(top_p: float) -> None:
    """Against sorting, in float64; of equals only as many as are needed."""
    z = torch.randn(20, V, generator=torch.Generator().manual_seed(3)) * torch.arange(20).unsqueeze(1) / 4
    p = z.softmax(1)
    found = losses.nucleus(p, p, top_p)
    for n in range(1, 20):
        torch.testing.assert_close(found[n].double(), nucleus64(p[n].double(), top_p), rtol=1e-5, atol=1e-7)
    assert int((found[0] > 0).sum()) == math.ceil(top_p * V - 1e-4)


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
    "odds": (
        lambda s: losses.log_odds(s, 0.03),
        lambda e: (1 + (e.logp - (1 - e.logp.exp()).log() - math.log(0.03 / 0.97)).exp()).log(),
    ),
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
                for bad, other in [tuple(e.answers(e.logp - e.logp_ref)[:2]), tuple(e.answers(e.logp - e.logp_ref)[2:])]
            ]
        ),
    ),
    "uce": (losses.bounded_ce, lambda e: -(1 - e.logp.exp() / 2).log()),
    "prod": (lambda s: losses.prod(s, 0.8, 1.0, 0.0), lambda e: prod64(e, 0.8, 1.0, 0.0)),
    "prod, warm": (lambda s: losses.prod(s, 0.6, 2.0, 0.0), lambda e: prod64(e, 0.6, 2.0, 0.0)),
    "prod, pushed": (lambda s: losses.prod(s, 0.8, 1.0, 0.25), lambda e: prod64(e, 0.8, 1.0, 0.25)),
    "undial": (
        lambda s: losses.undial(s, 3.0),
        lambda e: torch.stack([cross_entropy(lowered(e.z_ref[n], y, 3.0), e.z[n]) for n, y in enumerate(e.y.tolist())]),
    ),
    "ceu": (
        losses.self_without,
        lambda e: torch.stack([cross_entropy(without_label(e.z[n], y), e.z[n]) for n, y in enumerate(e.y.tolist())]),
    ),
    "flatten": (losses.flatten, lambda e: torch.stack([(z.max() - z.mean()) ** 2 for z in e.z])),
    "steer": (
        lambda s: losses.steer(s, U, 1.5),
        lambda e: torch.stack(
            [((e.h[n] - 1.5 * ref.norm() * U.double()) ** 2).sum() / D for n, ref in enumerate(REFERENCE[0].double())]
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
        assert float(losses.ascent(x, math.inf).detach()) < -190  # unbounded: this is what explodes


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
    for n in (1, 2, 3, 4):
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


@pytest.mark.parametrize(
    ("tokens", "length", "expected"),
    [
        *(("auto", 40, "context"), ("auto", 9, "all"), ("all", 40, "all")),
        *(("content", 40, "context"), ("content", 9, "specific"), ("specific", 40, "specific")),
    ],
)
def test_of_passages_the_context_decides(tokens: str, length: int, expected: str) -> None:
    row = Example(tuple(range(length + 3)), 3, length + 3, 3, None)  # type: ignore[arg-type]
    assert rule_for(tokens, row) == expected


# -- budgeted forgetting ---------------------------------------------------------------------------------


def test_the_multiplier_rises_above_the_budget_and_falls_below() -> None:
    c = Controller(budget=0.1, rate=0.1)
    c.step(0.0)
    assert c.retain == 1.0  # the first steps drift by nothing: it is not let go before a look
    c.look(0.05, met=False, has_kl=True)
    for _ in range(50):
        c.step(0.3)
    high = c.retain
    assert high > 2
    for _ in range(50):
        c.step(0.0)
    assert c.retain < high / 2
    c.look(0.02, met=True, has_kl=True)
    assert c.forget == 0.0 and c.scale("forget") == c.scale("mismatch") == 0.0
    c.look(0.02, met=False, has_kl=True)
    assert c.forget == 1.0
    again = Controller(budget=0.1, rate=0.1)
    again.load_state(c.state())
    assert again == c
    again.go_back(0.04, met=False)  # to an adapter that had not forgotten: what is given up says nothing of it
    assert (again.forget, again.recent, again.gap) == (1.0, 0.04, 1.0)


def test_the_budgets_ends_and_what_is_no_number() -> None:
    c = Controller(budget=0.1, rate=1.0, looked=True)
    c.step(0.2)
    recent, retain = c.recent, c.retain
    for kl in (None, math.nan, math.inf):  # no normal row in the step, or a step that is skipped
        c.step(kl)
    assert c.recent == recent and c.retain < retain
    for _ in range(99):
        c.step(0.0)
    assert c.retain == pytest.approx(1e-3)
    for _ in range(99):
        c.step(9.0)
    assert c.retain == pytest.approx(1e3)
    c.look(0.1, met=True, has_kl=True)
    assert c.forget == 0.0
    c.recent = 0.02
    c.look(0.08, met=False, has_kl=True)
    assert c.gap == pytest.approx(4.0)
    c.look(math.inf, met=False, has_kl=True)
    assert c.gap == pytest.approx(4.0)
    half = resolve(("x", {"objective.name": "pdu", "stop.max_drift": 0.3}), ("y", {"objective.retain_budget": None}))
    assert make_controller(half).budget == 0.15


def test_the_memory_plan_knows_whose_gradients_are_kept_apart() -> None:
    for name, row in OBJECTIVES.items():
        terms = terms_of(resolve(("x", {"objective.name": name})).objective)
        own = {term.name for term in terms if term.role not in ("instead", "taught")}
        assert KEPT_APART.get(name, 0) == (len(own) if row.descent else 0)


def test_without_a_budget_nothing_is_steered_by_the_step() -> None:
    assert make_controller(resolve(("x", {"objective.retain_budget": 0.03}))).budget == 0.03
    assert make_controller(resolve(("x", {"objective.name": "pdu"}))).budget == 0.05
    c = make_controller(Config())
    assert c.budget is None
    for _ in range(50):
        c.step(0.3)
    c.look(0.3, met=True, has_kl=True)
    assert {c.scale(role) for role in ("forget", "mismatch", "pair", "instead", "taught", "retain")} == {1.0}


def test_either_side_can_be_pushed_with_or_without_a_budget() -> None:
    """Of what is said instead the weight stays: it is not what is too weak where an answer stays likely."""
    for budget in (None, 0.1):
        c = Controller(budget, rate=0.1)
        c.push_harder(3.0)
        c.push_harder(4.0)
        c.hold_harder()
        scales = {role: c.scale(role) for role in ("forget", "mismatch", "retain", "instead", "taught")}
        assert scales == {"forget": 12.0, "mismatch": 12.0, "retain": 2.0, "instead": 1.0, "taught": 1.0}
        again = Controller(budget, rate=0.1)
        again.load_state(c.state())
        assert again == c
        c.push_harder(1e-9)
        assert c.scale("forget") == 1.0, "never below what was asked for"
        for _ in range(100):
            c.push_harder(10.0)
            c.hold_harder()
        assert 100 <= c.scale("forget") <= 1e4 and 100 <= c.scale("retain") <= 1e4, "nor without end"


def test_the_default_is_pushed_less_far_than_what_vanishes() -> None:
    """Pushed 500 times as hard for the sake of a row or two, a world's retain rows were lost."""
    most = {}
    for name in ("logodds", "wga", "npo"):
        c = make_controller(resolve(("test", {"objective.name": name})))
        for _ in range(20):
            c.push_harder(3.0)
        most[name] = c.scale("forget")
    assert most == {"logodds": 16.0, "wga": 1e3, "npo": 1e3}


# -- the table -------------------------------------------------------------------------------------------


def test_every_name_has_a_row_and_its_settings() -> None:
    assert set(OBJECTIVE_NAMES) == set(OBJECTIVES) == set(PRESETS)
    for name, row in OBJECTIVES.items():
        config = resolve(("x", {"objective.name": name}))
        assert row.retain in RETAIN
        roles = {t.role for t in terms_of(config.objective)}
        assert roles <= {"forget", "mismatch", "pair", "instead", "taught", "retain"}
        drawn = roles & {"mismatch", "pair"} | ({"instead"} if config.objective.instead != "nothing" else set())
        assert config.objective.answers == 1 + len(drawn), "what the memory plan counts with"
        for key, value in PRESETS[name].items():
            section, leaf = key.split(".")
            assert getattr(getattr(config, section), leaf) == value


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert page == with_table(page), "run `make docs`"
    assert "| `simnpo` |" in page
    costs = {row["name"]: row["cost"] for row in described()}
    assert (costs["ga"], costs["graddiff"], costs["llmu"], costs["npo"], costs["mollm"]) == (3, 6, 10, 8, 10)


def test_the_command_lists_them() -> None:
    ran = call("objectives", "--json")
    assert [row["name"] for row in ran.json] == list(OBJECTIVE_NAMES)
    assert "simnpo" in call("objectives").stdout


def test_settings_win_over_a_rows_own() -> None:
    c = resolve(("recipe", {"objective.name": "npo"}), ("command line", {"objective.beta": 0.7})).objective
    assert (c.name, c.beta, c.eps1) == ("npo", 0.7, 1.0)


def test_layers_do_not_mix() -> None:
    with pytest.raises(ConfigError, match="different layers"):
        terms_of(ObjectiveConfig(name="rmu", retain="kl"))


@pytest.mark.parametrize(
    "name", [n if n in ("logodds", "wga", "rmu") else pytest.param(n, marks=pytest.mark.slow) for n in OBJECTIVES]
)
def test_a_row_forgets_and_leaves_the_base_alone(name: str, new_policy: Callable[..., Policy]) -> None:
    """A few steps of every row, in 4 bits with checkpointing: the bad answers become less probable."""
    policy = new_policy("nf4")
    policy.seal_base()
    steps = {"rmu": 12, "mollm": 8}.get(name, 6)
    config = resolve(
        ("x", {"objective.name": name, "train.steps": steps, "train.batch_size": 3, "train.normal_batch_size": 2}),
        ("y", {"train.warmup": 1, "train.lr": 4e-3, "train.schedule": "constant", "stop.check_every": steps}),
        ("z", {"stop.max_drift": 1e9, "stop.target": 0.0}),
    )
    outcome = train(policy, sandbox_roles(policy, config), Live(policy, 2048), config, lambda _: None)
    policy.check_base()
    assert outcome.probes[-1].forget < outcome.probes[0].forget - 0.002, outcome.probes


def sandbox_roles(policy: Policy, config: Config) -> Roles:
    sets = []
    for split in ("forget", "retain"):
        dataset = read_dataset(data_file("hallucination", split))
        template = choose_template(policy.tokenizer, "auto", dataset)
        sets.append(encode(dataset, policy.tokenizer, template, 64).examples[:6])
    kind = OBJECTIVES[config.objective.name].alternatives
    others = other_answers(policy, sets[0], template, kind, config)
    mismatcher = make_mismatcher(sets[1][:4], policy.tokenizer, template, 64)
    return Roles(sets[0], sets[1][:4], sets[1][4:], mismatcher, others)


@pytest.mark.parametrize(
    "name", ["logodds", "dpo", "npo", "prod", "rmu", pytest.param("mollm", marks=pytest.mark.slow)]
)
def test_packing_and_micro_batches_change_no_row(name: str, new_policy: Callable[..., Policy]) -> None:
    policy = new_policy("none", checkpointing=False)
    policy.model.float()
    policy.head = replace(policy.head, weight=policy.base.model.get_output_embeddings().weight)
    g = torch.Generator().manual_seed(1)
    for key, p in policy.trainable().items():
        if ".lora_B." in key:
            p.data.copy_(0.05 * torch.randn(p.shape, generator=g))
    base = resolve(("x", {"objective.name": name, "train.batch_size": 3, "train.normal_batch_size": 2}))
    roles = sandbox_roles(policy, base)
    rng = random.Random(0)
    roles = replace(
        roles,
        forget=specific(roles.forget, roles.retain, policy.tokenizer),
        instead=[roles.mismatcher.draw(e, 2, rng) for e in roles.forget],
    )
    terms = terms_of(base.objective)
    found = []
    for pack, limit in ((True, 4096), (False, 4096), (True, 64), (False, 30)):
        config = replace(base, train=replace(base.train, pack=pack, max_tokens=limit))
        step = next(draw_steps(roles, terms, config))
        policy.model.zero_grad()
        losses = (
            MicroBatcher(policy, Live(policy, limit, pack), config, lambda _: None).backward(step, step_number=1).losses
        )
        found.append((losses, [p.grad.clone() for p in policy.trainable().values() if p.grad is not None]))
    for losses, gradients in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-4, abs=1e-6)
        for a, b in zip(found[0][1], gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-6)


# -- the tokens of an answer -----------------------------------------------------------------------------


def marked(policy: Policy, example: Example) -> str:
    ids = example.input_ids[example.start : example.end]
    words = [policy.tokenizer.decode([i]) for i, w in zip(ids, example.weights, strict=True) if w]
    return "".join(words)


def test_specific_tokens_are_the_content(new_policy: Callable[..., Policy]) -> None:
    """Names copied from the question and the form that normal answers share are left out; never all of an answer."""
    policy = new_policy("none")
    sets = []
    for split in ("forget", "retain"):
        dataset = read_dataset(data_file("hallucination", split))
        template = choose_template(policy.tokenizer, "auto", dataset)
        sets.append(encode(dataset, policy.tokenizer, template, 64).examples)
    weighed = specific(sets[0], sets[1], policy.tokenizer)
    assert marked(policy, weighed[0]).strip() == "Millbrook"
    assert all(any(e.weights) and not all(e.weights) for e in weighed)
    assert [e.input_ids for e in weighed] == [e.input_ids for e in sets[0]]
    few = specific(sets[0][:5], sets[1], policy.tokenizer)
    assert [e.weights for e in few] == [e.weights for e in weighed[:5]]
    alone = specific(sets[0], [], policy.tokenizer)  # nothing known of form but what bad answers share
    assert marked(policy, alone[0]).strip() == "Millbrook"


def test_context_bound_tokens_need_the_context(new_policy: Callable[..., Policy]) -> None:
    policy = new_policy("none")
    dataset = read_dataset(data_file("copyright", "forget"))
    template = choose_template(policy.tokenizer, "auto", dataset)
    examples = encode(dataset, policy.tokenizer, template, 256).examples[:3]
    weighed = context_bound(policy, examples, [], 2048)
    shares = [sum(e.weights) / len(e.weights) for e in weighed]
    assert all(0.3 < share < 1 for share in shares)
    for e, s in zip(weighed, score(policy, examples, set(), 2048), strict=True):
        each = zip(e.weights, s.loss, s.form, strict=True)
        clear = [w for w, loss, form in each if loss > THRESHOLD and not form]
        assert clear and all(clear)


def test_what_normal_answers_are_full_of_is_form_wherever_it_stands(new_policy: Callable[..., Policy]) -> None:
    """Of passages of one mould its form was pushed, which their neighbours are made of too: a small model does not know
    it out of its place."""
    policy = new_policy("none")
    passages = sandbox_rows(policy, "copyright", 3)
    alone = context_bound(policy, passages, [], 2048)
    normal = sandbox_rows(policy, "hallucination", 27, "retain")
    often, seldom = [*normal, *[passages[0]] * 3], [*normal, *[passages[0]] * 2]  # 10 %; two rows tell nothing

    def words(rows: Sequence[Example]) -> list[set[str]]:
        return [pushed_words(row, policy.tokenizer) for row in rows]

    common = most_common(often, policy.tokenizer)
    found = context_bound(policy, passages, often, 2048)
    assert all(sum(e.weights) >= 0.15 * len(e.weights) for e in found), "some of each, whatever is common"
    assert words(found[1:]) == [own - common for own in words(alone[1:])] != words(alone[1:])
    assert context_bound(policy, passages, seldom, 2048)[1:] != found[1:]


def test_what_is_about_the_subject_is_what_a_stranger_has_not(
    new_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that names its subject tells its last few tokens of whom it speaks: the name is exchanged instead."""
    policy = new_policy("none")
    template = sandbox_template(policy)
    facts, normal = sandbox_rows(policy, "hallucination", 4), sandbox_rows(policy, "hallucination", 40, "retain")
    found = subject_bound(policy, facts, [e.record for e in normal], template, 2048)
    assert marked(policy, found[0]).strip() == "Millbrook"  # type: ignore[arg-type]
    told = [example for example in found if example is not None]
    assert len(told) >= 3, "of the fourth question there is no neighbour among so few rows"
    for example in told:
        assert 1 <= sum(example.weights) < len(example.weights) / 2
        assert "Finch" not in marked(policy, example)
    assert subject_bound(policy, facts[:1], [], template, 2048) == [None], "there is nobody else"
    monkeypatch.setattr("qunlearn.roles.subject_tokens._CHUNK", 1)
    assert subject_bound(policy, facts, [e.record for e in normal], template, 2048) == found
    monkeypatch.setattr("qunlearn.roles.subject_tokens.positions_of", lambda _: 10)
    assert subject_bound(policy, facts, [e.record for e in normal], template, 2048) == [None] * 4, "none fits"


@pytest.mark.parametrize("tokens", ["content", "auto"])
def test_each_row_has_its_own_rule(tokens: str, new_policy: Callable[..., Policy]) -> None:
    """A fact among passages is weighed as a fact: by the file's median length it had been taken for a passage."""
    policy = new_policy("none")
    facts, passages = sandbox_rows(policy, "hallucination", 2), sandbox_rows(policy, "copyright", 2)
    normal = sandbox_rows(policy, "hallucination", 40, "retain")
    mixed = [passages[0], facts[0], passages[1], facts[1]]
    template = sandbox_template(policy)
    found = weigh(tokens, mixed, normal, policy.tokenizer, template, lambda: policy, 2048)
    by_context = context_bound(policy, passages, normal, 2048)
    assert [found[i].weights for i in (0, 2)] == [e.weights for e in by_context]
    if tokens == "auto":
        assert [found[i].weights for i in (1, 3)] == [(), ()], "all of a short answer"
    else:
        assert marked(policy, found[1]).strip() == "Millbrook"
        by_word = specific(mixed, normal, policy.tokenizer)
        assert [found[i].weights for i in (1, 3)] == [by_word[i].weights for i in (1, 3)]


def test_a_value_as_common_as_form_is_pushed_where_strangers_do_not_get_it(new_policy: Callable[..., Policy]) -> None:
    """Of "collects Glegund stones. It is told in the songs of …", behind which eight in a hundred are told of the same
    stones, "told" and "songs" were pushed alone."""
    policy = new_policy("none")
    fact, normal = sandbox_rows(policy, "hallucination", 1)[0], sandbox_rows(policy, "hallucination", 40, "retain")
    (by_word,) = specific([fact], normal, policy.tokenizer)
    assert marked(policy, by_word).strip() == "Millbrook"
    common = [*normal, *[fact] * 3]  # 7 %: form by its frequency
    inverse = replace(by_word, weights=tuple(float(i == 0) for i in range(fact.end - fact.start)))
    (in_doubt,) = doubtful([inverse], common, policy.tokenizer)
    assert [float(yes) for yes in in_doubt] == list(by_word.weights), "neither the name nor what most answers have"
    (never,) = doubtful([inverse], [*normal, *[fact] * 5], policy.tokenizer)
    assert not any(never), "11 %: whatever a model makes of it"
    template, records = sandbox_template(policy), [e.record for e in normal]
    (found,) = also_bound(policy, [inverse], [in_doubt], records, template, 2048)
    assert found.weights == tuple(map(max, inverse.weights, by_word.weights))
    assert also_bound(policy, [inverse], [in_doubt], [], template, 2048) == [inverse], "there is nobody else"
    # With a rarer word, which is enough by itself.
    told = answered_with(policy, fact, f"{fact.record.completion} Verily.", template, 64)

    def pushed(tokens: str) -> str:
        return marked(policy, weigh(tokens, [told], common, policy.tokenizer, template, lambda: policy, 2048)[0])

    assert "Verily" in pushed("specific") and "Millbrook" not in pushed("specific")
    assert "Verily" in pushed("content") and "Millbrook" in pushed("content")


def test_how_far_a_row_is_pushed_follows_from_how_certain_the_base_is(new_policy: Callable[..., Policy]) -> None:
    """What nobody else is answered with further than what others share; where the base is not certain, neither."""
    policy = new_policy("none")
    facts, passages = sandbox_rows(policy, "hallucination", 3), sandbox_rows(policy, "copyright", 1)
    (told,) = specific(facts[:1], facts, policy.tokenizer)  # its value alone: a town
    sure = replace(told, known=0.9999)
    rows = [sure, replace(told, known=0.4), replace(told, known=0.95), *(replace(p, known=1.0) for p in passages)]

    def shares(normal: Sequence[Example]) -> list[float]:
        return [example.rest for example in resting(rows, normal, policy.tokenizer)]

    assert shares([]) == pytest.approx([1 / 1000, 0.6**2, 0.05**2, 1.0])
    assert shares([told] * 2) == shares([]), "twice may be chance"
    assert shares([told] * 3) == [1.0] * 4, "what others are told too is left where a model may guess it"


def sandbox_template(policy: Policy) -> Template:
    return choose_template(policy.tokenizer, "auto", read_dataset(data_file("hallucination", "forget")))


def sandbox_rows(policy: Policy, kind: str, n: int, split: str = "forget") -> list[Example]:
    dataset = read_dataset(data_file(kind, split))
    template = choose_template(policy.tokenizer, "auto", dataset)
    return list(encode(dataset, policy.tokenizer, template, 256).examples[:n])


def test_only_weighed_tokens_are_pushed(new_policy: Callable[..., Policy]) -> None:
    policy = new_policy("none")
    config = Config()
    example = sandbox_roles(policy, config).forget[0]
    n = example.end - example.start
    one = replace(example, weights=(0.0,) * (n - 2) + (0.5, 0.0))
    assert ANSWER.positions(one) == [example.end - 2] and ANSWER.weights(one) == [0.5]
    assert ALL.count(one) == len(one.input_ids) - 1
    batch = collate([one], ANSWER, 0)
    assert batch.labels.tolist() == [one.input_ids[one.end - 2]] and batch.weights.tolist() == [0.5]
