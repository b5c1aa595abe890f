"""Which tokens of the bad answers a run pushes, for `forget`, and shown beforehand, for `qunlearn data check`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qunlearn.console import Meter
from qunlearn.data.specific import specific
from qunlearn.data.tokenize import Example

if TYPE_CHECKING:
    from qunlearn.model.policy import Policy

OPEN, CLOSE = "‹", "›"
_PASSAGE = 32  # tokens of an answer from which it is a passage


def rule_for(asked: str, bad: Sequence[Example]) -> str:
    """What `--forget-tokens auto` and `content` come to: most of a passage is language that others share."""
    short = {"auto": "all", "content": "specific"}
    if asked not in short:
        return asked
    return "context" if statistics.median(e.end - e.start for e in bad) >= _PASSAGE else short[asked]


def weigh(
    rule: str,
    bad: Sequence[Example],
    normal: Sequence[Example],
    tokenizer: Any,
    policy: Callable[[], Policy],
    max_tokens: int,
) -> Sequence[Example]:
    """The bad examples with the weights that a rule gives their tokens; `all` leaves them as they are.

    `specific` counts words in the normal rows, where there are any; `context` asks the model, alone calls `policy`, and
    makes passes of at most `max_tokens`.
    """
    if rule == "all":
        return bad
    if rule == "specific":
        return specific(bad, normal, tokenizer)
    from qunlearn.model.context import context_bound

    asked = policy()
    with Meter("specific tokens", len(bad)) as meter:
        return context_bound(asked, bad, max_tokens, lambda done: meter.at(done, "rows"))


def count(weighed: Sequence[Example]) -> int:
    """Answer tokens that are pushed at all."""
    return sum(weight > 0 for example in weighed for weight in example.weights)


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
