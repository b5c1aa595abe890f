"""The training loop: the file to read first.

One step draws bad rows, with other answers where the objective wants them, and normal rows, puts each through its
loss, and moves the adapter. Every few steps early stopping (stopping.py) looks at how probable each bad answer still
is and how far the model has drifted: it keeps the best adapter, steers weights and learning rate, and ends the run.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from qunlearn.config.settings import Config
from qunlearn.errors import DoesNotFitError, is_out_of_memory
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Reference
from qunlearn.objectives.control import Controller, make_controller
from qunlearn.objectives.table import OBJECTIVES, Term, terms_of
from qunlearn.parallel.ranks import current
from qunlearn.roles.roles import Roles
from qunlearn.training.checkpoint import NO_CHECKPOINTS, Checkpoints, Part, Snapshot, TrainState
from qunlearn.training.gradients import Gradients, MicroBatcher, block_of
from qunlearn.training.optimizer import clip, make_optimizer
from qunlearn.training.outcome import Outcome
from qunlearn.training.sampler import Step, draw_steps, longest_step
from qunlearn.training.schedule import Schedule, auto_lr
from qunlearn.training.stopping import BACK_TO, EarlyStopping

Observer = Callable[[Mapping[str, Any]], None]


def train(
    policy: Policy,
    roles: Roles,
    reference: Reference,
    config: Config,
    observe: Observer,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
    stopping: type[EarlyStopping] | None = EarlyStopping,
    terms: Sequence[Term] | None = None,
) -> Outcome:
    """Train the adapter until early stopping ends the run, or the steps are done; returns what it led to.

    The policy ends with the best adapter loaded, or without `stopping` with that of the last step. Ctrl-C ends the
    loop like a stop does, with `interrupted` set. Resumes from the newest checkpoint, to the same bits. `observe` gets
    each step's event. `terms` are the losses, by default the objective's. Several processes run it side by side: what
    follows from a step is the same in all of them. Raises NoGradientError, DoesNotFitError, ProcessLostError.
    """
    ranks = current()
    c, terms = config.train, terms_of(config.objective) if terms is None else terms
    parameters = policy.parts()
    peak = c.lr if c.lr is not None else auto_lr(policy.hidden_size, OBJECTIVES[config.objective.name].lr)
    optimizer, schedule, controller = make_optimizer(parameters, c, peak), Schedule(c), make_controller(config)
    rule = stopping(policy, roles, reference, config, schedule, controller) if stopping else None
    sampler = draw_steps(roles, terms, config, rule.come_back if rule else ())
    micro_batches = MicroBatcher(policy, reference, config, observe)
    # Whatever else in the loop has a state of its own goes in here by name, with state() and load_state().
    parts: dict[str, Part] = {"micro_batches": micro_batches, "controller": controller, "schedule": schedule}
    parts |= {"stopping": rule} if rule else {}
    state = TrainState(policy, optimizer, {**parts, **checkpoints.parts})
    found = checkpoints.latest_of_all()
    outcome = Outcome.of(found) if found else rule.start(observe) if rule else Outcome.unwatched()
    torch.manual_seed(c.seed)
    start = time.monotonic() - outcome.seconds
    policy.model.train()
    with _ending(outcome):
        _go_on(state, found, sampler, outcome.steps, c.seed)
        _try_longest(policy, micro_batches, longest_step(roles, terms, config), outcome.steps)
        for step in schedule.steps(outcome.steps):
            _set_rate(optimizer, peak * schedule.rate(step))
            batch = next(sampler)
            gradients = micro_batches.backward(batch, step_number=step, scale=controller.scale)
            faint = step == 1 and policy.check_gradients(_highest(terms, config, policy))
            norm = clip(policy, parameters, c.clip if c.clip > 0 else math.inf)
            if outcome.counted(step, gradients.tokens, _finite(norm, gradients)):
                optimizer.step()
            controller.step(gradients.losses.get("kl"))
            outcome.seconds = time.monotonic() - start
            event = _event(step, gradients, norm, outcome, controller, faint=faint)
            if rule and rule.due(step):
                event |= rule.look(outcome, step, event)
                if BACK_TO in event:
                    optimizer.state.clear()  # its momentum points to where the run went wrong
            start += _observed(observe, event)
            if outcome.is_over(config.stop.max_skips, rule.reason(outcome) if rule else None):
                break
            last = ranks.asked_to_stop(checkpoints.stopping())
            if checkpoints.due(step, last=last):  # after the decision to go on: who resumes does not take it again
                checkpoints.save(step, state.snapshot(outcome.values(), outcome.state))
            if last and step < schedule.last:
                raise KeyboardInterrupt
    outcome.multipliers, outcome.seconds = controller.state(), time.monotonic() - start
    return _finished(policy, outcome, best=rule is not None)


def _try_longest(policy: Policy, micro_batches: MicroBatcher, longest: Step, step: int) -> None:
    """Put the longest step through, on a GPU: running out of memory shows in the first second. It draws nothing from
    what the steps are drawn from."""
    if policy.device.type == "cuda":
        with torch.random.fork_rng(policy.base.devices):
            micro_batches.backward(longest, step_number=step)


def _go_on(state: TrainState, found: Snapshot | None, sampler: Iterator[Step], steps: int, seed: int) -> None:
    """Put everything where it was after so many steps. What was drawn follows from the seed: draw it again."""
    if found:
        state.restore(found)
    current().draw_apart(seed, steps)
    for _ in range(steps):
        next(sampler)


def _set_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _observed(observe: Observer, event: Mapping[str, Any]) -> float:
    """Hand an event over; returns the seconds that this took, which are not the loop's."""
    before = time.monotonic()
    observe(event)
    return time.monotonic() - before


def _finished(policy: Policy, outcome: Outcome, *, best: bool) -> Outcome:
    """Leave the policy with the best adapter, or the last one where none was chosen, which the outcome then holds."""
    if best:
        policy.load_adapter_state(outcome.state)
    else:
        outcome.state = policy.adapter_state()
    policy.model.eval()
    return outcome


def _highest(terms: Sequence[Term], config: Config, policy: Policy) -> int | None:
    """The block above which no gradient is expected: where every loss looks at one block's output, that block."""
    return block_of(config, policy) if all(term.layered for term in terms) else None


def _finite(norm: float, gradients: Gradients) -> bool:
    return math.isfinite(norm) and all(map(math.isfinite, gradients.losses.values()))


def _event(
    step: int, gradients: Gradients, norm: float, outcome: Outcome, controller: Controller, *, faint: bool
) -> dict[str, Any]:
    """Return a step as metrics.jsonl has it; `faint`: the optimizer's rounding decides about so small a gradient."""
    event: dict[str, Any] = {"step": step, **gradients.losses, "grad_norm": norm, "tokens": gradients.tokens}
    if faint:
        event["faint"] = True
    if gradients.shares is not None:
        event["shares"] = gradients.shares
    event["multipliers"] = {role: controller.scale(role) for role in ("forget", "retain")}
    return event | {"tokens_per_s": outcome.tokens / max(outcome.seconds, 1e-9), "seconds": outcome.seconds}


@contextlib.contextmanager
def _ending(outcome: Outcome) -> Iterator[None]:
    """End the loop at Ctrl-C with the outcome so far, and name a lack of memory. Raises DoesNotFitError."""
    try:
        yield
    except KeyboardInterrupt:
        outcome.interrupted, outcome.reason = True, "interrupted"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "lower --max-length or --lora-r, take --optimizer adamw8bit, or a smaller model"
        raise DoesNotFitError("out of memory while training", where=f"step {outcome.steps + 1}", hint=hint) from error
