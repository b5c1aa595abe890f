"""Accumulate the gradients of a step in as few forward passes, and as little memory, as possible."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qunlearn.config.settings import Config
from qunlearn.data.batch import Batch, PrefixGroup, Row, micro_batches, prefix_groups
from qunlearn.data.tokenize import is_passage
from qunlearn.errors import ConfigError, is_out_of_memory
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Reference
from qunlearn.objectives.losses import Supervised
from qunlearn.objectives.table import ANSWERS, OBJECTIVES, PAIRS, ROWS, TOKEN, Term
from qunlearn.parallel.division import my_share
from qunlearn.parallel.parts import in_shards
from qunlearn.parallel.ranks import current
from qunlearn.training.gradients_by_loss import Apart
from qunlearn.training.sampler import Step


class Scale(Protocol):
    """Multiplies the weights of a role's terms: those of rows that are at the target, and those of the others."""

    def __call__(self, role: str, *, met: bool = False) -> float: ...


Push = Callable[[Mapping[str, Tensor]], None]  # takes the weighted losses of a pass by term, and their gradients


def _unscaled(role: str, *, met: bool = False) -> float:
    return 1.0


@dataclass(frozen=True)
class Gradients:
    """What a step found on its way: each term's loss per supervised token (or answer), the tokens of the forward
    passes, and each term's share of a common descent direction."""

    losses: dict[str, float]
    tokens: int
    shares: dict[str, float] | None = None

    def numbers(self) -> dict[str, float]:
        """Return what is summed over processes."""
        return {**self.losses, _TOKENS: float(self.tokens)}

    @classmethod
    def of(cls, sums: Mapping[str, float]) -> Gradients:
        """Return the sums of several processes as one's."""
        losses = dict(sums)
        return cls(losses, round(losses.pop(_TOKENS)))


_TOKENS = "tokens of the forward passes"


