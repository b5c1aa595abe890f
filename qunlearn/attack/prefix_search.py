"""Family B: search tokens in front of a question that make the answer likelier, by greedy coordinate gradient.

Source: Zou et al., "Universal and Transferable Adversarial Attacks on Aligned Language Models" (arXiv 2307.15043),
algorithm 1, for one fact at a time and with a small budget. Every subject searches for itself with the same budget: a
search that finds an answer in a model that never knew it has made the answer up, and the control shows how often.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qunlearn.attack.bench import WORDY_ROOM, Bench, Probe, overlap
from qunlearn.attack.cells import Cell
from qunlearn.attack.facts import Fact, context, derivable
from qunlearn.attack.layers import answer_logps
from qunlearn.data.control_tokens import control_ids
from qunlearn.data.tokenize import Example
from qunlearn.model.load import backbone
from qunlearn.parallel.queue import work_through

LENGTH, STEPS, WIDTH, TOP = 8, 16, 32, 64  # tokens of a prefix; rounds; candidates a round; tokens tried at a place
MOST_FACTS = 40


@dataclass(frozen=True)
class Task:
    """A question with room for a prefix at `place`, and its answer behind it: ids[start:] with the prefix counted."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    start: int

    def rows(self, prefixes: Tensor) -> Tensor:
        """(B, LENGTH) -> (B, T): whole rows of token ids."""
        before, after = (prefixes.new_tensor([part] * len(prefixes)) for part in (self.before, self.after))
        return torch.cat([before, prefixes, after], dim=1)


@dataclass(frozen=True)
class Found:
    """A prefix, the answer's NLL in nats per token with the first prefix and with this one, and the tokens it took."""

    prefix: tuple[int, ...]
    before: float
    after: float
    tokens: int


def run(bench: Bench) -> Cell:
    """Return the outcomes of questions behind the prefixes found for them; `more["searched"]` has the budget.

    Several processes that attack together divide the questions.
    """
    tasks = [(i, task) for i, f in list(enumerate(bench.facts))[:MOST_FACTS] if f.asks and (task := _task(bench, f))]
    best: dict[int, Found] = {}

    def searched(of: tuple[int, Task]) -> dict[str, Any]:
        i, task = of
        return asdict(search(bench, task, allowed_tokens(bench, task), seed=i))

    def hear(of: tuple[int, Task], found: Mapping[str, Any]) -> None:
        best[of[0]] = Found(**{**found, "prefix": tuple(found["prefix"])})

    work_through(tasks, searched, hear)
    found, probes, dropped = [best[i] for i, _ in tasks], [], 0
    for (i, task), one in zip(tasks, found, strict=True):
        fact = bench.facts[i]
        text = str(bench.lm.tokenizer.decode(list(one.prefix)))
        given = f"{text} {context(fact.record)}"
        if derivable(fact.record.completion, fact.record.prompt, given):
            dropped += 1
            continue
        ids = (*task.before, *one.prefix, *task.after[: task.start - len(task.before) - LENGTH])
        probes.append(Probe(i, ids, fact.record.completion, given))
    more: dict[str, Any] = {"prompts": len(probes), "overlap": overlap(probes, bench.facts), "dropped": dropped}
    if found:
        more["searched"] = {
            "length": LENGTH,
            "steps": STEPS,
            "width": WIDTH,
            "tokens": sum(f.tokens for f in found),
            "nll_before": sum(f.before for f in found) / len(found),
            "nll_after": sum(f.after for f in found) / len(found),
        }
    return Cell(bench.spread(probes, bench.leaked(probes, room=WORDY_ROOM)), more)


def _task(bench: Bench, fact: Fact) -> Task | None:
    """Where a prefix goes: in front of the last question's own text, behind what the template says. None where it does
    not fit."""
    example = bench.encode(fact.record)
    if len(example.input_ids) + LENGTH > bench.max_length:
        return None
    place = _common(*(bench.encode(fact.record.asking(f"{c}{fact.record.prompt}")) for c in "0A"))
    place = min(place, example.start)
    return Task(example.input_ids[:place], example.input_ids[place : example.end], example.start + LENGTH)


