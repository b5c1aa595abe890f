"""Generate retain rows with the base: prompts it comes up with, and its own answers.

The retain term is a KL to the base, so the base's own text is the right ground; and because the prompts are drawn
through the same template as the bad file's, format is no shortcut (LLMU, lesson 3).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from qunlearn.data.control_tokens import control_ids
from qunlearn.data.records import Dataset, Record, unanswered
from qunlearn.data.tokenize import Template, open_prompt, prompt_frame
from qunlearn.data.words import beginning, pieces
from qunlearn.errors import DataError
from qunlearn.model.generate import Asked, Sampling, generate_each
from qunlearn.model.load import Base
from qunlearn.parallel.ranks import current
from qunlearn.roles.continuation import begun_ids, decoded
from qunlearn.roles.other_subjects import Limits, asked_about_others, forms_of, keep_others
from qunlearn.roles.unlike import keep_unlike
from qunlearn.utils.text import folded, is_clean

_ABOUT_OTHERS = 0.5  # share of the near rows that ask what bad prompts ask, about subjects which the base names
_OF_A_TEXT = 8  # words of a bad text, up to half of which a near row begins with


@dataclass(frozen=True)
class SelfMade:
    """The rows, how many of them ask what bad prompts ask about others, and how many of those that were drawn were
    unusable, repeated, or too close to the bad file."""

    records: tuple[Record, ...]
    drawn: int
    unusable: int
    repeated: int
    too_close: int
    about_others: int = 0


@dataclass(frozen=True)
class Wanted:
    """`count` rows, prompt and answer of at most `length` tokens each and `positions` together; a share `near` of the
    prompts asks what bad prompts ask, about other subjects, or begins with the first words of one, so that their
    neighbours are among them. Of the prompts that are `given` none is asked again about others."""

    count: int
    near: float
    length: int
    seed: int
    most_rows: int
    positions: int = 1 << 30
    given: frozenset[str] = frozenset()

    @property
    def round(self) -> int:
        """Prompts drawn at a time: more than are wanted, for some are dropped."""
        return min(self.most_rows, 2 * self.count)


def self_made_rows(base: Base, forget_rows: Dataset, template: Template, wanted: Wanted) -> SelfMade:
    """Draw rows from the base in the bad file's format.

    Stops early when the base only repeats itself. Raises DataError when hardly anything usable comes.
    """
    rows = _Rows(_drawn(base, forget_rows, template, wanted), forget_rows, wanted)
    forms = forms_of(forget_rows.records) if forget_rows.shape != "text" else []
    about_others = round(_ABOUT_OTHERS * wanted.near * wanted.count) if forms else 0
    rows.until(wanted.count - about_others)
    others: list[Record] = []
    if about_others:
        limits = Limits(about_others, wanted.positions - wanted.length, wanted.seed, wanted.given)
        asked = asked_about_others(base, forms, [row.prompt for row in rows.kept], template, limits)
        others = keep_others(_answered(base, [asked], template, wanted)[0], forms, forget_rows, rows.kept)
    rows.until(wanted.count - len(others))
    kept = [*others, *rows.kept][: wanted.count]
    if len(kept) < 8:
        hint = "give --normal with data the model should go on answering as before"
        raise DataError(f"the base made only {len(kept)} usable rows of {rows.drawn} drawn", hint=hint)
    numbered = [Record(r.turns, r.completion, i + 1, {}) for i, r in enumerate(kept)]
    return SelfMade(tuple(numbered), rows.drawn, rows.unusable, rows.repeated, rows.too_close, len(others))


class _Rows:
    """The rows that are kept of what is drawn turn by turn, and how many are not."""

    def __init__(self, turns: Iterator[tuple[int, int, list[Record]]], forget_rows: Dataset, wanted: Wanted) -> None:
        self._turns, self._forget_rows, self._round = turns, forget_rows, wanted.round
        self.kept: list[Record] = []
        self.drawn = self.unusable = self.repeated = self.too_close = 0
        self._turn, self._is_done = 0, False

    def until(self, count: int) -> None:
        """Draw until so many rows are there, or until the base only repeats itself."""
        while len(self.kept) < count and not self._is_done:
            found = next(self._turns, None)
            if found is None:
                self._is_done = True
                break
            texts, fresh, rows = found
            clean = keep_unlike(rows, self._forget_rows)
            self.drawn += self._round
            self.repeated += texts - fresh
            self.unusable += self._round - texts + fresh - len(rows)
            self.too_close += len(rows) - len(clean)
            self.kept += clean
            self._is_done = self._turn >= 3 and not fresh
            self._turn += 1


@dataclass(frozen=True)
class _Said:
    """What a row begins with, or asks, or says, behind the system prompt of a bad row."""

    system: str
    text: str


def _drawn(
    base: Base, forget_rows: Dataset, template: Template, wanted: Wanted
) -> Iterator[tuple[int, int, list[Record]]]:
    """Yield of each turn how many texts came, how many of them are new, and the rows that they make.

    Each turn has a seed of its own. As many as there are processes are drawn at once, and nothing in a turn hangs on
    how many: those that are not asked for any more are for nothing.
    """
    seen: set[str] = set()
    turns = max(4, math.ceil(6 * wanted.count / wanted.round))
    ahead = current().count
    for first in range(0, turns, ahead):
        draws = [
            (_text_draw if forget_rows.shape == "text" else _prompt_draw)(base, forget_rows, template, wanted, turn)
            for turn in range(first, min(turns, first + ahead))
        ]
        said = generate_each(base, [draw.asked for draw in draws])
        new: list[list[_Said]] = []
        texts = [draw.read(ids) for draw, ids in zip(draws, said, strict=True)]
        for of_turn in texts:
            fresh = {key: said for said in of_turn if is_clean(said.text) and (key := folded(said.text)) not in seen}
            seen.update(fresh)
            new.append([*fresh.values()])
        if forget_rows.shape == "text":
            rows = [[Record((), said.text, 0, {}) for said in of_turn] for of_turn in new]
        else:
            asked = [[unanswered(s.text, s.system) for s in of_turn] for of_turn in new]
            rows = _answered(base, asked, template, wanted)
        yield from ((len(t), len(n), r) for t, n, r in zip(texts, new, rows, strict=True))


@dataclass(frozen=True)
class _Draw:
    """What is asked of the base in a turn, and how what it says is read."""

    asked: Asked
    read: Callable[[list[list[int]]], list[_Said]]


def _text_draw(base: Base, forget_rows: Dataset, _: Template, wanted: Wanted, turn: int) -> _Draw:
    """Plain texts the base makes from nothing, or from the first words of a bad one."""
    tokenizer = base.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    begun = [b.text for b in _beginnings(forget_rows, wanted, turn)]
    started = [[start or 0, *(tokenizer(b, add_special_tokens=False)["input_ids"] if b else ())] for b in begun]

    def read(drawn: list[list[int]]) -> list[_Said]:
        texts = [b + text for b, text in zip(begun, decoded(base, started, drawn), strict=True)]
        return [_Said("", text) for text in texts if len(pieces(text)) >= 4]

    return _Draw(Asked(started, _free(wanted, turn)), read)


def _prompt_draw(base: Base, forget_rows: Dataset, template: Template, wanted: Wanted, turn: int) -> _Draw:
    """Prompts that the base writes itself in the template, behind the system prompt of some bad row."""
    begun = _beginnings(forget_rows, wanted, turn)
    frames = {b.system: prompt_frame(template, base.tokenizer, b.system) for b in begun}
    # As in rows, a space before the prompt belongs to its first token.
    opened = [frames[b.system][0] + b.text if b.text else frames[b.system][0].rstrip(" ") for b in begun]
    closing = next(iter(frames.values()))[1]
    started = [begun_ids(base, template, text) for text in opened]
    # The prompt ends where its template goes on; a raw template has no closing, so a line is a prompt.
    end = closing.strip() or "\n"
    first = base.tokenizer(closing.strip(), add_special_tokens=False)["input_ids"][:1]
    control = control_ids(base.tokenizer)
    names, stop = base.tokenizer.convert_ids_to_tokens(sorted(control)), [i for i in first if i in control]
    # What the answer and the template's closing need of the model's positions is left to them.
    free = replace(_free(wanted, turn, stop), stop_text="" if stop else closing.strip())
    room = wanted.positions - wanted.length - len(base.tokenizer(closing, add_special_tokens=False)["input_ids"])
    fitting = [i for i, ids in enumerate(started) if len(ids) <= max(1, room // 2)]
    new = min([free.max_new_tokens, *(room - len(started[i]) for i in fitting)])

    def read(drawn: list[list[int]]) -> list[_Said]:
        said = [
            _Said(begun[i].system, (begun[i].text + text.split(end)[0]).split("\n\n")[0].strip())
            for i, text in zip(fitting, decoded(base, [started[i] for i in fitting], drawn, special=True), strict=True)
        ]
        return [s for s in said if len(pieces(s.text)) >= 2 and not any(name in s.text for name in names)]

    return _Draw(Asked([started[i] for i in fitting], replace(free, max_new_tokens=max(1, new))), read)


def _answered(base: Base, asked: Sequence[Sequence[Record]], template: Template, wanted: Wanted) -> list[list[Record]]:
    """Return the rows with the base's own greedy answers, where the model's positions admit one. Where nothing is
    between prompt and answer, the space with which the base goes on is the answer's."""
    opening, _ = prompt_frame(template, base.tokenizer)
    most = wanted.positions - wanted.length
    framed = []
    for rows in asked:
        prompts = ((row, open_prompt(row, base.tokenizer, template)) for row in rows)
        framed.append([(row, ids) for row, ids in prompts if len(ids) <= most])
    answers = generate_each(base, [Asked([ids for _, ids in rows], Sampling(wanted.length)) for rows in framed])
    out = []
    for pairs, found in zip(framed, answers, strict=True):
        said = decoded(base, [ids for _, ids in pairs], found)
        spaces = [text[: len(text) - len(text.lstrip())] if template.name == "raw" else "" for text in said]
        texts = [ended(text, opening) for text in said]
        rows = [replace(r, completion=s + t) for (r, _), s, t in zip(pairs, spaces, texts, strict=True) if t]
        out.append([row for row in rows if is_clean(row.completion)])
    return out


