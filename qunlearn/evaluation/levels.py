"""The levels of a verdict, and the shares that part them: one vocabulary for `eval`, recipes and reports."""

from __future__ import annotations

from enum import Enum

FORGOTTEN_SHARE = 0.05  # of the rows, at most so many leak
KEPT_SHARE = 0.95  # of the base's score on what should stay, at least


class Level(str, Enum):
    """What the measurements show; a file has the text."""

    FORGOTTEN = "forgotten"
    COSTLY = "costly"
    COST_UNKNOWN = "cost unknown"
    NEVER_KNOWN = "never known"
    PARTLY = "partly"
    REMEMBERED = "remembered"
    MEASURED = "measured"

    __str__ = str.__str__  # in Python 3.10, which has no StrEnum
