"""Text as it is compared."""

from __future__ import annotations


def folded(text: str) -> str:
    """Return a text with letter case and runs of white space levelled, for telling equal texts."""
    return " ".join(text.casefold().split())
