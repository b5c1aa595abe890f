"""Normal data the base makes of its own: prompts it comes up with, and its own answers.

The retain term is a KL to the base, so the base's own text is the right ground; and because the prompts are drawn
through the same template as the bad file's, format is no shortcut (LLMU, lesson 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from qunlearn.data.records import Dataset, Record
from qunlearn.data.roles import keep_unlike
from qunlearn.data.tokenize import Template, prompt_frame
from qunlearn.errors import DataError
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.load import Base

_ROUND = 128  # prompts drawn at a time


@dataclass(frozen=True)
class SelfMade:
    """The rows, and how many were drawn, empty, repeated, or too close to the bad file."""

    records: tuple[Record, ...]
    drawn: int
    unusable: int
    repeated: int
    too_close: int


def self_made_normal(base: Base, bad: Dataset, template: Template, count: int, *, seed: int, length: int) -> SelfMade:
    """Draw `count` rows from the base in the bad file's format; `length` bounds prompt and answer, in tokens.

    Stops early when the base only repeats itself. Raises DataError when hardly anything usable comes.
    """
    kept: list[Record] = []
    seen: set[str] = set()
    drawn = unusable = repeated = too_close = 0
    for turn in range(max(4, 6 * count // _ROUND)):
        rows = _draw(base, bad, template, _ROUND, seed=seed + turn, length=length)
        drawn += _ROUND
        unusable += _ROUND - len(rows)
        fresh = []
        for record in rows:
            if record.key in seen:
                repeated += 1
            else:
                seen.add(record.key)
                fresh.append(record)
        clean = keep_unlike(fresh, bad)
        too_close += len(fresh) - len(clean)
        kept += clean
        if len(kept) >= count or (turn >= 3 and not fresh):
            break
    if len(kept) < 8:
        hint = "give --normal with data the model should go on answering as before"
        raise DataError(f"the base made only {len(kept)} usable rows of {drawn} drawn", hint=hint)
    numbered = [Record(r.turns, r.completion, i + 1, {}) for i, r in enumerate(kept[:count])]
    return SelfMade(tuple(numbered), drawn, unusable, repeated, too_close)


def _draw(base: Base, bad: Dataset, template: Template, n: int, *, seed: int, length: int) -> list[Record]:
    tokenizer = base.tokenizer
    if bad.shape == "text":
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        texts = _sample(base, [[start or 0]] * n, Sampling(length, 1.0, 1.0, seed))
        return [Record((), text, 0, {}) for text in texts if len(text.split()) >= 4]
    opening, closing = prompt_frame(template, tokenizer)
    special = template.kind != "chat"
    start_ids = tokenizer(opening, add_special_tokens=special)["input_ids"] or [tokenizer.eos_token_id or 0]
    # The prompt ends where its template goes on; a raw template has no closing, so a line is a prompt.
    end = closing.strip() or "\n"
    prompts = []
    for text in _sample(base, [start_ids] * n, Sampling(length, 1.0, 1.0, seed), special=True):
        prompt = text.split(end)[0].split("\n\n")[0].strip()
        if len(prompt.split()) >= 2 and not any(t in prompt for t in tokenizer.all_special_tokens):
            prompts.append(prompt)
    framed = [tokenizer(opening + p + closing, add_special_tokens=special)["input_ids"] for p in prompts]
    answers = _sample(base, framed, Sampling(length)) if framed else []
    # Base models do not stop by themselves: an answer ends where the next question would begin.
    stop = opening.strip() or "\n\n"
    rows = [Record((("user", p),), a.split(stop)[0].strip(), 0, {}) for p, a in zip(prompts, answers, strict=True)]
    return [r for r in rows if r.completion]


def _sample(base: Base, prompts: list[list[int]], sampling: Sampling, *, special: bool = False) -> list[str]:
    out = generate(base, prompts, sampling)
    return [base.tokenizer.decode(ids, skip_special_tokens=not special) for ids in out]