def _common(first: Example, second: Example) -> int:
    pairs = enumerate(zip(first.input_ids, second.input_ids, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first.input_ids), len(second.input_ids)))


def allowed_tokens(bench: Bench, task: Task) -> Tensor:
    """Return the ids that a prefix may have: no control token, and none of the answer's, which would inject it."""
    tokenizer, table = bench.lm.tokenizer, _embeddings(bench).weight
    answer = task.after[task.start - len(task.before) - LENGTH :]
    barred = control_ids(tokenizer).union(answer)
    known = min(len(tokenizer), len(table))
    return torch.tensor([i for i in range(known) if i not in barred], device=bench.lm.device)


def search(bench: Bench, task: Task, allowed: Tensor, *, seed: int) -> Found:
    """Return the best prefix of STEPS rounds: in each, WIDTH single changes among the TOP tokens of the gradient at a
    place, of which the best is kept where it is better. The budget is used up, whatever is found."""
    rng = random.Random(f"prefix search {seed}")
    prefix = allowed[torch.tensor([rng.randrange(len(allowed)) for _ in range(LENGTH)], device=allowed.device)]
    tokens = 0
    best = before = float(_nlls(bench, task, prefix.unsqueeze(0))[0])
    for _ in range(STEPS):
        slope = _gradient(bench, task, prefix, allowed)
        top = allowed[slope.topk(min(TOP, len(allowed)), dim=1, largest=False).indices]
        tried = prefix.repeat(WIDTH, 1)
        for row in range(WIDTH):
            at = rng.randrange(LENGTH)
            tried[row, at] = top[at, rng.randrange(top.shape[1])]
        nlls = _nlls(bench, task, tried)
        tokens += (1 + WIDTH) * (len(task.before) + LENGTH + len(task.after))
        if float(nlls.min()) < best:
            best, prefix = float(nlls.min()), tried[int(nlls.argmin())]
    return Found(tuple(prefix.tolist()), before, best, tokens)


@torch.no_grad()
def _nlls(bench: Bench, task: Task, prefixes: Tensor) -> Tensor:
    """(B, LENGTH) -> (B,): the answer's NLL behind each prefix."""
    rows = task.rows(prefixes)
    size = max(1, bench.config.train.pass_tokens // rows.shape[1])
    return torch.cat([_answer_nll(bench, task, part) for part in torch.split(rows, size)])


def _answer_nll(bench: Bench, task: Task, rows: Tensor) -> Tensor:
    states = backbone(_model(bench))(input_ids=rows).last_hidden_state[:, task.start - 1 : -1]
    labels = rows[:, task.start :]
    logps = answer_logps(states.flatten(0, 1), labels.flatten(), bench.lm.head)
    return -logps.view_as(labels).mean(dim=1)


def _gradient(bench: Bench, task: Task, prefix: Tensor, allowed: Tensor) -> Tensor:
    """(LENGTH, allowed): how the loss would change with each token at each place, to first order."""
    table, caught = _embeddings(bench), []

    def catch(_: Any, __: Any, out: Tensor) -> Tensor:
        caught.append(out.detach().requires_grad_())
        return caught[-1]

    hook = table.register_forward_hook(catch)
    try:
        with torch.enable_grad():
            loss = _answer_nll(bench, task, task.rows(prefix.unsqueeze(0)))[0]
            (slope,) = torch.autograd.grad(loss, caught[-1])
    finally:
        hook.remove()
    own = slope[0, len(task.before) : len(task.before) + LENGTH]
    weight: Tensor = table.weight
    found = own.float().to(weight.device) @ weight[allowed.to(weight.device)].float().T
    return found.to(prefix.device)


def _model(bench: Bench) -> Any:
    return bench.policy.base.model


def _embeddings(bench: Bench) -> Any:
    return _model(bench).get_input_embeddings()
