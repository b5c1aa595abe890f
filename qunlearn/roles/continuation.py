"""Begin a text in a template, and read what the base goes on with."""

from __future__ import annotations

from collections.abc import Sequence

from qunlearn.data.tokenize import Template
from qunlearn.model.load import Base


def begun_ids(base: Base, template: Template, text: str) -> list[int]:
    """Return the tokens that a text begins with, behind those that a template leaves to the tokenizer."""
    ids = base.tokenizer(text, add_special_tokens=template.kind != "chat")["input_ids"]
    return list(ids) or [base.tokenizer.eos_token_id or 0]


def decoded(
    base: Base, started: Sequence[Sequence[int]], drawn: Sequence[Sequence[int]], *, special: bool = False
) -> list[str]:
    """Return what was drawn as the text that goes on behind its start: by itself, many tokenizers drop its space."""

    def text(ids: Sequence[int]) -> str:
        return str(base.tokenizer.decode(list(ids), skip_special_tokens=not special))

    return [text([*start, *ids])[len(text(start)) :] for start, ids in zip(started, drawn, strict=True)]
