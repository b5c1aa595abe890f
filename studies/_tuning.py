"""Supervised fine-tuning of the adapter on good answers: what unlearning is measured against.

The same adapter, steps, rows a step and schedule as `qunlearn forget`; the loss is the NLL of the good answer to each
bad prompt, and of the normal rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from qunlearn.config.settings import Config
from qunlearn.data.batch import CLOSED
from qunlearn.data.tokenize import Example
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Live
from qunlearn.objectives.losses import nll
from qunlearn.objectives.table import Term
from qunlearn.training.gradients import backward
from qunlearn.training.sampler import batches, make_step
from qunlearn.training.schedule import Schedule, auto_lr

_GOOD = Term("good", "forget", CLOSED, lambda c: 1.0, lambda s, c: nll(s))
_NORMAL = Term("normal", "retain", CLOSED, lambda c: 1.0, lambda s, c: nll(s))


@dataclass(frozen=True)
class Tuned:
    """What the loop has done so far."""

    step: int
    tokens: int
    losses: dict[str, float]


def fine_tune(
    policy: Policy,
    good: Sequence[Example],
    normal: Sequence[Example],
    config: Config,
    enough: Callable[[Tuned], bool] = lambda _: False,
) -> Tuned:
    """Train until `enough` says so after a step, or the steps are done."""
    c, rng = config.train, random.Random(config.train.seed)
    parameters = list(policy.trainable().values())
    lr = c.lr if c.lr is not None else auto_lr(policy.hidden_size)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=c.weight_decay)
    of_good = batches(len(good), min(c.batch_size, len(good)), rng)
    of_normal = batches(len(normal), min(c.normal_batch_size, len(normal)), rng) if normal else None
    policy.model.train()
    done = Tuned(0, 0, {})
    pace = Schedule(replace(c, schedule="linear"))
    for step in range(1, c.most_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * pace.rate(step)
        answers = [{"forget": [good[i]]} for i in next(of_good)]
        kept = [normal[i] for i in next(of_normal)] if of_normal else []
        work = make_step((_GOOD, _NORMAL), answers, kept)
        optimizer.zero_grad(set_to_none=True)
        found = backward(policy, work, Live(policy, c.max_tokens), config, c.max_tokens)
        torch.nn.utils.clip_grad_norm_(parameters, c.clip)
        optimizer.step()
        done = Tuned(step, done.tokens + found.tokens, found.losses)
        if enough(done):
            break
    policy.model.eval()
    return done
