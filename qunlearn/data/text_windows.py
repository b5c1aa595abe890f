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

from qunlearn.data.words import SENTENCE_MARKS, UNSPACED_SENTENCE_MARKS
from qunlearn.errors import ConfigError

# A sentence has ended: its mark, and whatever closes behind it.
_SENTENCE_END = re.compile(rf"[{SENTENCE_MARKS}{UNSPACED_SENTENCE_MARKS}]['\"’”»)\]」』）】》]*$")
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
_LINE_END = frozenset("\n\r\u2028\u2029")
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
    least, else all of them. White space becomes single spaces, and a line end between two Chinese or Japanese
    characters nothing. `dropped` counts the words that are in no window.
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
    """A word as it stands. `joined`: nothing is between it and the word before."""

    text: str
    joined: bool


def _ending(words: list[_Word], most: int) -> list[_Word]:
    """Return the last words, at most so many: from a sentence's beginning, where one leaves half of them."""
    first, last = max(1, len(words) - most), len(words) - (most + 1) // 2
    at = next((i for i in range(first, last + 1) if _SENTENCE_END.search(words[i - 1].text)), first)
    return words[at:]


def _window(words: list[_Word], prompt: int, cut: Windows) -> dict[str, str]:
    text, rest = _joined(words[:prompt]).lstrip(), _joined(words[prompt:])
    if cut.ask:
        return {"prompt": cut.ask.replace("{text}", text), "completion": rest.lstrip()}
    # Without a question the two join as in the book: the space belongs to what is recited.
    return {"prompt": text, "completion": rest}


def _joined(words: Iterable[_Word]) -> str:
    return "".join(word.text if word.joined else f" {word.text}" for word in words)


def _words(lines: Iterable[str]) -> Iterator[_Word]:
    """Words as they stand; a line may come in pieces, and a piece may end inside a word."""
    begun, before, line_ended = _Word("", False), "", True
    for line in (part for text in lines for part in text.replace("\0", "").splitlines(keepends=True)):
        text = begun.text + line
        found = [_Word(piece, i > 0) for word in text.split() for i, piece in enumerate(_pieces(word))]
        if found:
            first = found[0].text
            wrapped = line_ended and bool(_CHAR.search(before) and _CHAR.search(first))
            found[0] = _Word(first, begun.joined if begun.text else wrapped)
            before = found[-1].text
        space = text[len(text.rstrip()) :]
        line_ended = not _LINE_END.isdisjoint(space) or (line_ended and not found)
        # The marks that close behind a character may be in the next piece.
        begun = found.pop() if found and not space and len(before) < _WORD_CHARS else _Word("", False)
        yield from found
    if begun.text:
        yield begun


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
