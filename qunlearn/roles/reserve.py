"""Hold bad rows in other words in reserve: what comes back while training is pushed there as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example, Template, behind
from qunlearn.evaluation.metrics.texts import rouge_l_f1
from qunlearn.roles.own_words import is_long
from qunlearn.roles.reworded import Reworded
from qunlearn.roles.roles import Reserved, Roles

_ONE_IN = 4  # of so many wordings one is only measured
_RECITED = 0.8  # ROUGE-L F1 from which a long answer is the bad one, and not what it says in other words


def with_reserve(roles: Roles, found: Reworded, tokenizer: Any, template: Template, length: int) -> Roles:
    """Return the roles with three in four of the wordings behind all other bad rows: with the same answers, pushed as
    far, and the same said in their place. A behaviour is asked for in fewer words already, and has none; nor has a
    long answer that is given there in words of its own. `length` are the most tokens of a row."""
    if roles.phrases:
        return roles
    first = len(roles.forget)
    rows: list[Example] = []
    reserve: list[Reserved] = []
    others: dict[str, list[list[Example]]] = {"alternatives": [], "instead": [], "taught": []}
    for n, (wording, place) in enumerate(zip(found.rows, found.of, strict=True)):
        if n % _ONE_IN == _ONE_IN - 1 or _is_in_words_of_its_own(wording.record, roles.forget[place].record):
            continue

        def asked_so(answers: Sequence[Example], wording: Example = wording) -> list[Example]:
            made = (behind(answer, wording.record.turns, tokenizer, template, length) for answer in answers)
            return [row for row in made if row is not None]

        own = {role: getattr(roles, role)[place] for role in others if getattr(roles, role)}
        theirs = {role: asked_so(answers) for role, answers in own.items()}
        asked = asked_so([roles.forget[place], roles.watched[place]])
        if len(asked) < 2 or any(own[role] and not theirs[role] for role in own):
            continue
        reserve.append(Reserved(first + len(rows), place, asked[1]))
        rows.append(asked[0])
        for role, answers in theirs.items():
            others[role].append(answers)
    return replace(
        roles,
        forget=[*roles.forget, *rows],
        alternatives=[*roles.alternatives, *others["alternatives"]],
        instead=[*roles.instead, *others["instead"]],
        taught=[*roles.taught, *others["taught"]],
        marked=roles.watched,
        starts=roles.starts or [(i,) for i in range(first)],
        reserve=reserve,
    )


def _is_in_words_of_its_own(wording: Record, bad: Record) -> bool:
    return is_long(wording) and rouge_l_f1(wording.completion, bad.completion) < _RECITED
