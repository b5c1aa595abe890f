"""Text as it is compared and shown."""

from __future__ import annotations

import shlex


def folded(text: str) -> str:
    """Return a text with letter case and runs of white space levelled, for telling equal texts."""
    return " ".join(text.casefold().split())


def shortened(text: str, width: int = 110) -> str:
    """Return a text on one line, cut to a width."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[: width - 1]}…"


def command_line(*words: object) -> str:
    """Return a command as it can be typed: words with spaces or other signs of the shell are quoted."""
    return shlex.join(map(str, words))


def is_clean(text: str) -> bool:
    """Return whether a text can be tokenised and written: no NUL, no half of a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)
