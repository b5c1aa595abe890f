"""Weigh the tokens of the bad answers: which of them a run unlearns, and how far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qunlearn.data.tokenize import PASSAGE, Example, Template, is_passage
from qunlearn.data.words import is_unspaced
from qunlearn.roles.specific_tokens import answer_words, doubtful, pushed_words, specific
from qunlearn.utils.console import Meter

if TYPE_CHECKING:
    from qunlearn.model.policy import Policy

OPEN, CLOSE = "‹", "›"
_SHARED, _UNIQUE = 1.0, 1 / 1000  # of objective.rest, where the base is certain of a value, at least
_SHARED_BY = 3  # normal answers that have a word which others share


def rule_for(asked: str, example: Example) -> str:
    """Return what `--forget-tokens auto` and `content` come to for a row: most of a passage is shared language."""
    short = {"auto": "all", "content": "specific"}
    if asked not in short:
        return asked
    return "context" if example.end - example.start >= PASSAGE else short[asked]


def weigh(
    asked: str,
    forget_rows: Sequence[Example],
    retain_rows: Sequence[Example],
    tokenizer: Any,
    template: Template,
    policy: Callable[[], Policy],
    max_tokens: int,
) -> list[Example]:
    """Return the bad examples with the weights that the rule of each row gives its tokens.

    `all` leaves a row as it is; `specific` counts words in the normal rows, where there are any; `context` asks the
    model, in passes of at most `max_tokens`, and so does `content` about words that are as common as form. `policy` is
    called where the model is asked.
    """
    rules = [rule_for(asked, example) for example in forget_rows]
    out = list(forget_rows)
    if "specific" in rules:
        out = [
            s if r == "specific" else e
            for e, s, r in zip(out, specific(forget_rows, retain_rows, tokenizer), rules, strict=True)
        ]
    long = [i for i, rule in enumerate(rules) if rule == "context"]
    if long:
        from qunlearn.roles.context_tokens import context_bound

        with Meter("specific tokens", len(long)) as meter:
            rows = [forget_rows[i] for i in long]
            found = context_bound(policy(), rows, retain_rows, max_tokens, lambda done: meter.at(done, "rows"))
        for i, by_context in zip(long, found, strict=True):
            out[i] = by_context
    # In a script without spaces a token holds both a value and what stands around it, and words tell little.
    bare = [i for i, r in enumerate(rules) if r == "specific" and is_unspaced(forget_rows[i].record.completion)]
    if asked == "content":
        asking = [i for i, e in enumerate(forget_rows) if rules[i] == "specific" and e.record.turns]
        worded = [i for i in asking if not is_unspaced(forget_rows[i].record.completion)]
        found = _with_common_values([out[i] for i in worded], retain_rows, tokenizer, template, policy, max_tokens)
        for i, by_both in zip(worded, found, strict=True):
            out[i] = by_both
    if long or bare:
        from qunlearn.roles.subject_tokens import subject_bound

        asking = [*long, *bare]
        rows, records = [forget_rows[i] for i in asking], [example.record for example in retain_rows]
        # A row that asks about somebody is better told by what is said of others, unless its own words betray it.
        for i, found_by in zip(asking, subject_bound(policy(), rows, records, template, max_tokens), strict=True):
            if found_by is not None and 2 * sum(found_by.weights) >= sum(out[i].weights):
                out[i] = found_by
    return out


def _with_common_values(
    weighed: Sequence[Example],
    retain_rows: Sequence[Example],
    tokenizer: Any,
    template: Template,
    policy: Callable[[], Policy],
    max_tokens: int,
) -> list[Example]:
    """Return the rows with what is as common as form pushed too, where the model gives it to their subject alone."""
    out, in_doubt = list(weighed), doubtful(weighed, retain_rows, tokenizer)
    unsure = [i for i, tokens in enumerate(in_doubt) if any(tokens)]
    if unsure:
        from qunlearn.roles.subject_tokens import also_bound

        rows, tokens = [weighed[i] for i in unsure], [in_doubt[i] for i in unsure]
        records = [example.record for example in retain_rows]
        for i, by_both in zip(unsure, also_bound(policy(), rows, tokens, records, template, max_tokens), strict=True):
            out[i] = by_both
    return out


def resting(pushed: Sequence[Example], retain_rows: Sequence[Example], tokenizer: Any) -> list[Example]:
    """Return the rows that are pushed with how far: a model that never saw an answer finds it the less likely the more
    certain the base is of what it says, and one that nobody else is answered with less than one that others share.

    Passages are not pushed further: each part of them is pushed for itself, whatever the others come to.
    """
    times = Counter(word for e in retain_rows for word in set(answer_words(e, tokenizer)))
    said = [e.record.completion for e in retain_rows]

    def is_shared(example: Example) -> bool:
        if is_unspaced(example.record.completion):  # where characters are few, most pairs of them are
            texts = [text.strip() for pushed, text in _parts(example, tokenizer) if pushed and text.strip()]
            return all(sum(text in other for other in said) >= _SHARED_BY for text in texts)
        words = pushed_words(example, tokenizer)
        return 2 * sum(times[word] >= _SHARED_BY for word in words) >= len(words)

    def share(example: Example) -> float:
        if is_passage(example):
            return 1.0
        return max((1 - example.known) ** 2, _SHARED if is_shared(example) else _UNIQUE)

    return [replace(example, rest=share(example)) for example in pushed]


def count(weighed: Sequence[Example]) -> int:
    """Return how many answer tokens are pushed at all."""
    return sum(sum(e.weight(t) > 0 for t in range(e.start, e.end)) for e in weighed)


def marked(example: Example, tokenizer: Any) -> str:
    """The answer with what is pushed of it between ‹ and ›, white space around it left outside."""
    out = []
    for pushed, text in _parts(example, tokenizer):
        inner = text.strip() if pushed else ""
        before, _, after = text.partition(inner) if inner else (text, "", "")
        out.append(f"{before}{OPEN}{inner}{CLOSE}{after}" if inner else text)
    return "".join(out)


def _parts(example: Example, tokenizer: Any) -> Iterator[tuple[bool, str]]:
    """Runs of tokens that are pushed, or not, as text.

    A run's text is what it adds to the text before it: decoded by itself, many tokenizers drop its first space.
    """
    at, known = example.start, ""
    for pushed, run in groupby(example.weights, key=lambda weight: weight > 0):
        at += len(list(run))
        text = str(tokenizer.decode(list(example.input_ids[example.start : at]), skip_special_tokens=False))
        if at < example.end:
            text = text.rstrip("\ufffd")  # the first bytes of a character that the next token ends
        yield pushed, text[len(known) :]
        known = text
