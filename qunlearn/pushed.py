"""Which tokens of the bad answers a run would push, shown before anything is trained: for `qunlearn data check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from qunlearn.console import Meter, stage
from qunlearn.data.specific import specific
from qunlearn.data.tokenize import Example
from qunlearn.model.source import resolve_model

OPEN, CLOSE = "‹", "›"


def weigh(
    rule: str, model: str, bad: Sequence[Example], normal: Sequence[Example], tokenizer: Any
) -> Sequence[Example]:
    """The bad examples with the weights that `--forget-tokens RULE` gives their tokens.

    `specific` counts words in the normal rows, where there are any; `context` loads the model. Raises ModelError.
    """
    return specific(bad, normal, tokenizer) if rule == "specific" else _context(model, bad)


def _context(model: str, bad: Sequence[Example]) -> Sequence[Example]:
    from qunlearn.config import LoraConfig, TrainConfig
    from qunlearn.model.context import context_bound
    from qunlearn.model.load import LoadSpec, load_base
    from qunlearn.model.policy import Policy
    from qunlearn.plan import check_model

    checked = check_model(resolve_model(model))
    with stage("loading the model"):
        policy = Policy.new(load_base(checked.folder, LoadSpec()), LoraConfig())
    with Meter("specific tokens", len(bad)) as meter:
        return context_bound(policy, bad, TrainConfig().max_tokens, lambda done: meter.at(done, "rows"))


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
