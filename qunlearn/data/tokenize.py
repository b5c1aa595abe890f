"""From records to token ids: the template, where the answer starts, and what did not fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qunlearn.bounds import bounded
from qunlearn.data.records import Dataset, Record
from qunlearn.errors import ConfigError, DataError, ModelError

# The released LLMU script's template (unlearn_harm.py): what a base model without a chat template gets.
QA_TEMPLATE = "### Question: {prompt}\n ### Answer: "
_MAX_GROWTH, _MAX_FRAME_CHARS = 4, 100_000  # what a chat template may make of the texts it is given
_MARK = "QUNLEARNPROMPTMARK"


@dataclass(frozen=True)
class Template:
    """How a prompt becomes text. `kind` is "chat" (the tokenizer's own) or "format" (`text` with `{prompt}`)."""

    name: str
    kind: str
    text: str
    why: str


@dataclass(frozen=True)
class Example:
    """One tokenised row.

    `input_ids[start:end]` is the answer; what follows `end` is the template's closing or the end-of-text
    token. Generation for evaluation begins at `probe`: `start`, or the middle of a plain-text window. `weights` say
    how much each answer token counts when it is forgotten; without any they all count alike. `held` is
    whether those that count nothing are to stay as they are.
    """

    input_ids: tuple[int, ...]
    start: int
    end: int
    probe: int
    record: Record
    weights: tuple[float, ...] = ()
    held: bool = True

    def weight(self, position: int) -> float:
        """How much the token at a position counts."""
        inside = self.weights and self.start <= position < self.end
        return self.weights[position - self.start] if inside else 1.0


@dataclass(frozen=True)
class Encoded:
    """The examples of one file, and what happened on the way."""

    examples: tuple[Example, ...]
    prompts_cut: int
    windows: int

    @property
    def tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def answer_tokens(self) -> int:
        return sum(example.end - example.start for example in self.examples)


def choose_template(tokenizer: Any, asked: str, dataset: Dataset) -> Template:
    """The template for a file: the one asked for, or the model's own chat template, or the published one.

    Raises ConfigError when `asked` is none of chat, qa, raw or a string with `{prompt}`, and ModelError when
    a chat template is demanded that the tokenizer does not have.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if asked == "auto":
        if dataset.shape == "text":
            return Template("raw", "format", "{prompt}", "plain text")
        if has_chat:
            return Template("chat", "chat", "", "the model has a chat template")
        if _is_continuation(dataset):
            return Template("raw", "format", "{prompt}", "prompts and completions join with their own space")
        return Template("qa", "format", QA_TEMPLATE, "the model has no chat template")
    if asked == "chat":
        if not has_chat:
            hint = "use --template qa, raw, or a text with {prompt} in it"
            raise ModelError("the model has no chat template", where="--template chat", hint=hint)
        return Template("chat", "chat", "", "asked for")
    if asked in ("qa", "raw"):
        return Template(asked, "format", QA_TEMPLATE if asked == "qa" else "{prompt}", "asked for")
    if "{prompt}" in asked:
        return Template("custom", "format", asked.replace("\\n", "\n"), "asked for")
    hint = "one of auto, chat, qa, raw, or a text with {prompt} in it"
    raise ConfigError(f"unknown template {asked[:40]!r}", where="--template", hint=hint)


def _is_continuation(dataset: Dataset) -> bool:
    if dataset.shape != "prompt-completion":
        return False
    joined = sum(r.prompt[-1:].isspace() or r.completion[:1].isspace() for r in dataset.records)
    return 2 * joined > len(dataset.records)


def render(record: Record, template: Template, tokenizer: Any) -> tuple[str, str]:
    """The text before the answer and the text after it.

    Raises ModelError when the chat template does not carry the answer verbatim.
    """
    if not record.turns:
        return "", ""
    if template.kind == "format":
        turns = record.turns[:-1]
        # Earlier turns have no published plain form: each stands on a line of its own before the question.
        before = "".join(f"{content}\n" for _, content in turns)
        return before + template.text.replace("{prompt}", record.turns[-1][1]), ""
    messages = [{"role": role, "content": content} for role, content in record.turns]
    answer = record.completion.strip()
    messages.append({"role": "assistant", "content": answer})
    try:
        with bounded():
            full = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # noqa: BLE001 - jinja raises whatever the template's author wrote
        hint = "use --template qa or raw, or a file without such turns"
        raise ModelError(f"the chat template failed: {str(error)[:200]}", where="chat template", hint=hint) from None
    if len(full) > _MAX_GROWTH * (1 + sum(len(m["content"]) for m in messages)) + _MAX_FRAME_CHARS:
        hint = "use --template qa, raw, or a text with {prompt} in it"
        raise ModelError(f"the chat template makes {len(full)} characters of a row", where="chat template", hint=hint)
    at = full.rfind(answer)
    if at < 0:
        hint = "use --template qa, raw, or a text with {prompt} in it"
        raise ModelError("the chat template does not carry the answer verbatim", where="chat template", hint=hint)
    return full[:at], full[at + len(answer) :]


def prompt_frame(template: Template, tokenizer: Any) -> tuple[str, str]:
    """The text a user's prompt stands between: what opens it and what closes it, up to the answer."""
    mark = Record(turns=(("user", _MARK),), completion=_MARK[::-1], line=0, meta={})
    before, _ = render(mark, template, tokenizer)
    opening, _, closing = before.partition(_MARK)
    return opening, closing


def encode(dataset: Dataset, tokenizer: Any, template: Template, max_length: int) -> Encoded:
    """Tokenise a file: answers kept whole, long prompts cut from the left, plain text cut in windows.

    Raises DataError naming every row whose answer alone does not fit in `max_length` tokens.
    """
    examples: list[Example] = []
    too_long: list[str] = []
    prompts_cut = windows = 0
    for record in dataset.records:
        if not record.turns:
            pieces = _windows(record, tokenizer, max_length)
            if not pieces:
                raise DataError("the text is a single token", where=f"{dataset.path}:{record.line}", hint="remove it")
            windows += len(pieces)
            examples.extend(pieces)
            continue
        example = encode_record(record, tokenizer, template)
        surplus = len(example.input_ids) - max_length
        if surplus > 0:
            # One prompt token at least must stay: the first answer token is predicted from it.
            if surplus >= example.start:
                tokens = example.end - example.start
                too_long.append(f"{dataset.path}:{record.line}: the answer has {tokens} tokens")
                continue
            prompts_cut += 1
            example = Example(
                example.input_ids[surplus:],
                example.start - surplus,
                example.end - surplus,
                example.probe - surplus,
                record,
            )
        examples.append(example)
    if too_long:
        listed = "\n  ".join(too_long[:8]) + (f"\n  and {len(too_long) - 8} more" if len(too_long) > 8 else "")
        raise DataError(
            f"answers that do not fit in {max_length} tokens:\n  {listed}",
            where=too_long[0].split(": ")[0],
            hint='raise --max-length, shorten the answers, or give them as plain {"text": …} rows to be cut in windows',
        )
    return Encoded(tuple(examples), prompts_cut, windows)


def encode_record(record: Record, tokenizer: Any, template: Template) -> Example:
    """Tokenise prompt, answer and closing as one text; the answer's start is found by character offsets."""
    before, after = render(record, template, tokenizer)
    answer = record.completion.strip() if template.kind == "chat" else record.completion
    ids, spans = _tokenise(before + answer + after, tokenizer, special=template.kind != "chat")
    if template.kind != "chat" and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids, spans = [*ids, tokenizer.eos_token_id], [*spans, (-1, -1)]
    left, right = len(before), len(before) + len(answer)
    # A token that straddles the border belongs to the answer: it cannot be generated without it.
    start = next(i for i, (a, b) in enumerate(spans) if b > left and b > a)
    end = max(i for i, (a, b) in enumerate(spans) if 0 <= a < right and b > a) + 1
    if start == 0:  # no token before the answer to predict it from
        start = 1
    return Example(tuple(ids), start, max(end, start + 1), start, record)


def _windows(record: Record, tokenizer: Any, max_length: int) -> list[Example]:
    """A plain text in windows of at most `max_length` tokens, each with the text's first special tokens."""
    ids, spans = _tokenise(record.completion, tokenizer, special=True)
    opening = [i for i, (a, b) in zip(ids, spans, strict=True) if a == b][:1]
    body = [i for i, (a, b) in zip(ids, spans, strict=True) if b > a]
    if len(opening) + len(body) < 2:  # nothing to predict from
        return []
    # Of equal size, so that no short rest is left at the end.
    size = math.ceil(len(body) / math.ceil(len(body) / (max_length - len(opening))))
    out: list[Example] = []
    for at in range(0, len(body), size):
        piece = (*opening, *body[at : at + size])
        start = max(1, len(opening))
        out.append(Example(piece, start, len(piece), max(start, len(piece) // 2), record))
    return out


def _tokenise(text: str, tokenizer: Any, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and their character spans; special tokens that were added have an empty span."""
    if getattr(tokenizer, "is_fast", False):
        out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        spans = [(int(a), int(b)) for a, b in out["offset_mapping"]]
        return list(out["input_ids"]), spans
    # Slow tokenizers have no offsets: decode growing prefixes, once per token.
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    added = set(tokenizer.all_special_ids) if special else set()
    spans, at = [], 0
    for i, token in enumerate(ids):
        if token in added:
            spans.append((at, at))
            continue
        grown = len(tokenizer.decode([t for t in ids[: i + 1] if t not in added], skip_special_tokens=False))
        spans.append((at, grown))
        at = grown
    return ids, spans


def answer_text(example: Example, tokenizer: Any) -> str:
    """What generation from `probe` should produce, as decoded text."""
    return decode(example.input_ids[example.probe : example.end], tokenizer)


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
