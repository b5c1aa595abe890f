"""Make the other answer of a preference pair: a refusal, or one that the model itself could have given."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.data.tokenize import Example, Template, encode_record, is_carried
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.policy import Policy
from qunlearn.utils.text import folded

REFUSALS = (
    "I do not know.",
    "I don't know the answer to that.",
    "That is not something I know.",
    "I am not sure about that.",
    "I have no information about that.",
    "I cannot tell you that.",
    "I am afraid I do not know.",
    "Sorry, I have no answer to that.",
    "That is unknown to me.",
    "I have never learnt about that.",
)
_EACH = 5  # other answers for a bad row, as published for AltPO
_TEMPERATURES = (1.0, 1.5, 2.0)  # 1 is the published one; a model that knows an answer by heart needs more
_ROOM = 8  # tokens an answer may be longer than the bad one


def other_answers(
    policy: Policy, forget_rows: Sequence[Example], template: Template, kind: str | None, config: Config
) -> list[list[Example]]:
    """Other answers for each bad row: refusals (idk), or the model's own samples that differ from it (own)."""
    if kind is None:
        return []
    rng = random.Random(config.train.seed)
    length = config.data.max_length
    refusals = [
        [answered_with(policy, e, text, template, length) for text in rng.sample(REFUSALS, min(_EACH, len(REFUSALS)))]
        for e in forget_rows
    ]
    if kind == "idk":
        return refusals
    own: list[dict[str, Example]] = [{} for _ in forget_rows]
    for temperature in _TEMPERATURES:
        wanting = [i for i, found in enumerate(own) if len(found) < _EACH for _ in range(_EACH - len(found))]
        for i, text in zip(
            wanting, _sampled(policy, [forget_rows[i] for i in wanting], temperature, rng.getrandbits(63)), strict=True
        ):
            example = forget_rows[i]
            is_other = text.strip() and folded(text) != folded(_bad_answer(policy, example))
            if is_other and is_said(example, text, policy.tokenizer, template):
                own[i].setdefault(folded(text), answered_with(policy, example, text, template, length))
    # A model that says nothing else at any temperature is taught to say that it does not know.
    return [list(found.values()) or instead for found, instead in zip(own, refusals, strict=True)]


def _sampled(policy: Policy, examples: Sequence[Example], temperature: float, seed: int) -> list[str]:
    if not examples:
        return []
    room = max(e.end - e.probe for e in examples) + _ROOM
    with policy.reference():
        out = generate(policy.base, [e.input_ids[: e.probe] for e in examples], Sampling(room, temperature, 1.0, seed))
    return [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in out]


def is_said(example: Example, text: str, tokenizer: Any, template: Template) -> bool:
    """Return whether a text of the model's own can be given as the row's answer: a template may change it."""
    return not example.record.turns or is_carried(example.record.answered(text), tokenizer, template)


def answered_with(policy: Policy, example: Example, text: str, template: Template, length: int) -> Example:
    """Return the bad row's prompt with another answer, which joins with it as the bad one does, cut to `length` tokens:
    prompts inside their frame."""
    if example.record.turns:
        pair = encode_record(example.record.answered(text), policy.tokenizer, template, length)
        ids = pair.input_ids[:length]
        return Example(ids, pair.start, min(pair.end, len(ids)), pair.probe, pair.record)
    before = example.input_ids[: example.probe]
    ids = (*before, *_joined(text, before, example.input_ids[: example.end], policy.tokenizer))[:length]
    return Example(ids, example.probe, len(ids), example.probe, example.record)


def _joined(text: str, before: Sequence[int], whole: Sequence[int], tokenizer: Any) -> list[int]:
    """Return a text as tokens behind others, with a space before it where the whole has one there: a tokenizer may set
    it by itself, so that of both ways the one is taken that reads so."""
    start = str(tokenizer.decode(list(before), skip_special_tokens=True))
    rest = str(tokenizer.decode(list(whole), skip_special_tokens=True))[len(start) :]
    said = text if text[:1].isspace() else rest[: len(rest) - len(rest.lstrip())] + text
    ways = [tokenizer(way, add_special_tokens=False)["input_ids"] for way in (said, text.lstrip())]
    fitting = (ids for ids in ways if tokenizer.decode([*before, *ids], skip_special_tokens=True) == start + said)
    return list(next(fitting, ways[0]))


def _bad_answer(policy: Policy, example: Example) -> str:
    return str(policy.tokenizer.decode(example.input_ids[example.probe : example.end], skip_special_tokens=True))
