"""The loop: the file to read first.

One step draws bad rows, with other answers where the objective wants them, and normal rows, puts each through its
loss, and moves the adapter. Every few steps it looks at two things: how probable each bad answer still is, and how
far the model has drifted on normal data it is not trained on. They decide which adapter is kept, when the rate falls,
when a side's weight rises, when to go back, and when to stop.
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

from qunlearn.config.settings import Config, StopConfig
from qunlearn.errors import DoesNotFitError
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Reference
from qunlearn.objectives.control import Controller, make_controller
from qunlearn.objectives.table import TAUGHT, Term, terms_of
from qunlearn.roles.roles import Roles
from qunlearn.training.checkpoint import NO_CHECKPOINTS, Checkpoints, Moving, Part, Snapshot
from qunlearn.training.gradients import Budget, block_of
from qunlearn.training.optimizer import make_optimizer
from qunlearn.training.sampler import Step, draw_steps, longest_step
from qunlearn.training.schedule import Pace, auto_lr
from qunlearn.training.stopping import Probe, as_good, has_moved, is_behind, look, over

_STILL = 0.9  # share of the first probability above which nothing has moved
_LEARNT = 0.3  # cross-entropy per token of what is taught, from which it is said
_HARDER = 3.0  # what the forget side's weight is multiplied by at a look that finds it behind
Observer = Callable[[Mapping[str, Any]], None]


@dataclass
class Outcome:
    """What a run of the loop led to. `state` is the adapter of `best`, not of the last step."""

    state: dict[str, Tensor]
    best: Probe
    reason: str = "all steps done"
    steps: int = 0
    skipped: int = 0
    skips_in_a_row: int = 0
    returns: int = 0  # times the run went back to its best adapter
    tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    failed: bool = False
    still: bool = False  # nothing had moved at the second look
    probes: list[Probe] = field(default_factory=list)
    multipliers: dict[str, float] | None = None  # as they ended

    def values(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON values."""
        plain = {name: value for name, value in vars(self).items() if name not in ("state", "best", "probes")}
        return plain | {"best": asdict(self.best), "probes": [asdict(probe) for probe in self.probes]}

    @classmethod
    def of(cls, found: Snapshot) -> Outcome:
        """Return the outcome so far, as a checkpoint has it."""
        values = dict(found.values["outcome"])
        best, probes = Probe(**values.pop("best")), [Probe(**probe) for probe in values.pop("probes")]
        return cls(found.under("best."), best, probes=probes, **values)


