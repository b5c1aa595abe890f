"""Normal data the base makes of its own: prompts it comes up with, and its own answers.

The retain term is a KL to the base, so the base's own text is the right ground; and because the prompts are drawn
through the same template as the bad file's, format is no shortcut (LLMU, lesson 3).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from qunlearn.data.records import Dataset, Record, is_clean
from qunlearn.data.roles import keep_unlike
from qunlearn.data.tokenize import Template, encode_record, prompt_frame
from qunlearn.errors import DataError
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.load import Base

_OF_A_TEXT = 8  # words of a bad text, up to half of which a near row begins with
_ANY_ANSWER = "The"  # stands where the answer will


@dataclass(frozen=True)
class SelfMade:
    """The rows, and how many were drawn, empty, repeated, or too close to the bad file."""

    records: tuple[Record, ...]
    drawn: int
    unusable: int
    repeated: int
    too_close: int


@dataclass(frozen=True)
class Wanted:
    """`count` rows, prompt and answer of at most `length` tokens each; a share `near` of the prompts begins with the
    first words of some bad prompt, so that its neighbours are among them."""

    count: int
    near: float
    length: int
    seed: int
    most_rows: int

    @property
    def round(self) -> int:
        """Prompts drawn at a time: more than are wanted, for some are dropped."""
        return min(self.most_rows, 2 * self.count)


def self_made_normal(base: Base, bad: Dataset, template: Template, wanted: Wanted) -> SelfMade:
    """Draw rows from the base in the bad file's format.

    Stops early when the base only repeats itself. Raises DataError when hardly anything usable comes.
    """
    kept: list[Record] = []
    seen: set[str] = set()
    drawn = unusable = repeated = too_close = 0
    turns = max(4, math.ceil(6 * wanted.count / wanted.round))
    for turn in range(turns):
        texts = _texts(base, bad, wanted, turn) if bad.shape == "text" else _prompts(base, bad, template, wanted, turn)
        fresh = {
            key: text for text in texts if is_clean(text) and (key := " ".join(text.casefold().split())) not in seen
        }
        seen.update(fresh)
        rows = [Record((), text, 0, {}) for text in fresh.values()]
        if bad.shape != "text":
            rows = _answered(base, list(fresh.values()), template, wanted)
        clean = keep_unlike(rows, bad)
        drawn += wanted.round
        repeated += len(texts) - len(fresh)
        unusable += wanted.round - len(texts) + len(fresh) - len(rows)
        too_close += len(rows) - len(clean)
        kept += clean
        if len(kept) >= wanted.count or (turn >= 3 and not fresh):
            break
    if len(kept) < 8:
        hint = "give --normal with data the model should go on answering as before"
        raise DataError(f"the base made only {len(kept)} usable rows of {drawn} drawn", hint=hint)
    numbered = [Record(r.turns, r.completion, i + 1, {}) for i, r in enumerate(kept[: wanted.count])]
    return SelfMade(tuple(numbered), drawn, unusable, repeated, too_close)


def _texts(base: Base, bad: Dataset, wanted: Wanted, turn: int) -> list[str]:
    """Plain texts the base makes from nothing, or from the first words of a bad one."""
    tokenizer = base.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    beginnings = _beginnings(bad, wanted, turn)
    started = [[start or 0, *(tokenizer(b, add_special_tokens=False)["input_ids"] if b else ())] for b in beginnings]
    drawn = _sample(base, started, _free(wanted, turn))
    texts = [begun + text for begun, text in zip(beginnings, drawn, strict=True)]
    return [text for text in texts if len(text.split()) >= 4]


def _prompts(base: Base, bad: Dataset, template: Template, wanted: Wanted, turn: int) -> list[str]:
    """What the base asks itself in the template's place for a prompt."""
    opening, closing = prompt_frame(template, base.tokenizer)
    beginnings = _beginnings(bad, wanted, turn)
    # As in rows, a space before the prompt belongs to its first token.
    started = [_ids(base, template, opening + begun if begun else opening.rstrip(" ")) for begun in beginnings]
    # The prompt ends where its template goes on; a raw template has no closing, so a line is a prompt.
    end = closing.strip() or "\n"
    first = base.tokenizer(closing.strip(), add_special_tokens=False)["input_ids"][:1]
    special, stop = base.tokenizer.all_special_tokens, [i for i in first if i in base.tokenizer.all_special_ids]
    drawn = _sample(base, started, _free(wanted, turn, stop), special=True)
    prompts = [(b + text.split(end)[0]).split("\n\n")[0].strip() for b, text in zip(beginnings, drawn, strict=True)]
    return [p for p in prompts if len(p.split()) >= 2 and not any(token in p for token in special)]


def _answered(base: Base, prompts: Sequence[str], template: Template, wanted: Wanted) -> list[Record]:
    """The base's own greedy answers."""
    opening, _ = prompt_frame(template, base.tokenizer)
    framed = [_asked(base, prompt, template) for prompt in prompts]
    answers = _sample(base, framed, Sampling(wanted.length)) if framed else []
    # Base models do not stop by themselves: an answer ends where the next question would begin.
    stop = opening.strip() or "\n\n"
    rows = [Record((("user", p),), a.split(stop)[0].strip(), 0, {}) for p, a in zip(prompts, answers, strict=True)]
    return [row for row in rows if row.completion and is_clean(row.completion)]


def _asked(base: Base, prompt: str, template: Template) -> list[int]:
    """A prompt as a row has it before its answer: a space that the template ends with belongs to the answer's token."""
    row = encode_record(Record((("user", prompt),), _ANY_ANSWER, 0, {}), base.tokenizer, template)
    return list(row.input_ids[: row.probe])


def _beginnings(bad: Dataset, wanted: Wanted, turn: int) -> list[str]:
    """What each drawn row begins with: nothing, or up to half of the words of a bad prompt, or a few of a bad text."""
    rng = random.Random(f"{wanted.seed}/{turn}")
    out = []
    for i in range(wanted.round):
        record = rng.choice(bad.records)
        words = record.prompt.split() if record.turns else record.completion.split()[:_OF_A_TEXT]
        near = int((i + 1) * wanted.near) > int(i * wanted.near) and len(words) > 1  # evenly among the others
        out.append(" ".join(words[: rng.randint(1, max(1, len(words) // 2))]) if near else "")
    return out


def _free(wanted: Wanted, turn: int, stop: Sequence[int] = ()) -> Sampling:
    return Sampling(wanted.length, 1.0, 1.0, wanted.seed + turn, tuple(stop))


def _ids(base: Base, template: Template, text: str) -> list[int]:
    ids = base.tokenizer(text, add_special_tokens=template.kind != "chat")["input_ids"]
    return list(ids) or [base.tokenizer.eos_token_id or 0]


def _sample(base: Base, prompts: list[list[int]], sampling: Sampling, *, special: bool = False) -> list[str]:
    out = generate(base, prompts, sampling)
    return [base.tokenizer.decode(ids, skip_special_tokens=not special) for ids in out]
