"""Say long answers as the base says them in words of its own: of what it knows in many ways one wording is not all.

An answer that the base recites comes back as it is, and adds nothing. What it freely says is said again in other words
when the bad ones are gone; so the answers that it gives at random, where they are like the bad answer, are bad rows
beside it, weighed, pushed and looked at alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example, Template, encode_said, prompt_frame
from qunlearn.data.words import words
from qunlearn.evaluation.metrics.texts import rouge_l_f1
from qunlearn.evaluation.scores import row_probabilities
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.policy import Policy
from qunlearn.roles.self_made import ended
from qunlearn.utils.console import stage
from qunlearn.utils.text import folded, is_clean

_EACH, _IN_ALL = 2, 512  # answers of a row, and in a file, that are kept at most
_DRAWN = 2  # times as many are drawn
_TOP_P = 0.95
_LONG = 12  # words that an answer adds to its prompt from which it can be said in others
_BY_HEART = 0.7  # probability per token from which an answer is recited, and not said freely
ALIKE = 0.25  # ROUGE-L F1 from which an answer says something of what the bad one says


def in_own_words(
    policy: Policy, forget_rows: Sequence[Example], template: Template, seed: int, limit: int, length: int
) -> list[tuple[Example, int]]:
    """Return rows with the prompts of long bad answers and what the base says there as well, and for each the place of
    the bad row. `limit` are the most tokens of a pass, `length` those of a row."""
    long = [i for i, example in enumerate(forget_rows) if example.record.turns and is_long(example.record)]
    with policy.reference():
        known = row_probabilities(policy, [forget_rows[i] for i in long], limit)
    long = [i for i, p in zip(long, known, strict=True) if is_said_freely(forget_rows[i].record, p)]
    each = min(_EACH, _IN_ALL // max(1, len(long)))
    if not long or not each:
        return []
    asked = [i for i in long for _ in range(_DRAWN * each)]
    room = max(forget_rows[i].end - forget_rows[i].start for i in long)
    with stage("the base says the bad answers in words of its own"), policy.reference():
        prompts = [forget_rows[i].input_ids[: forget_rows[i].probe] for i in asked]
        said = generate(policy.base, prompts, Sampling(room, 1.0, _TOP_P, seed))
    opening, _ = prompt_frame(template, policy.tokenizer)
    found: list[tuple[Example, int]] = []
    taken = {folded(example.record.completion) for example in forget_rows}
    times: Counter[int] = Counter()
    for i, ids in zip(asked, said, strict=True):
        text = ended(policy.tokenizer.decode(ids, skip_special_tokens=True), opening)
        alike = is_clean(text) and rouge_l_f1(text, forget_rows[i].record.completion) >= ALIKE
        if not alike or folded(text) in taken or times[i] >= each:
            continue
        row = encode_said(forget_rows[i].record.answered(text), policy.tokenizer, template, length)
        if row is not None:
            taken.add(folded(text))
            times[i] += 1
            found.append((row, i))
    return found


def is_said_freely(record: Record, p: float) -> bool:
    """Return whether an answer that the base gives with a probability of p per token has other words that say it."""
    return is_long(record) and p < _BY_HEART


def is_long(record: Record) -> bool:
    """Return whether an answer is so long that the base can say it in other words."""
    given = set(words(record.prompt))
    return sum(word not in given for word in words(record.completion)) > _LONG
