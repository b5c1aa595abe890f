"""Cut a plain text of any length into prompts and the continuations that a model might recite.

It is counted in words. Chinese and Japanese are written without spaces, so each of their characters counts as a word,
with the marks that close behind it or open before it; a Latin word or a number between them is one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from qunlearn.data.line_ends import WITHIN, WRAPPED, laid_out
from qunlearn.data.words import SENTENCE_END
from qunlearn.errors import ConfigError

# Han, with the signs that repeat or number, and kana of full and half width.
_CHARS = (
    r"\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_OPENING = "「『（【《〈〔〖〘｛［“‘(["
_CHAR = re.compile(f"[{_CHARS}]")
_PIECE = re.compile(
    rf"[{re.escape(_OPENING)}]*(?:[{_CHARS}][^\w{re.escape(_OPENING)}]*|[^{_CHARS}{re.escape(_OPENING)}]+)|."
)
# Around a book of Project Gutenberg stands a licence that is not the book.
_BEGIN, _END = (
    re.compile(rf"\s*\*\*\* ?{which} OF (?:THE |THIS )?PROJECT GUTENBERG", re.I) for which in ("START", "END")
)
_LEAST_SHARE = 4  # of the words of a continuation: the last one may have so few
_HYPHEN = re.compile(r"[^\W\d_][-\u2010]$")
# What a printed page has for letters, and what is no sign of the text.
_SIGNS = str.maketrans(
    {"\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl", "\xad": "", "\0": ""}
)
_HEADER_CHARS = 200_000  # so far into the file may the book begin
_WORD_CHARS = 5_000  # longer runs without white space are cut: no memory for a file without spaces


@dataclass(frozen=True)
class Windows:
    """How a text is cut: words of the prompt and of its continuation, a Chinese or Japanese character being one.

    `ask` holds {text} where a prompt is asked.
    """

    prompt_words: int = 30
    answer_words: int = 50
    ask: str = ""

    def __post_init__(self) -> None:
        if self.ask and "{text}" not in self.ask:
            raise ConfigError("has no {text} in it", where="--ask", hint='such as --ask "Continue: {text}"')


def windows(lines: Iterable[str], cut: Windows, dropped: Counter[str]) -> Iterator[dict[str, str]]:
    """Prompt and continuation of each window: all of the text behind the first prompt is a continuation, once, for what
    is in none would not be forgotten.

    A prompt is the end of the continuation before: from where a sentence begins in it, half of the prompt's words at
    least, else all of them. Line ends stay, of blank lines one, but for those where the text was wrapped: they become
    spaces, between two Chinese or Japanese characters nothing, behind the hyphen of a broken word as well. `dropped`
    counts the words that are in no window.
    """
    held: list[_Word] = []
    prompt, begun = cut.prompt_words, 0
    for word in _words(_book(lines, dropped)):
        held.append(word)
        if len(held) == prompt + cut.answer_words:
            yield _window(held, prompt, cut)
            held = _ending(held, cut.prompt_words)
            prompt = begun = len(held)
    if len(held) - prompt >= max(1, cut.answer_words // _LEAST_SHARE):
        yield _window(held, prompt, cut)
    elif len(held) > begun:
        dropped["words of the last, unfinished window"] += len(held) - begun


class _Word(NamedTuple):
    """A word, and what stands before it: nothing, a space, or line ends."""

    text: str
    before: str


def _ending(words: list[_Word], most: int) -> list[_Word]:
    """Return the last words, at most so many: from a sentence's beginning, where one leaves half of them."""
    first, last = max(1, len(words) - most), len(words) - (most + 1) // 2
    at = next((i for i in range(first, last + 1) if SENTENCE_END.search(words[i - 1].text)), first)
    return words[at:]


def _window(words: list[_Word], prompt: int, cut: Windows) -> dict[str, str]:
    text, rest = _joined(words[:prompt]).lstrip(), _joined(words[prompt:])
    if cut.ask:
        return {"prompt": cut.ask.replace("{text}", text), "completion": rest.lstrip()}
    # Without a question the two join as in the book: the space belongs to what is recited.
    return {"prompt": text, "completion": rest}


def _joined(words: Iterable[_Word]) -> str:
    return "".join(word.before + word.text for word in words)


def _words(lines: Iterable[str]) -> Iterator[_Word]:
    """Words as they stand; a line may come in pieces, and a piece may end inside a word."""
    last: _Word | None = None
    parts = (part for text in lines for part in text.translate(_SIGNS).splitlines(keepends=True))
    for part, before in laid_out(parts):
        text, stands = part, before or WRAPPED
        if last is not None and (before == WITHIN or _is_broken(last.text, part, before)):
            text, stands = last.text + part.lstrip() if before else last.text + part, last.before
            last = None
        found = [_Word(piece, WITHIN if i else " ") for word in text.split() for i, piece in enumerate(_pieces(word))]
        if not found:
            continue
        if last is not None:
            is_bare = stands == WRAPPED and _CHAR.search(last.text) and _CHAR.search(found[0].text)
            stands = WITHIN if is_bare else stands
            yield last
        found[0] = _Word(found[0].text, stands)
        # The marks that close behind a character, or more of the word, may be in the next piece.
        last = found.pop()
        yield from found
        if text[-1:].isspace() or len(last.text) >= _WORD_CHARS:
            yield last
            last = None
    if last is not None:
        yield last


def _is_broken(word: str, line: str, before: str) -> bool:
    """Return whether a word was broken at the end of a wrapped line, behind its hyphen."""
    return before == WRAPPED and _HYPHEN.search(word) is not None and line.lstrip()[:1].islower()


def _pieces(word: str) -> list[str]:
    """A word between spaces as one, or as the characters that count as words."""
    return _PIECE.findall(word) if _CHAR.search(word) else [word]


def _book(lines: Iterable[str], dropped: Counter[str]) -> Iterator[str]:
    """The lines between the licence's marks, where there are such marks."""
    licence, lines = "words of the licence around the book", iter(lines)
    waiting, held_chars = list[str](), 0  # the first lines, until it is known whether they are the book
    for line in lines:
        if _BEGIN.match(line):
            dropped[licence] += _word_count(waiting)
            waiting.clear()
            break
        waiting.append(line)
        held_chars += len(line)
        if held_chars > _HEADER_CHARS:
            break
    yield from waiting
    for line in lines:
        if _END.match(line):
            dropped[licence] += _word_count(lines)
            return
        yield line


def _word_count(lines: Iterable[str]) -> int:
    return sum(1 for _ in _words(lines))
