"""One step of the objective: what is drawn, and how its gradients come about in as few forward passes as possible."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qunlearn.config import Config
from qunlearn.data.batch import collate, families, micro_batches
from qunlearn.data.roles import Mismatcher, batches
from qunlearn.data.tokenize import Example
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Reference
from qunlearn.objectives.losses import Supervised
from qunlearn.objectives.table import Term


@dataclass(frozen=True)
class Roles:
    """The data of a run by role. `held_back` is normal data that is never trained on: drift is measured there."""

    forget: Sequence[Example]
    retain: Sequence[Example]
    held_back: Sequence[Example]
    mismatcher: Mismatcher


@dataclass(frozen=True)
class Step:
    """The work of one optimizer step: (term, example) pairs; `groups` are indices of those that begin alike."""

    items: tuple[tuple[Term, Example], ...]
    groups: tuple[tuple[int, ...], ...]

    def of(self, role: str) -> list[Example]:
        """The different examples of a role, in the order they were drawn."""
        return list({id(example): example for term, example in self.items if term.role == role}.values())


@dataclass(frozen=True)
class Gradients:
    """What a step found on its way: each term's loss per supervised token, and the tokens of the forward passes."""

    losses: dict[str, float]
    tokens: int


def draw_steps(roles: Roles, terms: Sequence[Term], config: Config) -> Iterator[Step]:
    """Endless steps, drawn from the seed alone."""
    c = config.train
    rng = random.Random(c.seed)
    forget = batches(len(roles.forget), min(c.batch_size, len(roles.forget)), rng)
    retain = batches(len(roles.retain), min(c.normal_batch_size, len(roles.retain)), rng)
    wanted = {term.role for term in terms}
    k = config.objective.mismatch_k if "mismatch" in wanted else 0
    while True:
        bad, normal = [roles.forget[i] for i in next(forget)], [roles.retain[i] for i in next(retain)]
        pairs = [roles.mismatcher.draw(example, k, rng) for example in bad]
        yield make_step(terms, bad, pairs, normal)


def make_step(
    terms: Sequence[Term], bad: Sequence[Example], pairs: Sequence[Sequence[Example]], normal: Sequence[Example]
) -> Step:
    """Every term on the rows of its role; a bad row and its mismatched answers form a group."""
    items: list[tuple[Term, Example]] = []
    groups: list[tuple[int, ...]] = []
    together = [{"forget": [e], "mismatch": list(p)} for e, p in zip(bad, pairs, strict=True)]
    for roles in [*together, *({"retain": [e]} for e in normal)]:
        start = len(items)
        items += [(term, example) for term in terms for example in roles.get(term.role, [])]
        groups.append(tuple(range(start, len(items))))
    return Step(tuple(items), tuple(group for group in groups if group))


def longest_step(roles: Roles, terms: Sequence[Term], config: Config) -> Step:
    """A step of the longest rows there are: what fits it fits every step."""

    def longest(examples: Sequence[Example], n: int) -> list[Example]:
        return sorted(examples, key=lambda example: -len(example.input_ids))[:n]

    bad = longest(roles.forget, config.train.batch_size)
    k = config.objective.mismatch_k if any(term.role == "mismatch" for term in terms) else 0
    pairs = [roles.mismatcher.longest(example, k) for example in bad]
    return make_step(terms, bad, pairs, longest(roles.retain, config.train.normal_batch_size))


class Budget:
    """The tokens of one forward pass: as many as asked for, and half of them whenever memory runs out."""

    def __init__(
        self, policy: Policy, reference: Reference, config: Config, observe: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.policy, self.reference, self.config, self.observe = policy, reference, config, observe
        self.max_tokens = config.train.max_tokens

    def state(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.max_tokens = int(state["max_tokens"])

    def backward(self, step: Step, *, step_number: int) -> Gradients:
        """The step's gradients, from zero; out of memory, the same step again in smaller pieces, with the same
        random numbers. Raises torch.OutOfMemoryError when even single rows do not fit."""
        longest = max(len(example.input_ids) for _, example in step.items)
        while True:
            self.policy.model.zero_grad(set_to_none=True)
            random_state = _random_state(self.policy.device)
            try:
                return backward(self.policy, step, self.reference, self.config, self.max_tokens)
            except torch.OutOfMemoryError:
                if self.max_tokens <= longest:
                    raise
            _release(self.policy, random_state)
            self.max_tokens //= 2
            self.observe({"step": step_number, "max_tokens": self.max_tokens})


def backward(policy: Policy, step: Step, reference: Reference, config: Config, limit: int) -> Gradients:
    """Add the step's gradients to the adapter's, with at most `limit` tokens in a forward pass.

    Rows of all terms share forward passes: 4-bit weights are dequantised once per pass. Normalised by the step's
    supervised tokens of each term, so that packing, padding and the split into micro-batches change nothing.
    """
    examples, spans = [e for _, e in step.items], [t.span for t, _ in step.items]
    terms = {term.name: term for term, _ in step.items}
    supervised = {n: sum(t.span.count(e) for t, e in step.items if t.name == n) for n in terms}
    states = _reference_states(step, reference)
    pack = config.train.pack and policy.packs(examples)
    groups = step.groups if pack else [(i,) for i in range(len(examples))]
    losses = {name: torch.zeros((), device=policy.device) for name in terms}
    tokens = 0
    for rows in micro_batches(families(examples, groups, limit), limit, pack=pack):
        batch = collate(examples, spans, policy.tokenizer.pad_token_id, rows).to(policy.device)
        with _offloaded(config, policy.device):
            h = batch.pick(policy.hidden(batch))
        loss = torch.zeros((), device=policy.device)
        for name, term in terms.items():
            members = [i for i in batch.examples if step.items[i][0] is term]
            if not members:
                continue
            mine = torch.isin(batch.rows, torch.tensor(members, device=batch.rows.device))
            h_ref = torch.cat([states[i] for i in members]) if term.reference else None
            value = term.loss(Supervised(h[mine], h_ref, batch.labels[mine], policy.head), config.objective)
            value = value.sum() / supervised[name]
            loss = loss + term.weight(config.objective) * value
            losses[name] += value.detach()
        torch.autograd.backward(loss)
        tokens += batch.tokens
    return Gradients({name: float(value) for name, value in losses.items()}, tokens)


def _reference_states(step: Step, reference: Reference) -> dict[int, Tensor]:
    """The untouched model's hidden states (n, D) at the supervised positions of each item that wants them."""
    wanted = [i for i, (term, _) in enumerate(step.items) if term.reference]
    if not wanted:
        return {}
    found = reference.states([step.items[i][1] for i in wanted], [step.items[i][0].span for i in wanted])
    return dict(zip(wanted, found, strict=True))


def _offloaded(config: Config, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """What checkpointing keeps, the inputs of the layers, waits in the host's memory for the backward pass."""
    if not config.train.offload:
        return contextlib.nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _release(policy: Policy, random_state: Sequence[Tensor]) -> None:
    """Give back what the failed attempt holds, and put the random numbers where they were before it."""
    policy.model.zero_grad(set_to_none=True)
    torch.set_rng_state(random_state[0])
    if policy.device.type == "cuda":
        torch.cuda.set_rng_state(random_state[1], policy.device)
        torch.cuda.empty_cache()
