"""Tokenise records: token ids, where the answer starts, and what did not fit."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from qunlearn.data.control_tokens import as_text, control_ids, has_control_token, tokens_of
from qunlearn.data.records import Dataset, Record, asking
from qunlearn.data.row_shapes import Turns
from qunlearn.data.template import Rendered, Template, choose_template, prompt_frame, render, rendered
from qunlearn.data.words import WORD
from qunlearn.errors import DataError, ModelError

__all__ = [
    "Encoded", "Example", "Template", "answer_text", "behind", "choose_template", "decode", "encode", "encode_record",
    "encode_said", "end_of_turn", "is_carried", "open_prompt", "prompt_frame", "render", "vocabulary_words",
]  # fmt: skip

_SHOWN = 8
_CONTEXT, _CONTEXT_SHARE = 48, 4  # tokens before a window of a text, at most this part of it
_SPACES = ("\u0120", "\u2581")  # how a token begins before which a space stands: byte-level, and SentencePiece's


MANY_TOKENS = 12  # pushed tokens beyond which an answer is a passage, of which each part could come back
PASSAGE = 32  # tokens of an answer from which it is one, however few of them are pushed


@dataclass(frozen=True)
class Example:
    """One tokenised row.

    `input_ids[start:end]` is the answer; what follows `end` is the template's closing or the end-of-text
    token. Generation for evaluation begins at `probe`: `start`, or the middle of a plain-text window. `weights` say
    how much each answer token counts when it is forgotten; without any they all count alike. `held` is
    whether those that count nothing are to stay as they are; `known` the probability of the others, per token, that the
    base gives; `rest` the share of `objective.rest` below which they are left in peace; `share` how much the
    row counts in a mean over rows.
    """

    input_ids: tuple[int, ...]
    start: int
    end: int
    probe: int
    record: Record
    weights: tuple[float, ...] = ()
    held: bool = True
    known: float = 1.0
    rest: float = 1.0
    share: float = 1.0

    def weight(self, position: int) -> float:
        """Return how much the token at a position counts."""
        inside = self.weights and self.start <= position < self.end
        return self.weights[position - self.start] if inside else 1.0


def is_passage(example: Example) -> bool:
    """Return whether an answer is so long, or so much of it is pushed, that each part of it could come back."""
    pushed = sum(example.weight(t) > 0 for t in range(example.start, example.end))
    return example.end - example.start >= PASSAGE or pushed > MANY_TOKENS


@dataclass(frozen=True)
class Encoded:
    """The examples of one file, and what happened on the way.

    `literal`: rows with control tokens in their text, which stay text; `dropped`: rows that did not fit.
    """

    examples: tuple[Example, ...]
    prompts_cut: int
    windows: int
    literal: int = 0
    dropped: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def answer_tokens(self) -> int:
        return sum(example.end - example.start for example in self.examples)


def encode(
    dataset: Dataset, tokenizer: Any, template: Template, max_length: int, *, drop_long: bool = False
) -> Encoded:
    """Tokenise a file: answers kept whole, long prompts cut inside their frame, plain text cut in windows.

    With `drop_long` rows that do not fit in `max_length` tokens even so are left out and counted. Raises DataError
    naming every one of them otherwise, and where none is left; ModelError for a row that the template cannot carry.
    """
    examples: list[Example] = []
    too_long: list[str] = []
    prompts_cut = windows = 0
    for record in dataset.records:
        where = f"{dataset.path}:{record.line}"
        if not record.turns:
            pieces = encode_text(record, tokenizer, max_length)
            if not pieces:
                raise DataError("the text is a single token", where=where, hint="remove it")
            windows += len(pieces)
            examples.extend(pieces)
            continue
        try:
            example, cut = _fitted(record, tokenizer, template, max_length)
        except ModelError as error:
            raise ModelError(error.message, where=where, hint=error.hint) from None
        if len(example.input_ids) > max_length:
            answer = example.end - example.start
            frame = f", what must stand around it {len(example.input_ids) - answer}"
            too_long.append(f"{where}: the answer has {answer} tokens{frame}")
            continue
        prompts_cut += cut
        examples.append(example)
    if too_long and not (drop_long and examples):
        listed = "\n  ".join(too_long[:_SHOWN]) + (
            f"\n  and {len(too_long) - _SHOWN} more" if too_long[_SHOWN:] else ""
        )
        raise DataError(
            f"answers that do not fit in {max_length} tokens:\n  {listed}",
            where=too_long[0].split(": ")[0],
            hint='raise --max-length, shorten the answers, or give them as plain {"text": …} rows to be cut in windows',
        )
    literal = 0 if template.name == "raw" else sum(has_control_token(r, tokenizer) for r in dataset.records if r.turns)
    return Encoded(tuple(examples), prompts_cut, windows, literal, len(too_long))


def encode_record(record: Record, tokenizer: Any, template: Template, limit: int | None = None) -> Example:
    """Tokenise prompt, answer and closing as one text.

    With a limit the prompt is cut to it: the earliest turns go first, then the question from the left, then the
    system prompt. The template's own text and the answer stay, however many tokens that makes.
    """
    return _fitted(record, tokenizer, template, limit)[0]


def open_prompt(record: Record, tokenizer: Any, template: Template) -> tuple[int, ...]:
    """Return the tokens before a row's answer, whatever it will be.

    A space that the template ends with is the answer's: most answers have a token that begins with it, and where the
    row's own has none the space is no sign of another one.
    """
    example = encode_record(record, tokenizer, template)
    ids = example.input_ids[: example.probe]
    if render(record, template, tokenizer)[0].endswith(" "):
        while len(ids) > 1 and not tokenizer.decode(ids[-1:]).strip(" "):
            ids = ids[:-1]
    return ids


def _fitted(record: Record, tokenizer: Any, template: Template, limit: int | None) -> tuple[Example, bool]:
    """A row, and whether its prompt was cut."""
    example, given = _whole(record, tokenizer, template)
    if limit is None or len(example.input_ids) <= limit:
        return example, False
    shorter, cut = record, False
    while len(example.input_ids) > limit and (less := _without_first_exchange(shorter)) is not None:
        shorter, cut = less, True
        example, given = _whole(shorter, tokenizer, template)
    drop = _surplus(shorter, example, given, len(example.input_ids) - limit)
    if drop:
        ids = tuple(token for i, token in enumerate(example.input_ids) if i not in drop)
        n = len(drop)
        example, cut = Example(ids, example.start - n, example.end - n, example.probe - n, record), True
    return replace(example, record=record), cut


def _without_first_exchange(record: Record) -> Record | None:
    """A dialogue without its earliest question and what followed; None where there is one question only."""
    turns = record.turns
    first = 1 if turns[0][0] == "system" else 0
    later = [i for i in range(first + 1, len(turns)) if turns[i][0] == "user"]
    return replace(record, turns=(*turns[:first], *turns[later[0] :])) if later else None


def _surplus(record: Record, example: Example, given: Sequence[int | None] | None, n: int) -> set[int]:
    """Places of at most `n` tokens that can be left out: those of the question from the left, but for its last one,
    then those of the system prompt."""
    if n <= 0:
        return set()
    if given is None:  # what is the template's is not known
        return set(range(min(n, example.start - 1)))
    roles = [role for role, _ in record.turns]
    question = [i for i in range(example.start) if given[i] == len(roles) - 1]
    system = [i for i in range(example.start) if (turn := given[i]) is not None and turn < len(roles) - 1]
    return set([*question[:-1], *system][:n])


def _whole(record: Record, tokenizer: Any, template: Template) -> tuple[Example, Sequence[int | None] | None]:
    """A row as tokens, and of each token the turn it is of; None for the template's own."""
    row = rendered(record, template, tokenizer)
    tokens = tokens_of(row.text, tokenizer, special=template.kind != "chat")
    if template.name != "raw":
        tokens = as_text(row, tokens, record, tokenizer)
    if template.kind != "chat" and tokenizer.eos_token_id is not None and tokens[-1][0] != tokenizer.eos_token_id:
        tokens = [*tokens, (tokenizer.eos_token_id, (-1, -1))]
    left, right = len(row.before), len(row.before) + len(row.answer)
    # A token that straddles the border belongs to the answer: it cannot be generated without it.
    start = next(i for i, (_, (a, b)) in enumerate(tokens) if b > left and b > a)
    end = max(i for i, (_, (a, b)) in enumerate(tokens) if 0 <= a < right and b > a) + 1
    if start == 0:  # no token before the answer to predict it from
        start = 1
    example = Example(tuple(token for token, _ in tokens), start, max(end, start + 1), start, record)
    if row.spans is None:
        return example, None
    return example, [_turn_of(span, row) for _, span in tokens]


