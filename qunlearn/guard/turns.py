"""Take a prompt apart: which of its tokens a person wrote, turn by turn, and where the template stands. No torch here.

The gate judges turns without their template, and only what a person (or a document, or a system prompt) has written is
corrupted. The frame around a turn is found once, by rendering a conversation of marks through the template.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qunlearn.data.records import Record
from qunlearn.data.row_shapes import Turns
from qunlearn.data.template import Template, render
from qunlearn.data.tokenize import open_prompt
from qunlearn.errors import ModelError

_PART = "\ufffd"  # what decoding makes of a part of a character
_WINDOW = 16  # tokens that are decoded together, where they cannot be one by one
_NAMES = (*calendar.month_name[1:], *calendar.month_abbr[1:], *calendar.day_name, *calendar.day_abbr)
_DATED = re.compile(rf"\d+|\b(?:{'|'.join(map(re.escape, _NAMES))})\b")
_MARKS = tuple(f"QUNLEARN{name}MARK" for name in ("ONE", "TWO", "THREE", "FOUR"))


@dataclass(frozen=True)
class Frame:
    """What the template puts around a question: `opening`, and `closing` up to where the answer begins. `between` ends
    an earlier question, before the template opens its answer; `fixed` are texts that are the template's own."""

    opening: str = ""
    closing: str = ""
    between: str = ""
    fixed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Frame:
        opening, closing, between = (str(value[name]) for name in ("opening", "closing", "between"))
        return cls(opening, closing, between, tuple(map(str, value["fixed"])))


@dataclass(frozen=True)
class Turn:
    """A text of a prompt, its tokens from `first` to `last` (exclusive), and where they stand in the text.

    `spans` are the characters of each token, counted from the turn's beginning. `asked`: by the user.
    """

    text: str
    first: int
    last: int
    spans: tuple[tuple[int, int], ...]
    asked: bool = True


@dataclass(frozen=True)
class Prompt:
    """The turns of a prompt, and the position at which its answer begins."""

    turns: tuple[Turn, ...]
    answer: int


def find_frame(template: Template, tokenizer: Any) -> Frame:
    """Return the frame of a template; an empty one for a raw template, whose prompts are all text."""
    alone = (("user", _MARKS[0]),)
    if template.kind != "chat":
        before, _ = render(Record(alone, _MARKS[3], 0, {}), template, tokenizer)
        head, _, closing = before.partition(_MARKS[0])
        return Frame(head.strip(" "), closing.strip(" "), closing.strip(" "))
    try:
        text, inside = _read_back((*alone, ("assistant", _MARKS[1]), ("user", _MARKS[2])), template, tokenizer)
    except ModelError:  # a template of one question
        head, _, closing = _read_back(alone, template, tokenizer)[0].partition(_MARKS[0])
        return Frame(head, closing, closing, _own(head, tokenizer))
    first, rest = text.split(_MARKS[0], 1)
    middle, last = rest.split(_MARKS[2], 1)
    ended, again = middle.split(_MARKS[1], 1) if _MARKS[1] in middle else (middle, middle)
    # It does not begin inside a control token: "<s>" and "</s>" end alike.
    ends, most = (len(first), len(text) - len(last) - len(_MARKS[2])), len(_common_end(first, again))
    size = max((n for n in range(most + 1) if inside.isdisjoint(end - n for end in ends)), default=0)
    opening = first[len(first) - size :]
    # A space at the end is the answer's, where its first token begins with one.
    closing, between = last.rstrip(" "), _common_start(ended, last).rstrip(" ")
    return Frame(opening, closing, between, (*_own(first.removesuffix(opening), tokenizer), *_own(again, tokenizer)))


def _read_back(turns: Turns, template: Template, tokenizer: Any) -> tuple[str, set[int]]:
    """Return a question as it is decoded from its tokens, and the places inside control tokens of it.

    It is not what the template made: beside control tokens some tokenizers add a space, or lose a line break.
    """
    record = Record(turns, _MARKS[3], 0, {})
    ids = open_prompt(record, tokenizer, template)
    text, spans = token_spans(ids, tokenizer)
    if not all(content in text for role, content in turns if role == "user"):
        return render(record, template, tokenizer)[0], set()
    added = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return text, {at for i, (a, b) in zip(ids, spans, strict=True) if i in added for at in range(a + 1, b)}


