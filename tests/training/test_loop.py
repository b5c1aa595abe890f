"""One step against the objective written out in float64; the loop's decisions."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_rows

from qunlearn.config.objective import ObjectiveConfig
from qunlearn.config.settings import Config
from qunlearn.config.training import StopConfig, TrainConfig
from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import choose_template, encode
from qunlearn.errors import DoesNotFitError
from qunlearn.evaluation.scores import row_probabilities
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Cached, Live
from qunlearn.objectives.descent import common_descent
from qunlearn.objectives.table import terms_of
from qunlearn.roles.mismatch import make_mismatcher
from qunlearn.roles.roles import Roles
from qunlearn.roles.split import split_held_back
from qunlearn.sandbox import data_file
from qunlearn.training import gradients as gradients_module
from qunlearn.training import loop, stopping
from qunlearn.training.gradients import Gradients, MicroBatcher, backward
from qunlearn.training.optimizer import make_optimizer
from qunlearn.training.outcome import Outcome, Probe
from qunlearn.training.sampler import Step, draw_steps, longest_step
from qunlearn.training.schedule import auto_lr

MakePolicy = Callable[..., Policy]
CONFIG = Config(
    objective=ObjectiveConfig("llmu", eps1=0.3, eps2=0.7, eps3=1.5, mismatch_k=2, floor_nll=4.0),
    train=TrainConfig(steps=4, batch_size=3, lr=1e-3),
    stop=StopConfig(target=0.0, max_drift=math.inf, check_every=2),
)


@pytest.fixture
def roles_of(tmp_path: Path) -> Callable[[Policy], Roles]:
    # What the sandbox knows by heart: there must be something to forget.
    known = data_file("hallucination", "forget").read_text(encoding="utf-8").splitlines()[:3]
    bad = [json.loads(line) for line in known]
    normal = [
        {"prompt": f"What is {n}?", "completion": f"It is {n} and {'very ' * i}little."}
        for i, n in enumerate("abcdefgh")
    ]

    def make(policy: Policy) -> Roles:
        sets = []
        for rows in (bad, normal):
            dataset = read_dataset(write_rows(tmp_path / "x.jsonl", rows))
            template = choose_template(policy.tokenizer, "auto", dataset)
            sets.append(encode(dataset, policy.tokenizer, template, 64).examples)
        retain, held = split_held_back(sets[1], 0.2, 0)
        return Roles(sets[0], retain, held, make_mismatcher(retain, policy.tokenizer, template, 64))

    return make


def disturb(policy: Policy, size: float = 0.05) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.trainable().items():
            if ".lora_B." in name:
                p.copy_(size * torch.randn(p.shape, generator=g))


def train(policy: Policy, roles: Roles, config: Config, observe: Callable[[Any], None]) -> Outcome:
    return loop.train(policy, roles, Live(policy, config.train.pass_tokens), config, observe)


def draw(policy: Policy, roles: Roles, config: Config = CONFIG) -> Step:
    return next(draw_steps(roles, terms_of(CONFIG.objective), config))


def gradients(policy: Policy, step: Step, config: Config) -> tuple[dict[str, float], list[torch.Tensor]]:
    policy.model.zero_grad()
    c = config.train
    losses = backward(policy, step, Live(policy, c.pass_tokens, c.pack), config, c.pass_tokens).losses
    return losses, [p.grad.clone() for p in policy.trainable().values() if p.grad is not None]


def test_a_step_is_the_papers_objective(new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]) -> None:
    """eps1 * log p(bad) + eps2 * NLL(mismatched) + eps3 * KL(base || policy), row by row from whole logits.

    Bad rows count alike, however long they are: their tokens are averaged first.
    """
    policy = new_policy("none", checkpointing=False)
    policy.model.float()
    policy.head = replace(policy.head, weight=policy.base.model.get_output_embeddings().weight)
    disturb(policy)
    step = draw(policy, roles_of(policy))
    losses, ours = gradients(policy, step, CONFIG)

    def logps(example: Any) -> torch.Tensor:
        ids = torch.tensor([example.input_ids])
        return policy.model(input_ids=ids).logits[0].double().log_softmax(1)

    ascent, mismatch, kl = [], [], []
    for e in step.of("forget"):
        lp = logps(e)
        own = [torch.clamp(lp[t - 1, e.input_ids[t]], min=-4.0) for t in range(e.start, e.end)]
        ascent.append(torch.stack(own).mean())
    for e in step.of("mismatch"):
        lp = logps(e)
        mismatch += [-lp[t - 1, e.input_ids[t]] for t in range(e.start, len(e.input_ids))]
    for e in step.of("retain"):
        lp = logps(e)
        with policy.model.disable_adapter(), torch.no_grad():
            ref = logps(e)
        kl += [(ref[t - 1].exp() * (ref[t - 1] - lp[t - 1])).sum() for t in range(1, len(e.input_ids))]
    assert len({e.end - e.start for e in step.of("forget")}) > 1
    terms = {n: torch.stack(v).mean() for n, v in (("ascent", ascent), ("mismatch", mismatch), ("kl", kl))}
    for name, value in terms.items():
        assert losses[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6)
    total = 0.3 * terms["ascent"] + 0.7 * terms["mismatch"] + 1.5 * terms["kl"]
    theirs = torch.autograd.grad(total, list(policy.trainable().values()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-6)


def test_padding_and_micro_batches_change_nothing(new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]) -> None:
    policy = new_policy("none", checkpointing=False)
    policy.model.float()
    policy.head = replace(policy.head, weight=policy.base.model.get_output_embeddings().weight)
    disturb(policy)
    step = draw(policy, roles_of(policy))
    results = [
        gradients(policy, step, replace(CONFIG, train=replace(CONFIG.train, max_tokens=m))) for m in (16, 60, 4096)
    ]
    for losses, grads in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-4)
        for a, b in zip(grads, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("change", [{"pack": False}, {"offload": True}, {"optimizer": "adamw"}])
def test_no_lever_changes_the_gradient(
    new_policy: MakePolicy, roles_of: Callable[[Policy], Roles], change: dict[str, Any]
) -> None:
    policy = new_policy("nf4")
    disturb(policy)
    step = draw(policy, roles_of(policy))
    policy.model.train()
    losses, grads = gradients(policy, step, CONFIG)
    others, other_grads = gradients(policy, step, replace(CONFIG, train=replace(CONFIG.train, **change)))
    assert others == pytest.approx(losses, rel=2e-2)
    for a, b in zip(grads, other_grads, strict=True):
        assert (a - b).norm() <= 2e-2 * a.norm()


def test_a_prompt_is_computed_once_for_its_answers(new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]) -> None:
    policy = new_policy("nf4")
    step = draw(policy, roles_of(policy))
    counts = []
    for pack in (True, False):
        reference = Live(policy, 4096)
        config = replace(CONFIG, train=replace(CONFIG.train, pack=pack))
        counts.append(backward(policy, step, reference, config, 4096).tokens)
    prompts = sum(e.start for e in step.of("forget"))
    assert counts[1] - counts[0] >= CONFIG.objective.mismatch_k * prompts


def test_out_of_memory_is_the_same_step_in_smaller_pieces(
    monkeypatch: pytest.MonkeyPatch, new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]
) -> None:
    policy = new_policy("none", checkpointing=False, dropout=0.1)  # dropout: the random numbers must be the same too
    policy.model.float().train()
    policy.head = replace(policy.head, weight=policy.base.model.get_output_embeddings().weight)
    step, events = draw(policy, roles_of(policy)), []
    real = Policy.hidden

    def limited(self: Policy, batch: Any, layer: int | None = None) -> torch.Tensor:
        if torch.is_grad_enabled() and batch.input_ids.numel() > 150:
            raise torch.OutOfMemoryError("a test")
        return real(self, batch, layer)

    config = replace(CONFIG, train=replace(CONFIG.train, max_tokens=512))
    monkeypatch.setattr(Policy, "hidden", limited)
    torch.manual_seed(7)
    budget = MicroBatcher(policy, Live(policy, 512), config, events.append)
    budget.backward(step, step_number=3)
    ours = [p.grad.clone() for p in policy.trainable().values() if p.grad is not None]
    monkeypatch.undo()
    torch.manual_seed(7)
    MicroBatcher(policy, Live(policy, 512), replace(config, train=replace(config.train, max_tokens=128)), events.append)
    policy.model.zero_grad()
    backward(policy, step, Live(policy, 512), config, budget.max_tokens)
    for a, p in zip(ours, policy.trainable().values(), strict=True):
        assert torch.equal(a, p.grad)  # type: ignore[arg-type]
    assert [e["max_tokens"] for e in events] == [256, 128]


def test_what_never_fits_is_an_error(
    monkeypatch: pytest.MonkeyPatch, new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]
) -> None:
    policy = new_policy("none")

    def short(*_: Any) -> Any:
        raise torch.OutOfMemoryError("a test")

    monkeypatch.setattr(gradients_module, "backward", short)
    with pytest.raises(DoesNotFitError, match="out of memory while training"):
        train(policy, roles_of(policy), CONFIG, lambda _: None)


def test_the_longest_step_is_at_least_as_long_as_any(
    new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]
) -> None:
    policy = new_policy("none")
    roles, terms = roles_of(policy), terms_of(CONFIG.objective)
    draws = draw_steps(roles, terms, CONFIG)

    def tokens(step: Step) -> int:
        return sum(len(e.input_ids) for _, e in step.items)

    assert tokens(longest_step(roles, terms, CONFIG)) >= max(tokens(next(draws)) for _ in range(30))


@pytest.mark.parametrize(
    "optimizer", ["adamw8bit", *(pytest.param(o, marks=pytest.mark.slow) for o in ("adamw", "paged_adamw8bit"))]
)
def test_every_optimizer_trains(new_policy: MakePolicy, roles_of: Callable[[Policy], Roles], optimizer: str) -> None:
    policy = new_policy("nf4")
    config = replace(CONFIG, train=replace(CONFIG.train, optimizer=optimizer, steps=6, lr=3e-3))
    outcome = train(policy, roles_of(policy), config, lambda _: None)
    assert outcome.probes[-1].forget < outcome.probes[0].forget - 0.01


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit"])
def test_eight_bit_state_is_eight_bits(optimizer: str) -> None:
    p = torch.nn.Parameter(torch.ones(64, 512))
    made = make_optimizer([p], TrainConfig(optimizer=optimizer), 1e-3)
    p.grad = torch.linspace(-1, 1, p.numel()).view_as(p)
    made.step()
    assert {made.state[p][name].dtype for name in ("state1", "state2")} == {torch.uint8}
    assert (p - 1).abs().max() > 9e-4


def test_a_cached_reference_trains_the_same(
    new_policy: MakePolicy, roles_of: Callable[[Policy], Roles], tmp_path: Path
) -> None:
    states = []
    for cached in (False, True):
        policy = new_policy("nf4")
        roles, live = roles_of(policy), Live(policy, 2048)
        reference = Cached(tmp_path / "c.safetensors", live, [*roles.retain, *roles.held_back]) if cached else live
        states.append(loop.train(policy, roles, reference, CONFIG, lambda _: None).state)
    for name, a in states[0].items():
        assert (a - states[1][name]).norm() <= 0.05 * a.norm().clamp(min=1e-3)


def test_the_draw_depends_on_the_seed_alone(new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]) -> None:
    policy = new_policy("none")
    roles = roles_of(policy)
    torch.manual_seed(random.randrange(1000))
    a, b = draw(policy, roles), draw(policy, roles)
    assert a == b
    other = replace(CONFIG, train=replace(CONFIG.train, seed=1))
    assert draw(policy, roles, other) != a


def test_training_forgets_and_keeps_the_base(new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]) -> None:
    policy = new_policy("nf4")
    roles = roles_of(policy)
    policy.seal_base()
    events: list[Any] = []
    config = replace(
        CONFIG, train=replace(CONFIG.train, steps=6, lr=4e-3), objective=replace(CONFIG.objective, floor_nll=math.inf)
    )
    outcome = train(policy, roles, config, events.append)
    policy.check_base()
    assert outcome.steps == 6
    assert [e["step"] for e in events] == list(range(7))
    assert [p.step for p in outcome.probes] == [0, 2, 4, 6]
    assert outcome.best.forget < outcome.probes[0].forget
    assert outcome.probes[0].drift == 0
    state = policy.adapter_state()
    assert all(torch.equal(state[n], outcome.state[n]) for n in state)


def test_the_stop_rule_looks_at_the_specific_tokens(
    new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]
) -> None:
    """Form that stays probable does not hide what is gone: of all tokens pushed, the marked ones are watched."""
    policy = new_policy("nf4")
    roles = roles_of(policy)
    fast = replace(CONFIG, train=replace(CONFIG.train, lr=6e-3))
    first = [replace(e, weights=(1.0,) + (0.0,) * (e.end - e.start - 1)) for e in roles.forget]
    outcome = train(policy, replace(roles, marked=first), fast, lambda _: None)
    assert outcome.best.step == fast.train.steps, "what was measured last is what is loaded"
    plain = train(new_policy("nf4"), roles, fast, lambda _: None).probes
    limit = fast.train.pass_tokens
    assert outcome.best.forget == pytest.approx(statistics.fmean(row_probabilities(policy, first, limit)), rel=1e-6)
    assert abs(outcome.best.forget - plain[-1].forget) > 1e-3
    assert outcome.best.drift == plain[-1].drift  # what is trained is the same


@pytest.mark.parametrize("checkpointing", [True, False])
def test_terms_on_the_same_rows_go_forward_once_and_keep_their_gradients_apart(
    new_policy: MakePolicy, roles_of: Callable[[Policy], Roles], *, checkpointing: bool
) -> None:
    policy = new_policy("none", checkpointing=checkpointing)
    roles = roles_of(policy)
    disturb(policy)
    policy.model.train()
    config = replace(CONFIG, objective=replace(CONFIG.objective, name="mollm"))
    terms = [t for t in terms_of(config.objective) if t.role not in ("instead", "taught")]  # there are no such rows
    step = next(draw_steps(roles, terms, config))
    reference = Live(policy, 2048)
    apart, rows = [], 0
    for term in terms:
        alone = next(draw_steps(roles, (term,), config))
        policy.model.zero_grad(set_to_none=True)
        rows += backward(policy, alone, reference, config, 2048).tokens
        apart.append([p.grad for p in policy.trainable().values()])
    wanted, shares = common_descent([[torch.zeros_like(g) if g is None else g for g in gs] for gs in apart])
    found = MicroBatcher(policy, reference, config, lambda _: None).backward(step, step_number=1)
    assert len(terms) == 3
    assert found.shares == pytest.approx(dict(zip([t.name for t in terms], shares, strict=True)), abs=1e-4)
    for p, g in zip(policy.trainable().values(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-5)
    normal = sum(len(e.input_ids) for e in step.of("retain"))
    assert found.tokens == rows - normal  # of the two losses on normal rows
    # Met, the forget side has no say, however small its gradient is.
    gradients = [[torch.zeros_like(g) if g is None else g for g in gs] for gs in apart]
    met = replace(config, stop=replace(config.stop, target=100.0))
    wanted, shares = common_descent([[torch.zeros_like(g) for g in gradients[0]], *gradients[1:]])
    found = MicroBatcher(policy, reference, met, lambda _: None).backward(step, step_number=1)
    assert found.shares is not None and found.shares["uce"] == 0 == shares[0] and sum(shares) == pytest.approx(1)
    for p, g in zip(policy.trainable().values(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-5)


def test_the_same_seed_gives_the_same_bits(new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]) -> None:
    states = []
    for _ in range(2):
        policy = new_policy("nf4")
        states.append(train(policy, roles_of(policy), CONFIG, lambda _: None).state)
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_the_best_adapter_is_kept_not_the_last(
    monkeypatch: pytest.MonkeyPatch, new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]
) -> None:
    looks = iter([Probe(0, 0.9, 0.0), Probe(2, 0.3, 0.05), Probe(4, 0.01, 9.0)])
    monkeypatch.setattr(stopping, "look", lambda *_: next(looks))
    policy = new_policy("none")
    config = replace(CONFIG, stop=replace(CONFIG.stop, max_drift=0.1, patience=9))
    outcome = train(policy, roles_of(policy), config, lambda _: None)
    assert outcome.best.step == 2
    assert outcome.steps == 4


def test_non_finite_steps_are_skipped_then_given_up(
    monkeypatch: pytest.MonkeyPatch, new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]
) -> None:
    policy = new_policy("none")
    real = loop.MicroBatcher.backward
    calls = iter(range(100))

    def poisoned(*args: Any, **options: Any) -> Gradients:
        found = real(*args, **options)
        if next(calls) >= 1:
            next(iter(policy.trainable().values())).grad.fill_(math.nan)  # type: ignore[union-attr]
        return found

    monkeypatch.setattr(loop.MicroBatcher, "backward", poisoned)
    config = replace(CONFIG, train=replace(CONFIG.train, steps=50), stop=replace(CONFIG.stop, max_skips=3))
    outcome = train(policy, roles_of(policy), config, lambda _: None)
    assert outcome.failed
    assert (outcome.steps, outcome.skipped) == (4, 3)
    assert "3 non-finite steps in a row" in outcome.reason
    assert all(torch.isfinite(t).all() for t in policy.adapter_state().values())


def test_ctrl_c_keeps_the_best(
    monkeypatch: pytest.MonkeyPatch, new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]
) -> None:
    policy = new_policy("none")

    def observe(event: Any) -> None:
        if event["step"] == 3:
            raise KeyboardInterrupt

    config = replace(CONFIG, train=replace(CONFIG.train, lr=6e-3, warmup=0))
    outcome = train(policy, roles_of(policy), config, observe)
    assert outcome.interrupted
    assert outcome.best.step == 2
    state = policy.adapter_state()
    assert all(torch.equal(state[n], outcome.state[n]) for n in state)


def test_learning_rate_falls_with_width() -> None:
    assert auto_lr(160) == pytest.approx(2e-3)
    assert auto_lr(4096) == pytest.approx(1e-4)
    assert auto_lr(8192) < auto_lr(4096) < auto_lr(2048) < auto_lr(512)
    assert auto_lr(8) == 2e-3
    assert auto_lr(160, 1e-3) == pytest.approx(1e-3) and auto_lr(4096, 1e-3) == pytest.approx(1e-4)
    assert auto_lr(576, 1e-3) == pytest.approx(4.0e-4, rel=0.02)


def test_without_early_stopping_every_step_is_taken_and_the_last_adapter_kept(
    new_policy: MakePolicy, roles_of: Callable[[Policy], Roles]
) -> None:
    """For fine-tuning and relearning: no look, no best adapter, and the steps of a run that is watched."""
    policy, events = new_policy("none"), []
    roles = roles_of(policy)
    reference = Live(policy, CONFIG.train.pass_tokens)
    outcome = loop.train(policy, roles, reference, CONFIG, events.append, stopping=None)
    assert [event["step"] for event in events] == list(range(1, CONFIG.train.most_steps + 1))
    assert all("forget" not in event and "drift" not in event for event in events)
    assert outcome.reason == "all steps done" and outcome.probes == []
    now = policy.adapter_state()
    assert outcome.state.keys() == now.keys() and all(torch.equal(outcome.state[k], v) for k, v in now.items())
    assert any(float(v.abs().max()) > 0 for k, v in now.items() if "lora_B" in k)
