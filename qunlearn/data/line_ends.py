"""Tell the line ends of a text that mean something from those where its width ended: verse and paragraphs, and prose.

A model has learnt verse with its line ends, and does not recite it where they are spaces.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from qunlearn.data.words import is_unspaced

WITHIN, WRAPPED, LINE, PARAGRAPH = "", " ", "\n", "\n\n"
_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_BLOCK = 100  # lines that are looked at together
_WIDEST = 160  # characters of a line beyond which none was wrapped
_BARE = 3  # characters that a line may be shorter than the others where no word is kept whole: marks begin no line
_MADE = 3  # of so many line ends one that no width tells: the others are no width's either


def laid_out(pieces: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the lines of a text without their ends, or parts of long ones, each with what stands before it: "" within a
    line, a space where the text was wrapped, a line end, or two where lines were left blank.

    `pieces` are lines with their ends, or parts of lines.
    """
    block: list[str] = []
    line, before, is_within = "", WITHIN, False
    for piece in pieces:
        part = piece.rstrip(_ENDS)
        has_ended = part != piece
        if is_within:
            yield part, WITHIN
            is_within, before = not has_ended, LINE
            continue
        line += part
        if not has_ended and len(line) <= _WIDEST:
            continue
        if line.strip() and has_ended:
            block.append(line)
        if block and (len(block) == _BLOCK or not has_ended or not line.strip()):
            yield from _block(block, before)
            before, block = _ends_of(block), []
        if not has_ended:
            yield line, before
            is_within = True
        elif not line.strip():
            before = PARAGRAPH
        line = ""
    if line.strip():
        block.append(line)
    yield from _block(block, before)


def _block(lines: Sequence[str], before: str) -> Iterator[tuple[str, str]]:
    """Yield lines between which none is blank."""
    ends = _ends_of(lines)
    for i, line in enumerate(lines):
        yield line, ends if i else before


def _ends_of(lines: Sequence[str]) -> str:
    """Return what the ends of a block's lines are: of its width, where the next word would hardly ever have fitted."""
    texts = [line.strip() for line in lines]
    width = max(map(len, texts), default=0)
    if width > _WIDEST:
        return LINE
    fitted = sum(len(text) + _needed(after) <= width for text, after in itertools.pairwise(texts))
    return WRAPPED if _MADE * fitted < len(texts) else LINE


def _needed(line: str) -> int:
    """Return how many characters more the line before would have, had it gone on."""
    return _BARE if is_unspaced(line) else 1 + len(line.split()[0])
