"""A plain text of any length, cut into prompts and the continuations that a model might recite."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qunlearn.errors import ConfigError

# A sentence has ended: its mark, and whatever closes behind it.
_SENTENCE_END = re.compile(r"[.!?…。！？]['\"’”»)\]]*$")
# Around a book of Project Gutenberg stands a licence that is not the book.
_BEGIN, _END = re.compile(r"^\s*\*\*\* ?START OF"), re.compile(r"^\s*\*\*\* ?END OF")
_HEADER_CHARS = 200_000  # so far into the file may the book begin
_WORD_CHARS = 5_000  # longer runs without white space are cut: no memory for a file without spaces


@dataclass(frozen=True)
class Windows:
    """How a text is cut: words of the prompt and of its continuation. `ask` holds {text} where a prompt is asked."""

    prompt_words: int = 30
    answer_words: int = 50
    ask: str = ""

    def __post_init__(self) -> None:
        if self.ask and "{text}" not in self.ask:
            raise ConfigError("has no {text} in it", where="--ask", hint='such as --ask "Continue: {text}"')


def windows(lines: Iterable[str], cut: Windows, dropped: Counter[str]) -> Iterator[dict[str, str]]:
    """Prompt and continuation of each window; windows do not overlap, and each begins where a sentence does.

    White space becomes single spaces. `dropped` counts the words that are in no window.
    """
    size, held, at_start = cut.prompt_words + cut.answer_words, deque[str](), True
    for word in _words(_book(lines, dropped)):
        if not held and not at_start:  # wait for the next sentence
            dropped["words between a window and the next sentence"] += 1
        else:
            held.append(word)
        at_start = bool(_SENTENCE_END.search(word))
        if len(held) == size:
            yield _window(list(held), cut)
            held.clear()
    if held:
        dropped["words of the last, unfinished window"] += len(held)


def _window(words: list[str], cut: Windows) -> dict[str, str]:
    text = " ".join(words[: cut.prompt_words])
    rest = " ".join(words[cut.prompt_words :])
    if cut.ask:
        return {"prompt": cut.ask.replace("{text}", text), "completion": rest}
    # Without a question the two join as in the book: the space belongs to what is recited.
    return {"prompt": text, "completion": f" {rest}"}


def _words(lines: Iterable[str]) -> Iterator[str]:
    """Words as they stand; a line may come in pieces, and a piece may end inside a word."""
    begun = ""
    for line in lines:
        text = begun + line.replace("\0", "")
        whole = text.split()
        begun = whole.pop() if whole and not text[-1].isspace() and len(whole[-1]) < _WORD_CHARS else ""
        yield from whole
    if begun:
        yield begun


def _book(lines: Iterable[str], dropped: Counter[str]) -> Iterator[str]:
    """The lines between the licence's marks, where there are such marks."""
    licence, lines = "words of the licence around the book", iter(lines)
    waiting, held_chars = list[str](), 0  # the first lines, until it is known whether they are the book
    for line in lines:
        if _BEGIN.match(line):
            dropped[licence] += _count(waiting)
            waiting.clear()
            break
        waiting.append(line)
        held_chars += len(line)
        if held_chars > _HEADER_CHARS:
            break
    yield from waiting
    for line in lines:
        if _END.match(line):
            dropped[licence] += _count(lines)
            return
        yield line


def _count(lines: Iterable[str]) -> int:
    return sum(len(line.split()) for line in lines)