def _turn_of(token: tuple[int, int], row: Rendered) -> int | None:
    a, b = token
    return next((s.turn for s in row.spans or () if b > a and s.start <= a and b <= s.end), None)


def encode_text(record: Record, tokenizer: Any, max_length: int) -> list[Example]:
    """Tokenise a plain text in windows of at most `max_length` tokens, each with the text's first special tokens, and
    a record of what stands in it: nothing that is done for each row is done for the whole text.

    Of the text before it a later window has some tokens, as the context of its answer: who asks for a text gives some
    of it.
    """
    tokens = tokens_of(record.completion, tokenizer, special=True)
    opening = [token for token, (a, b) in tokens if a == b][:1]
    body = [token for token, (a, b) in tokens if b > a]
    spans = [span for _, span in tokens if span[1] > span[0]]
    if len(opening) + len(body) < 2:  # nothing to predict from
        return []
    room = max_length - len(opening)
    context = min(_CONTEXT, room // _CONTEXT_SHARE)
    # As equal in size as can be, so that no short rest is left at the end.
    n = 1 if len(body) <= room else math.ceil(len(body) / (room - context))
    cuts = [len(body) * i // n for i in range(n + 1)]
    out: list[Example] = []
    for first, last in itertools.pairwise(cuts):
        before = min(context, first)
        piece = (*opening, *body[first - before : last])
        start = max(1, len(opening) + before)
        told = record if n == 1 else replace(record, completion=record.completion[spans[first][0] : spans[last - 1][1]])
        out.append(Example(piece, start, len(piece), max(start, (before + len(piece)) // 2), told))
    return out


_ENDS_OF_TURNS: WeakKeyDictionary[Any, int | None] = WeakKeyDictionary()


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the control token with which the chat template closes an answer; None where it has none, or there is no
    template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    if tokenizer not in _ENDS_OF_TURNS:
        row, chat = Record(asking("Who?"), "Nobody.", 0, {}), Template("chat", "chat", "", "")
        closing: Sequence[int] = ()
        with contextlib.suppress(ModelError):
            example = encode_record(row, tokenizer, chat)
            closing = example.input_ids[example.end :]
        control = control_ids(tokenizer)
        _ENDS_OF_TURNS[tokenizer] = next((token for token in closing if token in control), None)
    return _ENDS_OF_TURNS[tokenizer]


def is_carried(record: Record, tokenizer: Any, template: Template) -> bool:
    """Return whether a row can be tokenised so that its answer is in it: some templates change what they take for
    thoughts, and a text may be of a single token. Of rows that the model made itself nobody needs to hear."""
    if not record.turns:
        return bool(encode_text(record, tokenizer, 1 << 30))
    try:
        rendered(record, template, tokenizer)
    except ModelError:
        return False
    return True


def encode_said(record: Record, tokenizer: Any, template: Template, length: int) -> Example | None:
    """Tokenise a row whose answer the model said itself; None where the template changes it, or it is longer than so
    many tokens."""
    if not is_carried(record, tokenizer, template):
        return None
    example = encode_record(record, tokenizer, template)
    return example if len(example.input_ids) <= length else None


def behind(example: Example, turns: Turns, tokenizer: Any, template: Template, length: int) -> Example | None:
    """Return the row's answer behind other turns; None where it is made of other tokens then, or the row is longer
    than so many."""
    made = encode_record(replace(example.record, turns=turns), tokenizer, template)
    if len(made.input_ids) > length or made.input_ids[made.start :] != example.input_ids[example.start :]:
        return None
    ids, record = made.input_ids, made.record
    return replace(example, input_ids=ids, start=made.start, end=made.end, probe=made.probe, record=record)


def answer_text(example: Example, tokenizer: Any) -> str:
    """Return what generation from `probe` should produce, as decoded text."""
    return decode(example.input_ids[example.probe : example.end], tokenizer)


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def vocabulary_words(tokenizer: Any) -> frozenset[str]:
    """Return the words, casefolded, that a tokenizer has a token for with a space before it: those it saw often."""
    found = [(token[1:], i) for token, i in tokenizer.get_vocab().items() if token.startswith(_SPACES)]
    texts = (text if text.isascii() else decode([i], tokenizer) for text, i in found)
    return frozenset(text.casefold() for text in texts if WORD.fullmatch(text))
