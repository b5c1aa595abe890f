"""Match patterns of module names in an adapter's configuration, refusing those that could take for ever."""

from __future__ import annotations

import math
import re

_PLAIN = re.compile(r"[\w.^$\\|()\[\]*+?:-]*", re.ASCII)
_MAX_CHARS = 4000
MOST_STEPS = 100_000_000  # of all patterns on all names: some seconds


def match_steps(pattern: str, length: int, *, inside: bool = False) -> float:
    """Return at most how many steps a backtracking match takes on a name of `length` characters.

    The stars may end anywhere, one behind the other: comb(length + stars, stars) ways; each optional part doubles
    them, and each group with alternatives multiplies them, since alternatives may all match the same. inside: the name
    may begin with anything, one star more. Infinite for what is not counted: a quantified group, a counted repetition,
    looking ahead.
    """
    text = re.sub(r"\\.", "x", pattern)
    text = re.sub(r"\[[^\]]*\]", "x", text).replace("(?:", "(")
    if len(pattern) > _MAX_CHARS or not _PLAIN.fullmatch(pattern) or "(?" in text or re.search(r"\)[*+]", text):
        return math.inf
    text = re.sub(r"([*+?])\?", r"\1", text)  # the lazy form tries the same
    stars = text.count("*") + text.count("+") + inside
    ways = float(math.comb(length + min(stars, 100), min(stars, 100)))
    return ways * 2.0 ** min(text.count("?"), 100) * _alternatives(text)


def _alternatives(text: str) -> float:
    """The product over all groups of how many alternatives each has."""
    open_groups, product = [1], 1.0
    for character in text:
        if character == "(":
            open_groups.append(1)
        elif character == "|":
            open_groups[-1] += 1
        elif character == ")" and len(open_groups) > 1:
            product *= open_groups.pop()
    return product * math.prod(map(float, open_groups))
