"""Read what a launcher (torchrun, accelerate launch) says of the processes of a run: how many, and which is this."""

from __future__ import annotations

import os

from qunlearn.errors import ConfigError


def process_count() -> int:
    """Return how many processes were launched for this command; 1 without a launcher. Raises ConfigError."""
    return _number("WORLD_SIZE", 1, least=1)


def process_number() -> int:
    """Return which of them this is, from 0. Raises ConfigError."""
    return _number("RANK", 0)


def number_here() -> int:
    """Return which of those on this machine this is, from 0: the number of its GPU. Raises ConfigError."""
    return _number("LOCAL_RANK", 0) if process_count() > 1 else 0


def count_here() -> int:
    """Return how many of them are on this machine; 1 where the launcher does not say. Raises ConfigError."""
    return _number("LOCAL_WORLD_SIZE", 1, least=1) if process_count() > 1 else 1


def _number(name: str, default: int, *, least: int = 0) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        hint = "torchrun and accelerate launch set it; without a launcher unset it"
        raise ConfigError(f"the environment says {text[:20]!r}", where=name, hint=hint)
    return int(text)