class MicroBatcher:
    """The tokens of one forward pass: as many as asked for, and half of them whenever memory runs out.

    Of several processes each makes the passes of its share, and their gradients are summed.
    """

    def __init__(
        self, policy: Policy, reference: Reference, config: Config, observe: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.policy, self.reference, self.config, self.observe = policy, reference, config, observe
        self.max_tokens = config.train.pass_tokens
        self.descent = OBJECTIVES[config.objective.name].descent
        if config.train.compile != "off" and recordable(config):
            policy.record_passes(lambda why: observe({"step": 0, "compile": why}))

    def state(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.max_tokens = int(state["max_tokens"])

    def backward(self, step: Step, *, step_number: int, scale: Scale = _unscaled) -> Gradients:
        """The step's gradients, from zero; out of memory, the same step again in smaller pieces, with the same
        random numbers. Raises torch.OutOfMemoryError when even single rows do not fit."""
        longest = max(len(example.input_ids) for _, example in step.items)
        while True:
            self.policy.zero_grad()
            random_state = _random_state(self.policy.device)
            found, short = None, ""
            try:
                with self.policy.cast_once():
                    found = self._passes(step, scale)
            except RuntimeError as error:
                if not is_out_of_memory(error) or current().shards is not None:  # the others are in the middle of it
                    raise
                short = str(error) or "out of memory"
            if not current().any(bool(short)) and found is not None:
                return self._summed(step, *found)
            recorded = current().any(self.policy.drop_recorded())
            if self.max_tokens <= longest and not recorded:
                raise torch.OutOfMemoryError(short or "out of memory in another process")
            found = None
            _release(self.policy, random_state)
            if recorded:
                self.observe({"step": step_number, "compile": "out of memory"})
                continue
            self.max_tokens //= 2
            self.observe({"step": step_number, "max_tokens": self.max_tokens})

    def _passes(self, step: Step, scale: Scale) -> tuple[Gradients, Apart | None]:
        """Make this process's passes; returns what they found, and the gradients that are kept apart."""
        if self.descent:
            return _apart(self.policy, step, self.reference, self.config, self.max_tokens)
        return backward(self.policy, step, self.reference, self.config, self.max_tokens, scale), None

    def _summed(self, step: Step, found: Gradients, apart: Apart | None) -> Gradients:
        """Leave the step's gradients, of all processes, in the parameters; returns what all passes found."""
        ranks = current()
        if apart is None:
            if ranks.count > 1:
                whole = [p for p in self.policy.trainable().values() if not in_shards(p)]
                found = Gradients.of(ranks.add_gradients(whole, found.numbers()))
            self.policy.take_gradients()
            return found
        if ranks.count > 1:
            found = Gradients.of(ranks.add(apart.unsummed(), found.numbers()))
        return replace(found, shares=apart.descend(_met(step, found, self.config)))


def recordable(config: Config) -> bool:
    """Return whether the settings leave passes that can be recorded: gradients that are not kept apart by term, and
    nothing on the host."""
    apart, host = OBJECTIVES[config.objective.name].descent, config.model.embeddings == "cpu"
    return config.train.pack and not (apart or host or config.train.offload)


def _together(losses: Mapping[str, Tensor]) -> None:
    torch.autograd.backward(sum(losses.values()))  # type: ignore[arg-type]


def backward(
    policy: Policy,
    step: Step,
    reference: Reference,
    config: Config,
    limit: int,
    scale: Scale = _unscaled,
    push: Push = _together,
) -> Gradients:
    """Add the step's gradients to the adapter's, with at most `limit` tokens in a forward pass.

    Rows of all terms share forward passes: 4-bit weights are dequantised once per pass. Normalised by the step's
    supervised tokens (or rows, answers, or pairs) of each term, so that packing, padding and the split into
    micro-batches change nothing. `scale` multiplies the weights of a role's terms. Of several processes each makes the
    passes of its share: what it adds and returns is summed over all later.
    """
    examples, spans = [e for _, e in step.items], [t.span for t, _ in step.items]
    terms = {term.name: term for term, _ in step.items}
    amounts = {name: _amount(step, term) for name, term in terms.items()}
    weights = torch.tensor([sum(term.span.weights(e)) for term, e in step.items], device=policy.device)
    shares = torch.tensor([e.share for e in examples], device=policy.device)
    rests = torch.tensor([e.rest for e in examples], device=policy.device)
    layer = block_of(config, policy) if any(term.layered for term in terms.values()) else None
    pack, paired = config.train.pack and policy.packs(examples), any(t.per == PAIRS for t in terms.values())
    groups = step.groups if pack else [(i,) for i in range(len(examples))]
    losses = {name: torch.zeros((), device=policy.device) for name in terms}
    tokens = 0
    # Both answers of a pair are one loss: a group of them is not split.
    made = prefix_groups(examples, groups, float("inf") if paired else limit)
    passes = my_share(made, limit, lambda most: _micro_batches(made, step, most, pack=pack, paired=paired))
    mine = sorted(i for rows in passes for row in rows for group in row for i in group.members)
    states = _reference_states(step, reference, layer, mine)
    for rows in passes:
        batch = policy.collate(examples, spans, rows, pack=pack)
        with _offloaded(config, policy.device):
            h = batch.pick(policy.hidden(batch, layer))
        weighted: dict[str, Tensor] = {}
        for name, term in terms.items():
            members = [i for i in batch.examples if step.items[i][0] is term]
            if not members or not amounts[name]:
                continue
            value = term.loss(_supervised(batch, h, members, states, policy, term, rests), config.objective)
            factor: Tensor | float = scale(term.role)
            if term.per in (TOKEN, ROWS):
                of_term = _of(batch, members)
                value = value * batch.weights[of_term]
                if term.per == ROWS:
                    value = value * (shares / weights)[batch.rows[of_term]]
                    if term.met:
                        factor = _by_progress(value.detach(), batch.rows[of_term], step, term, config, scale)
            weighted[name] = term.weight(config.objective) * (factor * value).sum() / amounts[name]
            losses[name] += value.detach().sum() / amounts[name]
        if weighted:
            push(weighted)
        tokens += batch.tokens
    return Gradients({name: float(value) for name, value in losses.items()}, tokens)


def _apart(policy: Policy, step: Step, reference: Reference, config: Config, limit: int) -> tuple[Gradients, Apart]:
    """Each term's gradient for itself.

    Role by role, for terms of one role look at the same rows: those go forward once, and backward for each term.
    """
    apart = Apart(policy, list(dict.fromkeys(term.name for term, _ in step.items)))
    losses: dict[str, float] = {}
    tokens = 0
    for role in dict.fromkeys(term.role for term, _ in step.items):
        found = backward(policy, step.part(role), reference, config, limit, push=apart.push)
        losses |= found.losses
        tokens += found.tokens
    return Gradients(losses, tokens), apart


def _met(step: Step, found: Gradients, config: Config) -> list[str]:
    """Return the terms that are at the target."""
    terms = {term.name: term for term, _ in step.items}
    return [
        name
        for name, term in terms.items()
        if term.met and found.losses[name] <= term.met(config.stop.target, 1.0, config.objective)
    ]


def _by_progress(value: Tensor, rows: Tensor, step: Step, term: Term, config: Config, scale: Scale) -> Tensor:
    """Return the weight of each token (N,) by its row: one that is at the target is left in peace, but for passages,
    which come back from the middle where only their mean is.

    `value` (N,) are the parts of the rows' means, `rows` (N,) the places of their examples in the step.
    """
    long = torch.tensor([is_passage(e) for _, e in step.items], device=rows.device)
    means = value.new_zeros(len(step.items)).index_add_(0, rows, value)
    met = [term.met(config.stop.target, e.rest, config.objective) for _, e in step.items]  # type: ignore[misc]
    above = (means > torch.tensor(met, device=rows.device)) | long
    return torch.where(above, scale(term.role), scale(term.role, met=True))[rows]


def block_of(config: Config, policy: Policy) -> int:
    """The block whose output a layered loss looks at. Raises ConfigError."""
    blocks, asked = policy.base.blocks, config.objective.layer
    layer = blocks // 4 if asked is None else asked
    if layer > blocks - 2:
        hint = f"the model has {blocks} blocks; at most {blocks - 2} can be steered"
        raise ConfigError(f"no block above block {layer}", where="objective.layer", hint=hint)
    return layer


def _amount(step: Step, term: Term) -> float:
    """Return what a term's sum is divided by: supervised tokens by weight, rows that have any, answers or pairs."""
    examples = [e for t, e in step.items if t is term]
    if term.per in (TOKEN, ROWS):
        weights = [sum(term.span.weights(e)) for e in examples]
        return sum(weights) if term.per == TOKEN else sum(weight > 0 for weight in weights)
    return len(examples) / 2 if term.per == PAIRS else len(examples)


def _micro_batches(made: Sequence[PrefixGroup], step: Step, limit: int, *, pack: bool, paired: bool) -> list[list[Row]]:
    """As `micro_batches`; unpacked pairs in passes of their own, both answers in the same one."""
    if pack or not paired:
        return micro_batches(made, limit, pack=pack)
    is_pair = [step.items[group.members[0]][0].per == PAIRS for group in made]
    alone = [group for group, yes in zip(made, is_pair, strict=True) if not yes]
    both = [group for group, yes in zip(made, is_pair, strict=True) if yes]
    return micro_batches(both, limit, pack=False, partners=2) + micro_batches(alone, limit, pack=False)


def _of(batch: Batch, members: Sequence[int]) -> Tensor:
    """(N,) bool: the supervised positions of these examples."""
    return torch.isin(batch.rows, torch.tensor(members, device=batch.rows.device))


def _supervised(
    batch: Batch,
    h: Tensor,
    members: Sequence[int],
    states: Mapping[int, Tensor],
    policy: Policy,
    term: Term,
    rests: Tensor,
) -> Supervised:
    """Return what a term's loss sees of a batch."""
    mine = _of(batch, members)
    h_ref = torch.cat([states[i] for i in members]) if term.reference else None
    owner = None
    if term.per in (ANSWERS, PAIRS):
        place = {i: n for n, i in enumerate(members)}
        owner = torch.tensor([place[i] for i in batch.rows[mine].tolist()], device=h.device)
    rest = rests[batch.rows[mine]]
    return Supervised(h[mine], h_ref, batch.labels[mine], policy.head, batch.weights[mine], owner, rest)


def _reference_states(step: Step, reference: Reference, layer: int | None, mine: Sequence[int]) -> dict[int, Tensor]:
    """The untouched model's hidden states (n, D) at the supervised positions of each of these items that wants them."""
    wanted = [i for i in mine if step.items[i][0].reference]
    if not wanted:
        return {}
    found = reference.states([step.items[i][1] for i in wanted], [step.items[i][0].span for i in wanted], layer)
    return dict(zip(wanted, found, strict=True))


def _offloaded(config: Config, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return what checkpointing keeps, the inputs of the layers, waits in the host's memory for the backward pass."""
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