def train(
    policy: Policy,
    roles: Roles,
    reference: Reference,
    config: Config,
    observe: Observer,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> Outcome:
    """Unlearn until the target is met and the rate has fallen, the steps are done, or the drift budget is spent.

    The policy ends with the best adapter loaded. Ctrl-C ends the loop like a stop does, with `interrupted` set.
    A checkpoint that is found is gone on from, to the same bits. What `observe` does, which must leave policy and
    random state as they are, is not counted as time of the loop. Raises NoGradientError, DoesNotFitError.
    """
    c, stop = config.train, config.stop
    m = _machine(policy, roles, reference, config, observe)
    # Whatever else in the loop has a state of its own goes in here by name, with state() and load_state().
    parts: dict[str, Part] = {"budget": m.budget, "controller": m.controller, "pace": m.pace}
    moving = Moving(policy, m.optimizer, {**parts, **checkpoints.parts})
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
        for step in range(outcome.steps + 1, c.most_steps + 1):
            event = _step(m, outcome, step, c.clip)
            outcome.seconds = time.monotonic() - start
            event |= {"tokens_per_s": outcome.tokens / max(outcome.seconds, 1e-9), "seconds": outcome.seconds}
            if step % stop.check_every == 0 or step == c.most_steps or m.pace.settled(step):
                probe = look(policy, roles, reference, config, step)
                event |= {"forget": probe.forget, "drift": probe.drift, "left": probe.above(stop)}
                _consider(outcome, probe, policy, stop)
                event |= _steer(m, outcome, probe, policy, event)
            watched = time.monotonic()
            observe(event)
            start += time.monotonic() - watched
            if outcome.skips_in_a_row >= stop.max_skips:
                outcome.failed, outcome.reason = True, f"{outcome.skips_in_a_row} non-finite steps in a row"
                break
            if reason := _reason_to_stop(outcome, stop, m.pace):
                outcome.reason = reason
                break
            # Only after the decision to go on: who resumes here does not take it again.
            if checkpoints.due(step):
                checkpoints.save(step, moving.snapshot(outcome.values(), outcome.state))
            if checkpoints.stopping() and step < c.most_steps:
                outcome.interrupted, outcome.reason = True, "interrupted"
                break
    except KeyboardInterrupt:
        outcome.interrupted, outcome.reason = True, "interrupted"
    except (torch.OutOfMemoryError, MemoryError) as error:
        hint = "lower --max-length or --lora-r, take --optimizer adamw8bit, or a smaller model"
        raise DoesNotFitError("out of memory while training", where=f"step {outcome.steps + 1}", hint=hint) from error
    outcome.multipliers = m.controller.state()
    outcome.seconds = time.monotonic() - start
    policy.load_adapter_state(outcome.state)
    policy.model.eval()
    return outcome


@dataclass(frozen=True)
class _Machine:
    """What every step is made with. `first` is done after the first backward pass, and says whether the gradient is
    so small that the optimizer's own rounding decides; an `epoch` is the steps that draw each bad row once."""

    config: Config
    terms: Sequence[Term]
    controller: Controller
    pace: Pace
    parameters: list[Tensor]
    lr: float
    optimizer: Any
    draw: Iterator[Step]
    budget: Budget
    first: Callable[[], bool]
    epoch: int


def _machine(policy: Policy, roles: Roles, reference: Reference, config: Config, observe: Observer) -> _Machine:
    c, terms = config.train, terms_of(config.objective)
    parameters = list(policy.trainable().values())
    lr = c.lr if c.lr is not None else auto_lr(policy.hidden_size)
    # Where every loss looks at a block's output, no gradient is expected above that block.
    highest = block_of(config, policy) if all(term.layered for term in terms) else None
    return _Machine(
        config,
        terms,
        make_controller(config),
        Pace(c),
        parameters,
        lr,
        make_optimizer(parameters, c, lr),
        draw_steps(roles, terms, config),
        Budget(policy, reference, config, observe),
        lambda: policy.check_gradients(highest),
        math.ceil(len(roles.forget) / c.batch_size),
    )


def _step(m: _Machine, outcome: Outcome, step: int, clip: float) -> dict[str, Any]:
    """Draw, backward, clip, move: what came of it, by name. Numbers that are not finite move nothing."""
    for group in m.optimizer.param_groups:
        group["lr"] = m.lr * m.pace.rate(step)
    gradients = m.budget.backward(next(m.draw), step_number=step, scale=m.controller.scale)
    faint = step == 1 and m.first()
    norm = float(torch.nn.utils.clip_grad_norm_(m.parameters, clip if clip > 0 else math.inf))
    outcome.steps, outcome.tokens = step, outcome.tokens + gradients.tokens
    if math.isfinite(norm) and all(map(math.isfinite, gradients.losses.values())):
        m.optimizer.step()
        outcome.skips_in_a_row = 0
    else:
        outcome.skips_in_a_row += 1
        outcome.skipped += 1
    event: dict[str, Any] = {"step": step, **gradients.losses, "grad_norm": norm, "tokens": gradients.tokens}
    if faint:
        event["faint"] = True
    if gradients.shares is not None:
        event["shares"] = gradients.shares
    m.controller.step(gradients.losses.get("kl"))
    event["multipliers"] = {"forget": m.controller.scale("forget"), "retain": m.controller.scale("retain")}
    return event


# -- looks -----------------------------------------------------------------------------------------------


def _at_the_start(policy: Policy, roles: Roles, reference: Reference, config: Config, observe: Observer) -> Outcome:
    """The outcome of no step at all: the adapter as it begins, and the first look."""
    outcome = Outcome(policy.adapter_state(), look(policy, roles, reference, config, 0))
    outcome.probes.append(outcome.best)
    observe({"step": 0, "forget": outcome.best.forget, "drift": outcome.best.drift})
    return outcome


def _consider(outcome: Outcome, probe: Probe, policy: Policy, stop: StopConfig) -> None:
    """Keep the adapter of this look if it is the best one so far, or as good as can be told and has healed longer."""
    outcome.probes.append(probe)
    finite = math.isfinite(probe.forget) and math.isfinite(probe.drift)
    better = probe.rank(stop) < outcome.best.rank(stop) and has_moved(outcome.probes[0], probe, stop)
    if finite and (better or as_good(probe, outcome.probes, stop)):
        outcome.best, outcome.state = probe, policy.adapter_state()


def _steer(m: _Machine, outcome: Outcome, probe: Probe, policy: Policy, event: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a look: push harder where nothing moves, go back where the drift is too large, and let the rate fall
    where the target is met. Returns what the event says of it."""
    stop, looks, said = m.config.stop, len(outcome.probes) - 1, {}
    m.controller.look(probe.forget, probe.drift, has_kl="kl" in event)
    if over(outcome.probes, stop):
        outcome.returns += 1
        m.pace.halve()
        m.pace.rise()
        m.controller.push_harder(1 / _HARDER)
        m.controller.hold_harder()
        policy.load_adapter_state(outcome.state)
        m.optimizer.state.clear()  # its momentum points to where the run went wrong
        return {"back_to": outcome.best.step}
    if is_behind(outcome.probes[0], probe, m.config):
        m.controller.push_harder(_HARDER)
        if looks == 2 and probe.forget > _STILL * outcome.probes[0].forget:
            outcome.still, said = True, {"still": True}
    learnt = event.get(TAUGHT.name, 0.0) <= _LEARNT
    if probe.met(stop) and probe.step >= m.epoch and learnt:
        m.pace.settle(probe.step)
    elif m.pace.settled(probe.step) and not probe.met(stop):
        m.pace.rise()
    return said


def _reason_to_stop(outcome: Outcome, stop: StopConfig, pace: Pace) -> str | None:
    """Return why a run ends before its steps are done, after a look."""
    last = outcome.probes[-1]
    if last.step != outcome.steps:
        return None
    if outcome.returns > stop.patience:
        return f"drift above {stop.max_drift:g} nats/token again after going back {stop.patience} times"
    if last.met(stop) and pace.settled(last.step):
        return f"forget target {stop.target:g} met, and the rate has fallen to 0"
    if pace.config.schedule == "constant" and len(outcome.probes) > stop.patience:
        recent = outcome.probes[-stop.patience :]
        if all(p.met(stop) for p in recent) and last.drift >= fmean(p.drift for p in recent[:-1]):
            return f"forget target {stop.target:g} met, and no better for {stop.patience} looks"
    return None
