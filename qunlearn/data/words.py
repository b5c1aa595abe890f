"""Split texts into words, in scripts that set no spaces into characters."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence

# Thai, Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_BARE = re.compile(f"[{UNSPACED}]")


def _marks() -> str:
    """Return the signs that are part of the letter before them, as the inside of a pattern's brackets: a word of
    Devanagari, Tamil, pointed Hebrew or decomposed Latin would be cut at each of them. The joiners are among them."""
    signs = (chr(i) for i in range(0x300, 0x1E960) if unicodedata.category(chr(i)) in ("Mn", "Mc"))
    return "".join(sign for sign in signs if not _BARE.match(sign)) + "\u200c\u200d"


MARKS = _marks()
# What ends a sentence: before a space, and where a script sets none.
SENTENCE_MARKS, UNSPACED_SENTENCE_MARKS = ".!?…।॥۔؟։።", "。！？"
# A sentence has ended: its mark, and whatever closes behind it.
SENTENCE_END = re.compile(rf"[{SENTENCE_MARKS}{UNSPACED_SENTENCE_MARKS}]['\"’”»)\]」』）】》]*$")
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}](?:[^\W{UNSPACED}]|[{MARKS}])*")
_PIECE = re.compile(rf"[{UNSPACED}]|[^{UNSPACED}]+")


def words(text: str) -> list[str]:
    """Return the words of a text in small letters, letters composed; where a script sets no spaces, its characters."""
    return WORD.findall(composed(text).casefold())


def composed(text: str) -> str:
    """Return a text with each letter and its marks as one character, where there is one."""
    return unicodedata.normalize("NFC", text)


def words_of_text(text: str) -> set[str]:
    """Return the different words of a text, letter case aside."""
    return set(words(text))


def is_unspaced(text: str) -> bool:
    """Return whether most letters of a text are of a script that sets no spaces."""
    return 2 * len(_BARE.findall(text)) > sum(map(str.isalnum, text))


def pairs(every: Sequence[str]) -> list[tuple[str, ...]]:
    """Return what tells each word from others: the word itself, or of a character of a script without spaces, of which
    there are few, the pairs that it makes with the ones beside it."""
    found = []
    for i, word in enumerate(every):
        beside = (every[i - 1 : i], every[i + 1 : i + 2]) if _is_bare(word) else ([], [])
        left, right = ("".join(b) for b in beside)
        both = [text for text, is_there in ((left + word, _is_bare(left)), (word + right, _is_bare(right))) if is_there]
        found.append(tuple(both) or (word,))
    return found


def bare_pairs(every: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of characters that stand side by side, where a script sets no spaces."""
    return [(a, b) for a, b in itertools.pairwise(every) if _is_bare(a) and _is_bare(b)]


def _is_bare(word: str) -> bool:
    return _BARE.fullmatch(word) is not None


def pieces(text: str) -> list[str]:
    """Return what a text is made of: what stands between spaces, or the characters of a script that sets none."""
    return _PIECE.findall(text) if is_unspaced(text) else text.split()


def between(text: str) -> str:
    """Return what stands between two pieces of a text: a space, or nothing in a script that sets none."""
    return "" if is_unspaced(text) else " "


def beginning(text: str, count: int) -> str:
    """Return the first so many pieces of a text as they stand there, but for white space."""
    return between(text).join(pieces(text)[:count])


def joined(every: Sequence[str]) -> str:
    """Return words as a text has them: with spaces between, but for two characters of a script that sets none."""
    out = ""
    for word in every:
        apart = out and not (_BARE.match(out[-1]) and _BARE.match(word))
        out += f" {word}" if apart else word
    return out


def bounded(phrase: str) -> str:
    """Return the pattern of a phrase where it is no part of a longer word; in a script without spaces, wherever."""
    letter, mark = rf"[^\W{UNSPACED}]", f"[{MARKS}]"
    begins = WORD.match(phrase[0]) is not None and not _is_bare(phrase[0])
    ends = re.match(f"{letter}|{mark}", phrase[-1]) is not None
    before, after = f"(?<!{letter})(?<!{mark})", f"(?!{letter}|{mark})"
    return (before if begins else "") + re.escape(phrase) + (after if ends else "")