def ended(answer: str, opening: str) -> str:
    """Return an answer up to where the next question would begin, by its template's `opening`: base models do not stop
    by themselves."""
    return answer.split(opening.strip() or "\n\n")[0].strip()


def _beginnings(forget_rows: Dataset, wanted: Wanted, turn: int) -> list[_Said]:
    """Return the beginnings of drawn rows: nothing, up to half of the words of a bad prompt, or a few of a bad text."""
    rng = random.Random(f"{wanted.seed}/{turn}")
    out = []
    for i in range(wanted.round):
        record = rng.choice(forget_rows.records)
        whole = record.prompt if record.turns else record.completion
        words = len(pieces(whole)) if record.turns else min(_OF_A_TEXT, len(pieces(whole)))
        near = int((i + 1) * wanted.near) > int(i * wanted.near) and words > 1  # evenly among the others
        text = beginning(whole, rng.randint(1, max(1, words // 2))) if near else ""
        out.append(_Said(record.system, text))
    return out


def _free(wanted: Wanted, turn: int, stop: Sequence[int] = ()) -> Sampling:
    # Of neighbouring seeds no turns share their draws.
    seed = random.Random(f"{wanted.seed}/{turn}/said").getrandbits(63)
    return Sampling(wanted.length, 1.0, 1.0, seed, tuple(stop))
