"""The default objective: log odds in float64 where a model is certain, their floor, and a step of all its terms."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_objectives import sandbox_roles
from torch import Tensor

from qunlearn.config.objective import ObjectiveConfig
from qunlearn.config.resolve import resolve
from qunlearn.config.settings import Config
from qunlearn.data.tokenize import Example
from qunlearn.model.head import Head, token_log_odds, token_logps
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Live
from qunlearn.objectives.losses import Supervised, log_odds, log_odds_at, weighted_ascent
from qunlearn.objectives.table import OBJECTIVES, terms_of
from qunlearn.roles.specific_tokens import specific
from qunlearn.training.gradients import backward
from qunlearn.training.loop import train
from qunlearn.training.outcome import Outcome
from qunlearn.training.sampler import draw_steps

V, D = 31, 31
CERTAIN = 1 - 1e-9


def told(*probabilities: float) -> Supervised:
    """One position for each probability of its label, all other tokens alike: the logits are the states themselves."""
    h = torch.zeros(len(probabilities), D)
    labels = torch.arange(len(probabilities)) % V
    for n, p in enumerate(probabilities):
        h[n, labels[n]] = math.log(p) - math.log1p(-p) + math.log(V - 1)
    return Supervised(h.requires_grad_(), None, labels, Head(torch.eye(V, D), None))


def odds64(s: Supervised) -> tuple[Tensor, Tensor]:
    """Log odds as z_y less the log of the sum over the others, in float64; and the states they are of."""
    h = s.h.detach().double().requires_grad_()
    z = h @ s.head.weight.double().T
    others = [torch.stack([z[n, v].exp() for v in range(V) if v != y]).sum().log() for n, y in enumerate(s.labels)]
    return torch.stack([z[n, y] - other for n, (y, other) in enumerate(zip(s.labels, others, strict=True))]), h


def gradient(value: Tensor, h: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value.sum(), h, retain_graph=True)
    return found


@pytest.mark.parametrize("p", [1e-9, 0.03, 0.5, 0.999, CERTAIN])
def test_log_odds_are_exact_however_certain_the_model_is(p: float) -> None:
    s = told(p, p, p)
    exact, h = odds64(s)
    assert exact.tolist() == pytest.approx([math.log(p) - math.log1p(-p)] * 3, rel=1e-6, abs=1e-6)
    ours = token_log_odds(s.h, s.labels, s.head)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient(ours, s.h).double(), gradient(exact, h), rtol=1e-5, atol=1e-6)
    loss = (1 + (exact - math.log(0.03 / 0.97)).exp()).log()
    torch.testing.assert_close(log_odds(s, 0.03).double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(log_odds(s, 0.03), s.h).double(), gradient(loss, h), rtol=1e-5, atol=1e-6)


def test_the_gradient_does_not_vanish_where_the_model_is_certain() -> None:
    """That of log p, and of every objective made of it, does: in fp32 log p itself is 0 there."""
    s = told(0.9, 0.999, CERTAIN)
    ours = gradient(log_odds(s, 0.03), s.h).norm(dim=1)
    assert float(ours.min()) > 0.95
    assert token_logps(s.h, s.labels, s.head)[2] == 0
    theirs = gradient(weighted_ascent(s, 0.5), s.h).norm(dim=1)
    assert theirs[0] > 50 * theirs[1] and theirs[2] < 1e-7


def test_rest_is_each_rows_share_of_it() -> None:
    """A row of share s is left in peace as all are where `rest` is s times as large."""
    s, shares = told(0.5, 0.5, 0.5), (1.0, 1 / 15, 1 / 1000)
    ours = log_odds(replace(s, rest=torch.tensor(shares)), 0.03)
    alone = [log_odds(s, 0.03 * share)[i] for i, share in enumerate(shares)]
    torch.testing.assert_close(ours, torch.stack(alone))
    assert OBJECTIVES["logodds"].forget[0].met(0.05, 1 / 15, ObjectiveConfig()) == log_odds_at(0.05, 0.002)  # type: ignore[misc]


def test_the_gradient_fades_out_below_rest() -> None:
    """At rest it is half of what it is above, and below it as little as the odds are smaller: it is left in peace."""
    rest = 0.03
    s = told(0.5, rest, rest / 10, rest / 100, 1e-6)
    size = gradient(log_odds(s, rest), s.h).norm(dim=1)
    assert float(size[1] / size[0]) == pytest.approx(0.5 / (1 / (1 + 0.03 / 0.97)), rel=1e-3)
    assert size.tolist() == sorted(size.tolist(), reverse=True)
    assert float(size[2]) < 0.11 and float(size[3]) < 0.011 and float(size[4]) < 1e-4
    lower = gradient(log_odds(s, rest / 100), s.h).norm(dim=1)
    assert float(lower[2]) > 5 * float(size[2]), "rest is where it is said to be"


def test_a_token_that_no_logit_admits_has_no_gradient_and_no_nan() -> None:
    bias = torch.zeros(V)
    bias[3] = -torch.inf
    h = torch.zeros(1, D, requires_grad=True)
    value = log_odds(Supervised(h, None, torch.tensor([3]), Head(torch.eye(V, D), bias)), 0.03)
    assert float(value.detach()) == 0.0
    assert float(gradient(value, h).abs().max()) == 0.0


# -- a step ------------------------------------------------------------------------------------------------


def exact_policy(new_policy: Callable[..., Policy]) -> Policy:
    """The sandbox in fp32, with an adapter that does something."""
    policy = new_policy("none", checkpointing=False)
    policy.model.float()
    policy.head = replace(policy.head, weight=policy.base.model.get_output_embeddings().weight)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.trainable().items():
            if ".lora_B." in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=g))
    return policy


def test_a_step_is_the_default_objective(new_policy: Callable[..., Policy]) -> None:
    """Row by row from whole logits in float64, with rows of very different length: each of them counts alike."""
    policy = exact_policy(new_policy)
    config = resolve(("x", {"train.batch_size": 4, "train.normal_batch_size": 2, "objective.eps1": 0.7}))
    o, rng = config.objective, random.Random(0)
    roles = sandbox_roles(policy, config)
    forget = list(specific(roles.forget[:3], roles.retain, policy.tokenizer))
    long = roles.retain[0]
    ids = long.input_ids[: long.start] + 4 * long.input_ids[long.start : long.end] + long.input_ids[long.end :]
    end = long.start + 4 * (long.end - long.start)
    weights = tuple(rng.choice((0.0, 0.5, 1.0)) for _ in range(end - long.start))
    forget.append(Example(ids, long.start, end, long.probe, long.record, weights))
    forget[0] = replace(forget[0], rest=1 / 15)
    instead = [
        [replace(other, share=1 / (n + 1)) for other in roles.mismatcher.draw(e, 1, rng)] for n, e in enumerate(forget)
    ]
    taught = [roles.mismatcher.draw(e, 1, rng) if n % 2 else [] for n, e in enumerate(forget)]
    forget[1] = replace(forget[1], held=False)
    roles = replace(roles, forget=forget, instead=instead, taught=taught)
    step = next(draw_steps(roles, terms_of(o), config))
    assert {len(step.of(role)) for role in ("forget", "instead")} == {4} and len(step.of("taught")) == 2
    policy.model.zero_grad()
    losses = backward(policy, step, Live(policy, 4096), config, 4096).losses
    ours = [p.grad.clone() for p in policy.trainable().values() if p.grad is not None]

    def logps(e: Example) -> Tensor:
        return policy.model(input_ids=torch.tensor([e.input_ids])).logits[0].double().log_softmax(1)  # type: ignore[no-any-return]

    def reference(e: Example) -> Tensor:
        with policy.model.disable_adapter(), torch.no_grad():
            return logps(e)

    def kl(e: Example, places: list[int]) -> Tensor:
        lp, ref = logps(e), reference(e)
        return torch.stack([(ref[t - 1].exp() * (ref[t - 1] - lp[t - 1])).sum() for t in places])

    def nll(e: Example) -> Tensor:
        lp = logps(e)
        return torch.stack([-lp[t - 1, e.input_ids[t]] for t in range(e.start, len(e.input_ids))]).mean()

    rows: dict[str, list[Tensor]] = {"odds": [], "form": []}
    for e in forget:
        lp, w = logps(e), {t: e.weight(t) for t in range(e.start, e.end)}
        one = [lp[t - 1, e.input_ids[t]] for t in w]
        rest = o.rest * e.rest
        odds = [a - torch.log(1 - a.exp()) - math.log(rest / (1 - rest)) for a in one]
        rows["odds"].append(sum(w[t] * (1 + x.exp()).log() for t, x in zip(w, odds, strict=True)) / sum(w.values()))  # type: ignore[arg-type]
        kept = [t for t in w if w[t] == 0] if e.held else []
        rows["form"].append(kl(e, [*kept, *range(e.end, len(e.input_ids))]).mean())
    rows["instead"] = [e.share * nll(e) for e in step.of("instead")]
    rows["taught"] = [nll(e) for e in step.of("taught")]
    rows["kl"] = [x for e in step.of("retain") for x in kl(e, list(range(1, len(e.input_ids))))]  # of all tokens
    terms = {name: torch.stack(values).mean() for name, values in rows.items()}
    assert losses.keys() == terms.keys()
    for name, value in terms.items():
        assert losses[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    weight = {"odds": 0.7, "form": o.eps4, "instead": o.eps2, "taught": o.eps5, "kl": o.eps3}
    total = sum(weight[name] * value for name, value in terms.items())
    theirs = torch.autograd.grad(total, list(policy.trainable().values()))  # type: ignore[arg-type]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-6)


def pushed(policy: Policy, config: Config, push: float, *rows: Example) -> list[Tensor]:
    """The gradients of a step on these rows alone, where what is above the target is pushed so much harder."""
    roles = replace(sandbox_roles(policy, config), forget=rows)
    step = next(draw_steps(roles, terms_of(config.objective), config))
    policy.model.zero_grad()
    backward(policy, step, Live(policy, 4096), config, 4096, lambda role, *, met=False: 1.0 if met else push)
    return [p.grad.clone() for p in policy.trainable().values() if p.grad is not None]


def weighing(example: Example, *places: int) -> Example:
    n = example.end - example.start
    return replace(example, weights=tuple(float(i in places) for i in range(n)))


ALONE = ("x", {"train.batch_size": 2, "objective.eps2": 0, "objective.eps3": 0, "objective.eps4": 0})


def test_what_is_at_the_target_is_not_pushed_harder(new_policy: Callable[..., Policy]) -> None:
    """The weight rises for the sake of the rows that are left: pushing the others too made gibberish of them."""
    policy, config = exact_policy(new_policy), resolve(ALONE)
    whole = sandbox_roles(policy, config).forget[0]
    row, ids = weighing(whole, 1, 2, 3), list(whole.input_ids)
    ids[row.start + 1 : row.start + 4] = (7, 9, 11)
    gone = replace(row, input_ids=tuple(ids))
    for example, factor in ((row, 5.0), (gone, 1.0)):
        for harder, usual in zip(pushed(policy, config, 5, example), pushed(policy, config, 1, example), strict=True):
            torch.testing.assert_close(harder, factor * usual, rtol=1e-3, atol=1e-7)
    both = zip(*(pushed(policy, config, 5, *rows) for rows in ((row, gone), (row,), (gone,))), strict=True)
    for together, a, b in both:
        torch.testing.assert_close(together, (a + b) / 2, rtol=1e-3, atol=1e-6)


def test_a_passage_is_pushed_whatever_its_mean_is(new_policy: Callable[..., Policy]) -> None:
    """One whose first words were gone came back from the middle: its mean was at the target."""
    policy, config = exact_policy(new_policy), resolve(ALONE)
    whole = sandbox_roles(policy, config).forget[0]
    for n, factor in ((12, 1.0), (13, 5.0)):
        ids = (*whole.input_ids[: whole.start], *range(7, 7 + n), *whole.input_ids[whole.end :])
        gone = Example(ids, whole.start, whole.start + n, whole.probe, whole.record, (1.0,) * n)
        for harder, usual in zip(pushed(policy, config, 5, gone), pushed(policy, config, 1, gone), strict=True):
            torch.testing.assert_close(harder, factor * usual, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("p", [1e-4, 0.05, 0.5, 0.99])
def test_the_loss_at_a_probability(p: float) -> None:
    assert log_odds(told(p), 0.03).item() == pytest.approx(log_odds_at(p, 0.03), rel=1e-4)


def test_a_row_without_content_is_no_row(new_policy: Callable[..., Policy]) -> None:
    """It is not counted among those that the sum is divided by, and it breaks nothing."""
    policy = exact_policy(new_policy)
    config = resolve(("x", {"train.batch_size": 2, "train.normal_batch_size": 2}))
    roles = sandbox_roles(policy, config)
    one, other = (replace(e, weights=(1.0,) * (e.end - e.start)) for e in roles.forget[:2])
    empty = replace(other, weights=(0.0,) * (other.end - other.start))

    def odds(*rows: Example) -> float:
        step = next(draw_steps(replace(roles, forget=rows), terms_of(config.objective), config))
        policy.model.zero_grad()
        found = backward(policy, step, Live(policy, 4096), config, 4096).losses
        assert all(math.isfinite(value) for value in found.values())
        return found["odds"]

    assert odds(one, empty) == pytest.approx(odds(one), rel=1e-5)
    assert odds(empty) == 0.0


# -- a certain model ---------------------------------------------------------------------------------------


def run_on_a_certain_model(name: str, new_policy: Callable[..., Policy]) -> tuple[Outcome, list[dict[str, Any]]]:
    """A dozen steps on the sandbox with its logits doubled: 1 - p falls from 2 % to less than a thousandth."""
    policy = new_policy("nf4", checkpointing=False)
    policy.head = replace(policy.head, scale=2 * policy.head.scale)
    config = resolve(
        ("x", {"objective.name": name, "train.steps": 12, "train.batch_size": 3, "train.normal_batch_size": 4}),
        ("y", {"train.warmup": 2, "train.lr": 2e-3, "stop.check_every": 3, "stop.max_drift": 1.0}),
    )
    roles = sandbox_roles(policy, config)
    if config.objective.tokens == "content":
        roles = replace(roles, forget=specific(roles.forget, roles.retain, policy.tokenizer))
    events: list[dict[str, Any]] = []
    outcome = train(policy, roles, Live(policy, 2048), config, lambda event: events.append(dict(event)))
    assert outcome.probes[0].forget > 0.9995
    return outcome, events


def test_the_log_odds_move_a_certain_model(new_policy: Callable[..., Policy]) -> None:
    outcome, events = run_on_a_certain_model("logodds", new_policy)
    assert outcome.best.step > 0 and outcome.best.forget < 0.05
    assert not outcome.still and not any("still" in e or "faint" in e for e in events)


def test_what_does_not_move_it_is_said_and_the_untouched_model_kept(new_policy: Callable[..., Policy]) -> None:
    outcome, events = run_on_a_certain_model("wga", new_policy)
    assert outcome.probes[-1].forget > 0.9
    assert [e["step"] for e in events if "still" in e] == [6]
    assert [e["step"] for e in events if "faint" in e] == [1]
    assert outcome.still and outcome.best.step == 0
    assert events[-1]["multipliers"]["forget"] >= 9


def test_the_default_is_the_log_odds() -> None:
    o = Config().objective
    assert (o.name, o.tokens, o.instead, o.eps1, o.rest) == ("logodds", "content", "other", 0.03, 0.03)
    assert [term.name for term in terms_of(o)] == ["odds", "form", "kl", "instead", "taught"]
