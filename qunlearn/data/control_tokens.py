"""Tokenise text with its character offsets, and find control tokens in data.

Text is text: what a row says is never a control token, whatever it looks like. Only with the template `raw`, where a
row is all there is, does it bring its own.
"""

from __future__ import annotations

import re
from typing import Any
from weakref import WeakKeyDictionary

from qunlearn.data.records import Record
from qunlearn.data.template import Rendered
from qunlearn.errors import ModelError

Token = tuple[int, tuple[int, int]]  # an id, and the characters it stands for


def tokens_of(text: str, tokenizer: Any, *, special: bool, split: bool = False) -> list[Token]:
    """Tokens with their character spans; special tokens that were added have an empty span. `split`: none is seen in
    the text."""
    how: dict[str, Any] = {"add_special_tokens": special, "verbose": False}
    if split:
        how["split_special_tokens"] = True
    if getattr(tokenizer, "is_fast", False):
        out = tokenizer(text, return_offsets_mapping=True, **how)
        return [(int(t), (int(a), int(b))) for t, (a, b) in zip(out["input_ids"], out["offset_mapping"], strict=True)]
    # Slow tokenizers have no offsets: decode growing prefixes, once per token.
    ids = list(tokenizer(text, **how)["input_ids"])
    added = set(tokenizer.all_special_ids) if special else set()
    tokens, at = [], 0
    for i, token in enumerate(ids):
        if token in added:
            tokens.append((token, (at, at)))
            continue
        grown = len(tokenizer.decode([t for t in ids[: i + 1] if t not in added], skip_special_tokens=False))
        tokens.append((token, (at, grown)))
        at = grown
    return tokens


# -- control tokens --------------------------------------------------------------------------------------------------

_CONTROL: WeakKeyDictionary[Any, tuple[dict[int, str], re.Pattern[str] | None]] = WeakKeyDictionary()


def _control_tokens(tokenizer: Any) -> tuple[dict[int, str], re.Pattern[str] | None]:
    """The tokenizer's control tokens by id, and a pattern that finds one in a text."""
    if tokenizer not in _CONTROL:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        found = {int(i): str(token) for i, token in added.items() if getattr(token, "special", False) and str(token)}
        longest_first = sorted(found.values(), key=len, reverse=True)
        _CONTROL[tokenizer] = (found, re.compile("|".join(map(re.escape, longest_first))) if found else None)
    return _CONTROL[tokenizer]


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of all control tokens, of which `all_special_ids` has only those with a name."""
    return frozenset(_control_tokens(tokenizer)[0]) | frozenset(tokenizer.all_special_ids)


def has_control_token(record: Record, tokenizer: Any) -> bool:
    """Return whether some text of a row looks like one."""
    _, pattern = _control_tokens(tokenizer)
    texts = [content for _, content in record.turns] + [record.completion]
    return pattern is not None and any(pattern.search(text) for text in texts)


def as_text(row: Rendered, tokens: list[Token], record: Record, tokenizer: Any) -> list[Token]:
    """The tokens with those control tokens spelled out that stand in the row's own texts.

    Raises ModelError where they cannot be told from the template's, or the tokenizer cannot spell them.
    """
    if not has_control_token(record, tokenizer):
        return tokens
    hint = "take control tokens out of the row, or use --template raw, where a row brings its own"
    if row.spans is None:
        raise ModelError(
            "the chat template changes a turn with a control token in it", where="chat template", hint=hint
        )
    control, _ = _control_tokens(tokenizer)
    out: list[Token] = []
    for token, (a, b) in tokens:
        at = row.text.find(control[token], a, b) if token in control and b > a else -1
        if at < 0 or not any(s.start <= at and at + len(control[token]) <= s.end for s in row.spans):
            out.append((token, (a, b)))
            continue
        spelled = _spelled(row.text[a:b], tokenizer)
        if any(t in control for t, _ in spelled):
            raise ModelError(f"the tokenizer cannot spell {control[token]!r} as text", where="tokenizer", hint=hint)
        out += [(t, (a + x, a + y)) for t, (x, y) in spelled]
    return out


def _spelled(text: str, tokenizer: Any) -> list[Token]:
    """A text's tokens, none a control token, as they are behind other text: some tokenizers put a space before one that
    stands alone."""
    for anchor in ("\n", "a", ""):
        tokens = tokens_of(anchor + text, tokenizer, special=False, split=True)
        own = [(token, (a - len(anchor), b - len(anchor))) for token, (a, b) in tokens if a >= len(anchor)]
        if own and own[0][1][0] == 0:
            return own
    return own
