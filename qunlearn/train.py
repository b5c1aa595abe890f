"""The loop: the file to read first.

One step draws bad rows, with other answers where the objective wants them, and normal rows, puts each through its
loss, and moves the adapter. Every few steps it looks at two numbers: how probable the bad answers still are, and how
far the model has drifted on normal data it is not trained on. They decide when to stop and which adapter is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from qunlearn.checkpoint import NO_CHECKPOINTS, Checkpoints, Moving, Snapshot
from qunlearn.config import Config, StopConfig, TrainConfig
from qunlearn.errors import DoesNotFitError
from qunlearn.evaluate.score import forget_probability, mean_kl
from qunlearn.gradients import Budget, block_of
from qunlearn.model.optimizer import make_optimizer
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Reference
from qunlearn.objectives.control import Controller, make_controller
from qunlearn.objectives.table import Term, terms_of
from qunlearn.step import Roles, Step, draw_steps, longest_step

# Of two looks at one model with other rows the drifts differ by so much (docs/log.md, 2026-11-25).
_DRIFT_NOISE = 1.25
Observer = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Probe:
    """One look. `forget`: mean probability of the bad answers; `drift`: KL(base || policy), nats per token."""

    step: int
    forget: float
    drift: float

    def rank(self, stop: StopConfig) -> tuple[bool, float, float]:
        """Lower is better: within the drift budget, then forgotten down to the target, then least drift."""
        return self.drift > stop.max_drift, max(self.forget, stop.target), self.drift


@dataclass
class Outcome:
    """What a run of the loop led to. `state` is the adapter of `best`, not of the last step."""

    state: dict[str, Tensor]
    best: Probe
    reason: str = "all steps done"
    steps: int = 0
    skipped: int = 0
    skips_in_a_row: int = 0
    tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    failed: bool = False
    probes: list[Probe] = field(default_factory=list)
    multipliers: dict[str, float] | None = None  # of budgeted forgetting, as it ended

    def values(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        plain = {name: value for name, value in vars(self).items() if name not in ("state", "best", "probes")}
        return plain | {"best": asdict(self.best), "probes": [asdict(probe) for probe in self.probes]}

    @classmethod
    def of(cls, found: Snapshot) -> Outcome:
        """The outcome so far, as a checkpoint has it."""
        values = dict(found.values["outcome"])
        best, probes = Probe(**values.pop("best")), [Probe(**probe) for probe in values.pop("probes")]
        return cls(found.under("best."), best, probes=probes, **values)


def auto_lr(hidden_size: int) -> float:
    """A peak learning rate for LoRA that falls with the model's width: 2e-3 at 160, 1e-4 at 4096.

    Two points define it: what was measured on the sandbox (docs/log.md) and the low end of what is published for
    LoRA on 7B models (1e-4 to 2e-4); between them a power law.
    """
    exponent = math.log(20) / math.log(4096 / 160)
    return float(min(2e-3, 1e-4 * (4096 / hidden_size) ** exponent))


def schedule(step: int, c: TrainConfig) -> float:
    """The share of the peak learning rate at a step (from 1): linear warm-up, then constant or linearly down."""
    if step <= c.warmup:
        return step / c.warmup
    return 1.0 if c.schedule == "constant" else (c.steps + 1 - step) / (c.steps + 1 - c.warmup)


def train(
    policy: Policy,
    roles: Roles,
    reference: Reference,
    config: Config,
    observe: Observer,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> Outcome:
    """Unlearn until the steps are done, or the drift budget is spent for good.

    The policy ends with the best adapter loaded. Ctrl-C ends the loop like a stop does, with `interrupted` set.
    A checkpoint that is found is gone on from, to the same bits. What `observe` does, which must leave policy and
    random state as they are, is not counted as time of the loop. Raises NoGradientError, DoesNotFitError.
    """
    c, stop = config.train, config.stop
    m = _machine(policy, roles, reference, config, observe)
    # Whatever else in the loop has a state of its own goes in here by name, with state() and load_state().
    steered = {"controller": m.controller} if m.controller else {}
    moving = Moving(policy, m.optimizer, {"budget": m.budget, **steered, **checkpoints.parts})
    found = checkpoints.latest()
    outcome = Outcome.of(found) if found else _at_the_start(policy, roles, reference, config, observe)
    torch.manual_seed(c.seed)
    start = time.monotonic() - outcome.seconds
    policy.model.train()
    try:
        if policy.device.type == "cuda":  # running out of memory shows in the first second
            m.budget.backward(longest_step(roles, m.terms, config), step_number=outcome.steps)
        if found:
            moving.restore(found)
            for _ in range(outcome.steps):  # what was drawn follows from the seed: draw it again
                next(m.draw)
        for step in range(outcome.steps + 1, c.steps + 1):
            event = _step(m, outcome, step, c)
            outcome.seconds = time.monotonic() - start
            event |= {"tokens_per_s": outcome.tokens / max(outcome.seconds, 1e-9), "seconds": outcome.seconds}
            if step % stop.check_every == 0 or step == c.steps:
                probe = _probe(policy, roles, reference, config, step)
                event |= {"forget": probe.forget, "drift": probe.drift}
                _consider(outcome, probe, policy, stop)
                if m.controller:
                    m.controller.look(probe.forget, probe.drift, has_kl="kl" in event)
            watched = time.monotonic()
            observe(event)
            start += time.monotonic() - watched
            if outcome.skips_in_a_row >= stop.max_skips:
                outcome.failed, outcome.reason = True, f"{outcome.skips_in_a_row} non-finite steps in a row"
                break
            if reason := _reason_to_stop(outcome, stop, constant_rate=config.train.schedule == "constant"):
                outcome.reason = reason
                break
            # Only after the decision to go on: who resumes here does not take it again.
            if checkpoints.due(step):
                checkpoints.save(step, moving.snapshot(outcome.values(), outcome.state))
            if checkpoints.stopping() and step < c.steps:
                outcome.interrupted, outcome.reason = True, "interrupted"
                break
    except KeyboardInterrupt:
        outcome.interrupted, outcome.reason = True, "interrupted"
    except (torch.OutOfMemoryError, MemoryError) as error:
        hint = "lower --max-length or --lora-r, take --optimizer adamw8bit, or a smaller model"
        raise DoesNotFitError("out of memory while training", where=f"step {outcome.steps + 1}", hint=hint) from error
    outcome.multipliers = m.controller.state() if m.controller else None
    outcome.seconds = time.monotonic() - start
    policy.load_adapter_state(outcome.state)
    policy.model.eval()
    return outcome


@dataclass(frozen=True)
class _Machine:
    """What every step is made with. `first` is done after the first backward pass."""

    terms: Sequence[Term]
    controller: Controller | None
    parameters: list[Tensor]
    lr: float
    optimizer: Any
    draw: Iterator[Step]
    budget: Budget
    first: Callable[[], None]


def _machine(policy: Policy, roles: Roles, reference: Reference, config: Config, observe: Observer) -> _Machine:
    c, terms = config.train, terms_of(config.objective)
    parameters = list(policy.trainable().values())
    lr = c.lr if c.lr is not None else auto_lr(policy.hidden_size)
    # Where every loss looks at a block's output, no gradient is expected above that block.
    highest = block_of(config, policy) if all(term.layered for term in terms) else None
    return _Machine(
        terms,
        make_controller(config),
        parameters,
        lr,
        make_optimizer(parameters, c, lr),
        draw_steps(roles, terms, config),
        Budget(policy, reference, config, observe),
        lambda: policy.check_gradients(highest),
    )


def _step(m: _Machine, outcome: Outcome, step: int, c: TrainConfig) -> dict[str, Any]:
    """Draw, backward, clip, move: what came of it, by name. Numbers that are not finite move nothing."""
    for group in m.optimizer.param_groups:
        group["lr"] = m.lr * schedule(step, c)
    scale = m.controller.scale if m.controller else (lambda role: 1.0)
    gradients = m.budget.backward(next(m.draw), step_number=step, scale=scale)
    if step == 1:
        m.first()
    norm = float(torch.nn.utils.clip_grad_norm_(m.parameters, c.clip if c.clip > 0 else math.inf))
    outcome.steps, outcome.tokens = step, outcome.tokens + gradients.tokens
    if math.isfinite(norm) and all(map(math.isfinite, gradients.losses.values())):
        m.optimizer.step()
        outcome.skips_in_a_row = 0
    else:
        outcome.skips_in_a_row += 1
        outcome.skipped += 1
    event: dict[str, Any] = {"step": step, **gradients.losses, "grad_norm": norm, "tokens": gradients.tokens}
    if gradients.shares is not None:
        event["shares"] = gradients.shares
    if m.controller:
        m.controller.step(gradients.losses.get("kl"))
        event["multipliers"] = {"forget": m.controller.forget, "retain": m.controller.retain}
    return event


def _at_the_start(policy: Policy, roles: Roles, reference: Reference, config: Config, observe: Observer) -> Outcome:
    """The outcome of no step at all: the adapter as it begins, and the first look."""
    outcome = Outcome(policy.adapter_state(), _probe(policy, roles, reference, config, 0))
    outcome.probes.append(outcome.best)
    observe({"step": 0, "forget": outcome.best.forget, "drift": outcome.best.drift})
    return outcome


def _probe(policy: Policy, roles: Roles, reference: Reference, config: Config, step: int) -> Probe:
    limit, n = config.train.max_tokens, config.stop.probe_rows
    with policy.measured():
        return Probe(
            step,
            forget_probability(policy, roles.watched[:n], limit),
            mean_kl(policy, reference, roles.held_back[:n], limit),
        )


def _consider(outcome: Outcome, probe: Probe, policy: Policy, stop: StopConfig) -> None:
    """Keep the adapter of this look if it is the best one so far, or as good as can be told and has healed longer."""
    outcome.probes.append(probe)
    finite = math.isfinite(probe.forget) and math.isfinite(probe.drift)
    if finite and (probe.rank(stop) < outcome.best.rank(stop) or _as_good(probe, outcome.probes, stop)):
        outcome.best, outcome.state = probe, policy.adapter_state()


def _as_good(probe: Probe, probes: Sequence[Probe], stop: StopConfig) -> bool:
    """Whether it meets the target within the budget, at a drift that is within the noise of the least that did."""
    done = (False, stop.target)
    least = min((p.drift for p in probes if p.rank(stop)[:2] == done), default=-math.inf)
    return probe.rank(stop)[:2] == done and probe.drift <= _DRIFT_NOISE * least


def _reason_to_stop(outcome: Outcome, stop: StopConfig, *, constant_rate: bool) -> str | None:
    """Each of the two sides has patience: after the first blow the retain term brings drift back down for a while.

    Drift falls where the last look is below the mean of those before it. A target that is met ends no run whose rate
    is still to fall: forgetting grows deeper and the rest heals on the way down.
    """
    recent = outcome.probes[-stop.patience :]
    if recent[-1].step != outcome.steps or len(recent) < stop.patience:
        return None
    if recent[-1].drift < fmean(probe.drift for probe in recent[:-1]):
        return None
    if all(probe.drift > stop.max_drift for probe in recent):
        return f"drift above {stop.max_drift:g} nats/token for {stop.patience} looks, and not falling"
    met = outcome.best.rank(stop)[:2] == (False, stop.target) and outcome.best.step <= recent[0].step
    if met and constant_rate:
        return f"forget target {stop.target:g} met, and no better for {stop.patience} looks"
    return None