def read_prompt(ids: Sequence[int], tokenizer: Any, frame: Frame) -> Prompt:
    """Take a prompt's tokens apart. Without a frame, or where the prompt does not have it, all of it is one turn.

    Behind the last closing stands the answer that is being written, which is no part of the prompt. Between the last
    question and it stand an answer that was given, or what a person wrote behind a mark of the template.
    """
    text, spans = token_spans(ids, tokenizer)
    found = _questions(text, frame)
    if not found:
        turn = _turn(text, spans, 0, len(text), asked=True)
        return Prompt((turn,) if turn else (), len(ids))
    turns: list[Turn | None] = []
    at = 0
    for start, end in found:
        turns += [_rest(text, spans, at, start, tokenizer, frame), _turn(text, spans, start, end, asked=True)]
        at = end
    ended = at + len(frame.closing) if text.startswith(frame.closing, at) else at
    # A mark of white space alone stands in any answer.
    last = text.rfind(frame.closing, ended) if frame.closing.strip() else -1
    if last >= ended:
        turns.append(_rest(text, spans, ended, last + len(frame.opening), tokenizer, frame))
        ended = last + len(frame.closing)
    answer = next((i for i, (start, _) in enumerate(spans) if start >= ended), len(ids))
    return Prompt(tuple(turn for turn in turns if turn is not None), answer)


def token_spans(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of tokens, special ones included, and the characters of each."""
    text = _decoded(ids, tokenizer)
    pieces = [_decoded([i], tokenizer) for i in ids]
    if "".join(pieces) == text:
        ends = []
        at = 0
        for piece in pieces:
            at += len(piece)
            ends.append(at)
    else:  # characters of several tokens, or spaces that are dropped at a beginning
        ends = [min(len(text), end) for end in _ends(ids, tokenizer)]
    starts = [0, *ends[:-1]]
    return text, [(min(a, b), b) for a, b in zip(starts, ends, strict=True)]


def _ends(ids: Sequence[int], tokenizer: Any) -> Iterator[int]:
    """Yield how many characters of the text there are up to the end of each token.

    A token is decoded with the few before it: alone it may lose a space, or be a part of a character. A window of them
    begins where a token before it ended whole characters.
    """
    start, before, whole = 0, 0, 0
    for i in range(len(ids)):
        window = _decoded(ids[start : i + 1], tokenizer)
        yield before + len(window)
        if window.endswith(_PART):
            continue
        if i - start >= _WINDOW and whole > start:
            before += len(window) - len(_decoded(ids[whole : i + 1], tokenizer))
            start = whole
        whole = i + 1


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _questions(text: str, frame: Frame) -> list[tuple[int, int]]:
    """Return where the user's turns stand: between an opening and the next closing."""
    if not frame.opening or not frame.between:
        return []
    pattern = re.compile(re.escape(frame.opening) + "(.*?)(?:" + re.escape(frame.between) + r"|\Z)", re.DOTALL)
    return [match.span(1) for match in pattern.finditer(text)]


def _turn(text: str, spans: Sequence[tuple[int, int]], start: int, end: int, *, asked: bool) -> Turn | None:
    """The turn of the characters from `start` to `end`; None where there is nothing but space."""
    inside = [i for i, (a, b) in enumerate(spans) if a < end and b > start and b > a]
    if not text[start:end].strip() or not inside:
        return None
    first, last = inside[0], inside[-1] + 1
    return Turn(text[start:end], first, last, tuple((a - start, b - start) for a, b in spans[first:last]), asked)


def _rest(
    text: str, spans: Sequence[tuple[int, int]], start: int, end: int, tokenizer: Any, frame: Frame
) -> Turn | None:
    """What stands between questions: a system prompt or an earlier answer, unless it is the template's own text."""
    end -= len(frame.opening)
    fixed = {"", *(_undated(own, tokenizer) for own in frame.fixed)}
    if start >= end or _undated(text[start:end], tokenizer) in fixed:
        return None
    turn = _turn(text, spans, start, end, asked=False)
    return None if turn is None else Turn(_plain(turn.text, tokenizer), turn.first, turn.last, turn.spans, False)


def _plain(text: str, tokenizer: Any) -> str:
    """The text without special tokens."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, " ")
    return " ".join(text.split())


def _undated(text: str, tokenizer: Any) -> str:
    """The text without special tokens, and with no date: some templates tell that of the day."""
    return _DATED.sub("0", _plain(text, tokenizer))


def _own(text: str, tokenizer: Any) -> tuple[str, ...]:
    return (text,) if _plain(text, tokenizer) else ()


def _common_end(a: str, b: str) -> str:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return a[len(a) - n :]


def _common_start(a: str, b: str) -> str:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return a[:n]
