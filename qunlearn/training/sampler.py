"""Draw the rows of each step from the seed, and group what belongs to one prompt."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qunlearn.config.settings import Config
from qunlearn.data.tokenize import Example
from qunlearn.objectives.table import Term
from qunlearn.roles.roles import Roles

_VARIANT = 0.5  # share of the draws of a row that are of its variants, where it has any


@dataclass(frozen=True)
class Step:
    """The work of one optimizer step: (term, example) pairs; `groups` are indices of those that begin alike."""

    items: tuple[tuple[Term, Example], ...]
    groups: tuple[tuple[int, ...], ...]

    def of(self, role: str) -> list[Example]:
        """The different examples of a role, in the order they were drawn."""
        return list({id(example): example for term, example in self.items if term.role == role}.values())

    def part(self, role: str) -> Step:
        """Return what it does with the rows of one role."""
        kept = [i for i, (term, _) in enumerate(self.items) if term.role == role]
        place = {i: n for n, i in enumerate(kept)}
        groups = (tuple(place[i] for i in group if i in place) for group in self.groups)
        return Step(tuple(self.items[i] for i in kept), tuple(group for group in groups if group))


def draw_steps(roles: Roles, terms: Sequence[Term], config: Config, come_back: Collection[int] = ()) -> Iterator[Step]:
    """Endless steps, drawn from the seed alone: of the reserve those whose places have come back by then. Whether any
    have changes nothing of what else is drawn."""
    c = config.train
    rng, of_reserve = random.Random(c.seed), random.Random(c.seed + 1)
    reserve: dict[int, list[int]] = {}
    for one in roles.reserve:
        reserve.setdefault(one.of, []).append(one.place)
    forget = batches(roles.rows, min(c.batch_size, roles.rows), rng)
    retain = batches(len(roles.retain), min(c.normal_batch_size, len(roles.retain)), rng)
    wanted = {term.role for term in terms}
    k = config.objective.mismatch_k if "mismatch" in wanted else 0
    while True:
        chosen, retain_rows = next(forget), [roles.retain[i] for i in next(retain)]
        forget_rows = []
        for row in chosen:
            i = _start(roles.starts[row], rng) if roles.starts else row
            drawn = _in_other_words(i, reserve[i], come_back, of_reserve) if i in reserve else i
            example = roles.forget[drawn]
            companions = {"forget": [example], "mismatch": roles.mismatcher.draw(example, k, rng) if k else []}
            for role, rows in (("instead", roles.instead), ("taught", roles.taught)):
                if rows and rows[i]:
                    companions[role] = _other(rows, i, drawn, rng)
            if "pair" in wanted:
                companions["pair"] = [example, *_other(roles.alternatives, i, drawn, rng)]
            forget_rows.append(companions)
        yield make_step(terms, forget_rows, retain_rows)


def _start(starts: Sequence[int], rng: random.Random) -> int:
    """Draw a row as it is half of the time, else one of its variants."""
    own, *later = starts
    return rng.choice(later) if later and rng.random() < _VARIANT else own


def _in_other_words(row: int, reserve: Sequence[int], come_back: Collection[int], rng: random.Random) -> int:
    """Draw a row as it is, or half of the time one of its wordings that have come back, where any have."""
    there = [place for place in reserve if place in come_back]
    again, n = rng.random() < _VARIANT, rng.random()
    return there[int(n * len(there))] if there and again else row


def _other(rows: Sequence[Sequence[Example]], row: int, drawn: int, rng: random.Random) -> list[Example]:
    """Draw another answer of a row, behind the wording that was drawn of it."""
    n, others = rng.choice(range(len(rows[row]))), rows[drawn]
    return [others[n % len(others)]] if others else []


def make_step(
    terms: Sequence[Term], forget_rows: Sequence[Mapping[str, Sequence[Example]]], retain_rows: Sequence[Example]
) -> Step:
    """Every term on the rows of its role; what belongs to one bad prompt, by role, forms a group."""
    items: list[tuple[Term, Example]] = []
    groups: list[tuple[int, ...]] = []
    for roles in [*forget_rows, *({"retain": [e]} for e in retain_rows)]:
        start = len(items)
        items += [(term, example) for term in terms for example in roles.get(term.role, [])]
        groups.append(tuple(range(start, len(items))))
    return Step(tuple(items), tuple(group for group in groups if group))


def longest_step(roles: Roles, terms: Sequence[Term], config: Config) -> Step:
    """A step of the longest rows there are: what fits it fits every step."""

    def longest(examples: Sequence[Example], n: int) -> list[Example]:
        return sorted(examples, key=lambda example: -len(example.input_ids))[:n]

    k = config.objective.mismatch_k if any(term.role == "mismatch" for term in terms) else 0
    others = {id(e): longest(a, 1) for e, a in zip(roles.forget, roles.alternatives, strict=False)}
    instead = {id(e): longest(a, 1) for e, a in zip(roles.forget, roles.instead, strict=False)}
    taught = {id(e): longest(a, 1) for e, a in zip(roles.forget, roles.taught, strict=False)}
    forget_rows = [
        {
            "forget": [e],
            "mismatch": roles.mismatcher.longest(e, k),
            "pair": [e, *others.get(id(e), [])],
            "instead": instead.get(id(e), []),
            "taught": taught.get(id(e), []),
        }
        for e in longest(roles.forget, config.train.batch_size)
    ]
    return make_step(terms, forget_rows, longest(roles.retain, config.train.normal_batch_size))


def batches(n: int, size: int, rng: random.Random) -> Iterator[list[int]]:
    """Endless batches of row numbers, each row once per epoch; the last batch of an epoch borrows from the next."""
    queue: list[int] = []
    while True:
        while len(queue) < size:
            epoch = list(range(n))
            rng.shuffle(epoch)
            queue += epoch
        yield queue[:size]
        queue = queue[size:]
