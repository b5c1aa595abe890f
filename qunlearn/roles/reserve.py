"""Hold bad rows in other words, and passages from other places, in reserve: what comes back while training is pushed
there as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example, Template, behind
from qunlearn.evaluation.metrics.texts import rouge_l_f1
from qunlearn.roles.own_words import is_long
from qunlearn.roles.reworded import Reworded
from qunlearn.roles.roles import Reserved, Roles

T = TypeVar("T")
_OTHERS = ("alternatives", "instead", "taught")  # of roles: what else than the bad answer is said
_ONE_IN = 4  # of so many wordings one is only measured
_RECITED = 0.8  # ROUGE-L F1 from which a long answer is the bad one, and not what it says in other words


@dataclass(frozen=True)
class _Held:
    """A row in reserve: as it is pushed and as looks see it, the place of its bad row, and what is said instead."""

    pushed: Example
    watched: Example
    of: int
    others: Mapping[str, Sequence[Example]]


def with_reserve(roles: Roles, found: Reworded, tokenizer: Any, template: Template, length: int) -> Roles:
    """Return the roles with three in four of the wordings behind all other bad rows: with the same answers, pushed as
    far, and the same said in their place. A behaviour is asked for in fewer words already, and has none; nor has a
    long answer that is given there in words of its own. `length` are the most tokens of a row."""
    if roles.phrases:
        return roles
    held: list[_Held] = []
    for wording, place in _three_in_four(found.rows, found.of):
        if _is_in_words_of_its_own(wording.record, roles.forget[place].record):
            continue

        def asked_so(answers: Sequence[Example], wording: Example = wording) -> list[Example]:
            made = (behind(answer, wording.record.turns, tokenizer, template, length) for answer in answers)
            return [row for row in made if row is not None]

        own = {role: getattr(roles, role)[place] for role in _OTHERS if getattr(roles, role)}
        theirs = {role: asked_so(answers) for role, answers in own.items()}
        asked = asked_so([roles.forget[place], roles.watched[place]])
        if len(asked) == 2 and not any(own[role] and not theirs[role] for role in own):
            held.append(_Held(asked[0], asked[1], place, theirs))
    return _with(roles, held)


def with_places(roles: Roles, pushed: Sequence[Example], watched: Sequence[Example], of: Sequence[int]) -> Roles:
    """Return the roles with three in four of the passages that are asked for from other places behind all other bad
    rows, weighed as they are pushed and as they are watched. Nothing is said in their place; an objective that needs
    another answer for each row has none of them."""
    if roles.phrases or roles.alternatives:
        return roles
    none: dict[str, list[Example]] = {role: [] for role in _OTHERS if getattr(roles, role)}
    held = []
    for (row, seen), place in _three_in_four([*zip(pushed, watched, strict=True)], of):
        known, rest = roles.forget[place].known, roles.forget[place].rest
        row, seen = (replace(example, known=known, rest=rest) for example in (row, seen))
        held.append(_Held(row, seen, place, none))
    return _with(roles, held)


def _three_in_four(rows: Sequence[T], of: Sequence[int]) -> Iterator[tuple[T, int]]:
    """Yield the rows with the places of their bad rows, but every fourth, which is only measured."""
    for n, (row, place) in enumerate(zip(rows, of, strict=True)):
        if n % _ONE_IN != _ONE_IN - 1:
            yield row, place


def _with(roles: Roles, held: Sequence[_Held]) -> Roles:
    first = len(roles.forget)
    rows = first - len(roles.reserve)  # those of a reserve that is there already are none of the file

    def theirs(role: str) -> list[Sequence[Example]]:
        return [one.others[role] for one in held if role in one.others]

    return replace(
        roles,
        forget=[*roles.forget, *(one.pushed for one in held)],
        alternatives=[*roles.alternatives, *theirs("alternatives")],
        instead=[*roles.instead, *theirs("instead")],
        taught=[*roles.taught, *theirs("taught")],
        marked=roles.watched,
        starts=roles.starts or [(i,) for i in range(rows)],
        reserve=[*roles.reserve, *(Reserved(first + n, one.of, one.watched) for n, one in enumerate(held))],
    )


def _is_in_words_of_its_own(wording: Record, bad: Record) -> bool:
    return is_long(wording) and rouge_l_f1(wording.completion, bad.completion) < _RECITED
