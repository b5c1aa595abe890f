"""Render a row through the chat template, and locate its answer in the rendered text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date as date_type
from functools import partial
from typing import Any

from qunlearn.data.records import Dataset, Record
from qunlearn.data.words import is_unspaced
from qunlearn.errors import ConfigError, ModelError
from qunlearn.utils.limits import bounded

# The released LLMU script's template (unlearn_harm.py): what a base model without a chat template gets.
QA_TEMPLATE = "### Question: {prompt}\n ### Answer: "
_MAX_GROWTH, _MAX_FRAME_CHARS = 4, 100_000  # what a chat template may make of the texts it is given
_MARK = "QUNLEARN{}MARK"
_SHOWN_CHARS = 60
# Chinese and Japanese join without a space: a prompt so long, which ends inside a sentence and asks nothing, goes on.
_MORE_THAN_ASKS, _INSIDE = 24, ("，", "、", ",", "「", "『", "（", "“")
_OTHER_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
_ASKS = re.compile(r"什么|什麼|哪|几|幾|谁|誰|怎|为何|何|どこ|どの|どう|いつ|なぜ|だれ|[吗嗎呢么か]$")
Maker = Callable[[Sequence[str]], str]  # makes a conversation's contents, the answer last, a text
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")  # by which transformers tells templates the day
_ELSE = "use --template qa, raw, or a text with {prompt} in it"


@dataclass(frozen=True)
class Template:
    """How a prompt becomes text. `kind` is "chat" (the tokenizer's own) or "format" (`text` with `{prompt}`); `date` is
    what a chat template that tells the day (Llama 3.2) takes for today, so that rows are the same on another."""

    name: str
    kind: str
    text: str
    why: str
    date: str = ""


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of a rendered row are the text of one of its turns; the answer comes after all."""

    start: int
    end: int
    turn: int


@dataclass(frozen=True)
class Rendered:
    """A row as text. `spans`: what of it is the row's own; None where the template changes a turn so that it is not
    found again."""

    before: str
    answer: str
    after: str
    spans: tuple[Span, ...] | None

    @property
    def text(self) -> str:
        return self.before + self.answer + self.after


def choose_template(tokenizer: Any, asked: str, *files: Dataset | None, date: str = "") -> Template:
    """Return the template for files: the one asked for, or the model's own chat template, or the published one. By
    `auto` it is told by the first file that has prompts, for a plain text is in none. `date`: of what day it is to
    tell, if any; else of this one.

    Raises ConfigError when `asked` is none of chat, qa, raw or a string with `{prompt}`, and ModelError when
    a chat template is demanded that the tokenizer does not have.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if asked == "auto":
        asking = next((file for file in files if file is not None and file.shape != "text"), None)
        if asking is None:
            return Template("raw", "format", "{prompt}", "plain text")
        if has_chat:
            return _chosen_chat("the model has a chat template", tokenizer, files, date)
        if _is_continuation(asking):
            return Template("raw", "format", "{prompt}", "prompts and completions join with their own space")
        return Template("qa", "format", QA_TEMPLATE, "the model has no chat template")
    if asked == "chat":
        if not has_chat:
            hint = "use --template qa, raw, or a text with {prompt} in it"
            raise ModelError("the model has no chat template", where="--template chat", hint=hint)
        return _chosen_chat("asked for", tokenizer, files, date)
    if asked in ("qa", "raw"):
        return Template(asked, "format", QA_TEMPLATE if asked == "qa" else "{prompt}", "asked for")
    if "{prompt}" in asked and any("\ud800" <= c <= "\udfff" for c in asked):
        raise ConfigError("the template is not UTF-8", where="--template", hint="type it in UTF-8")
    if "{prompt}" in asked:
        return Template("custom", "format", asked.replace("\\n", "\n"), "asked for")
    hint = "one of auto, chat, qa, raw, or a text with {prompt} in it"
    raise ConfigError(f"unknown template {asked[:40]!r}", where="--template", hint=hint)


def _is_continuation(dataset: Dataset) -> bool:
    if dataset.shape != "prompt-completion":
        return False
    return 2 * sum(map(_goes_on, dataset.records)) > len(dataset.records)


def _goes_on(record: Record) -> bool:
    """Return whether an answer goes on with its prompt: with a space, or where none is set inside a sentence."""
    prompt, answer = record.prompt, record.completion
    if prompt[-1:].isspace() or answer[:1].isspace():
        return True
    is_inside = prompt.endswith(_INSIDE) or (prompt[-1:].isalnum() and not _ASKS.search(prompt))
    is_joined = is_unspaced(prompt) and is_unspaced(answer) and not _OTHER_UNSPACED.search(prompt)
    return len(prompt) >= _MORE_THAN_ASKS and is_inside and is_joined


def _chosen_chat(why: str, tokenizer: Any, files: Sequence[Dataset | None], date: str) -> Template:
    template = Template("chat", "chat", "", why + _other_opening(tokenizer))
    if isinstance(tokenizer.chat_template, str) and _TODAY.search(tokenizer.chat_template):
        date = date or date_type.today().isoformat()
        template = replace(template, why=f"{template.why}; it tells the day, which is {date} in all rows", date=date)
    has_system = any(record.system for file in files if file is not None for record in file.records)
    if has_system and drops_system(template, tokenizer):
        return replace(template, why=f"{template.why}; it leaves system prompts out, those of rows too")
    return template


def drops_system(template: Template, tokenizer: Any) -> bool:
    """Return whether a template leaves system prompts out without a word."""
    row = Record((("system", _mark("SYSTEM")), ("user", _mark("PROMPT"))), _mark("ANSWER"), 0, {})
    try:
        return _mark("SYSTEM") not in render(row, template, tokenizer)[0]
    except ModelError:  # it refuses them
        return False


def _other_opening(tokenizer: Any) -> str:
    """Say where rows do not open their answer as the template does when it asks for one; empty where they do.

    Some templates put an empty thought before an answer that is there, and nothing, or an open thought, before one
    that is to come.
    """
    row = Record((("user", _mark(0)),), _mark(1), 0, {})
    try:
        # A space that a template ends with is the answer's (`open_prompt`): it makes no difference.
        applied = partial(_applied, tokenizer, "")
        trained = _chat(row, applied).before.rstrip(" ")
        if trained == applied(row.turns, add_generation_prompt=True).rstrip(" "):
            return ""
        if trained == applied(row.turns, add_generation_prompt=True, enable_thinking=False).rstrip(" "):
            return "; answers open as with enable_thinking=False, which is what to ask with"
    except ModelError as error:
        return f"; it cannot be asked for an answer: {error.message[:200]}"
    start = trained.rpartition(_mark(0))[2][-_SHOWN_CHARS:]
    return (
        f"; it opens an answer otherwise when it asks for one: rows are trained, and the model is asked, with {start!r}"
    )


# -- rendering -------------------------------------------------------------------------------------------


def render(record: Record, template: Template, tokenizer: Any) -> tuple[str, str]:
    """Return the text before the answer and the text after it.

    Raises ModelError when the chat template does not carry the answer verbatim.
    """
    row = rendered(record, template, tokenizer)
    return row.before, row.after


def rendered(record: Record, template: Template, tokenizer: Any) -> Rendered:
    """Return a row as text, and which of it is the row's own. Raises ModelError as `render` does."""
    if template.kind == "chat" and record.turns:
        return _chat(record, partial(_applied, tokenizer, template.date))
    parts: list[str | int] = []
    if record.turns:
        # Earlier turns have no published plain form: each stands on a line of its own before the question.
        last = len(record.turns) - 1
        parts = [part for i in range(last) for part in (i, "\n")]
        first, *rest = template.text.split("{prompt}")
        parts += [first, *(part for text in rest for part in (last, text))]
    contents = [content for _, content in record.turns]
    text, spans = _joined(parts, contents)
    answer = Span(len(text), len(text) + len(record.completion), len(contents))
    return Rendered(text, record.completion, "", (*spans, answer))


def _chat(record: Record, applied: Callable[..., str]) -> Rendered:
    """Render a conversation, and once more with marks in place of its texts: what is between them is the template's.

    An answer is not searched for: "d" is in "<|im_end|>" too.
    """
    contents = [content for _, content in record.turns] + [record.completion.strip()]
    roles = [role for role, _ in record.turns] + ["assistant"]
    marks = _marks(contents)

    def made(texts: Sequence[str]) -> str:
        return applied(list(zip(roles, texts, strict=True)))

    maker: Maker = made
    marked = maker(marks)
    if any(mark not in marked for mark in marks):
        maker = _behind_asked(made, roles, marks, applied)
        marked = maker(marks)
    full = maker(contents)
    parts = [marks.index(part) if part in marks else part for part in re.split(f"({'|'.join(marks)})", marked)]
    answer = len(contents) - 1
    if parts.count(answer) == 1:
        at, texts = parts.index(answer), _carried(parts, contents, full)
        before, spans = _joined(parts[:at], texts)
        after, _ = _joined(parts[at + 1 :], texts)
        if before + contents[-1] + after == full:
            end = Span(len(before), len(before) + len(contents[-1]), answer)
            return Rendered(before, contents[-1], after, (*spans, end))
    # A turn is changed by the template. Of the answer alone it is known what stands before it.
    marked = maker([*contents[:-1], marks[-1]])
    before, _, after = marked.partition(marks[-1])
    if before + contents[-1] + after != full:
        raise ModelError("the chat template does not carry the answer verbatim", where="chat template", hint=_ELSE)
    return Rendered(before, contents[-1], after, None)


def _behind_asked(made: Maker, roles: Sequence[str], marks: Sequence[str], applied: Callable[..., str]) -> Maker:
    """Return what puts an answer behind the text by which a template asks for one; `made` where that has no more turns.

    Some templates add a system prompt only where the user speaks last (Mistral v0.3): rows with an answer lack it.
    """

    def asked(texts: Sequence[str]) -> str:
        return applied(list(zip(roles[:-1], texts[:-1], strict=True)), add_generation_prompt=True)

    prompt, (question, answer) = asked(marks), marks[-2:]
    _, is_there, rest = made(marks).rpartition(question)
    opening, is_answered, closing = rest.partition(answer)
    begun = prompt.rpartition(question)[2]
    is_whole = all(mark in prompt and mark not in closing for mark in marks[:-1])
    if not (is_there and is_answered and is_whole and opening.startswith(begun)):
        return made

    def joined(texts: Sequence[str]) -> str:
        alone, end = made(texts), f"{opening}{texts[-1]}{closing}"
        # Where it changes the answer its own text is returned, in which the answer will not be found.
        return asked(texts) + end.removeprefix(begun) if alone.endswith(end) else alone

    return joined


def _applied(tokenizer: Any, date: str, turns: Sequence[tuple[str, str]], **how: Any) -> str:
    """Return what the chat template makes of turns on that day, or today, within limits. Raises ModelError."""
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        if date and isinstance(tokenizer.chat_template, str):
            day = date_type.fromisoformat(date)
            how["chat_template"] = _TODAY.sub(lambda found: repr(day.strftime(found[2])), tokenizer.chat_template)
        with bounded():
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **how))
    except Exception as error:  # noqa: BLE001 - jinja raises whatever the template's author wrote
        hint = "use --template qa or raw, or a file without such turns"
        raise ModelError(f"the chat template failed: {str(error)[:200]}", where="chat template", hint=hint) from None
    if len(text) > _MAX_GROWTH * (1 + sum(len(content) for _, content in turns)) + _MAX_FRAME_CHARS:
        raise ModelError(f"the chat template makes {len(text)} characters of a row", where="chat template", hint=_ELSE)
    return text


def _carried(parts: Sequence[str | int], contents: Sequence[str], full: str) -> list[str]:
    """Return contents as a text of such parts has them: templates strip all turns, or those of one role, or one end."""
    texts, at = list(contents), 0
    for own, turn, behind in zip(parts[::2], parts[1::2], parts[2::2], strict=False):
        at += len(str(own))
        content = contents[int(turn)]
        stripped = (content, content.strip(), content.rstrip(), content.lstrip())
        texts[int(turn)] = next((text for text in stripped if full.startswith(f"{text}{behind}", at)), content)
        at += len(texts[int(turn)])
    return texts


def _joined(parts: Sequence[str | int], contents: Sequence[str]) -> tuple[str, list[Span]]:
    """The text of parts, those that are numbers being turns, and where these are."""
    text, spans = "", []
    for part in parts:
        if isinstance(part, int):
            spans.append(Span(len(text), len(text) + len(contents[part]), part))
            text += contents[part]
        else:
            text += part
    return text, spans


def _mark(number: object) -> str:
    return _MARK.format(number)


def _marks(contents: Sequence[str]) -> list[str]:
    """Return as many marks, none of which is in the texts."""
    tail = ""
    while any(_mark(f"{i}{tail}") in content for i in range(len(contents)) for content in contents):
        tail += "X"
    return [_mark(f"{i}{tail}") for i in range(len(contents))]


def prompt_frame(template: Template, tokenizer: Any, system: str = "") -> tuple[str, str]:
    """Return the text a user's prompt stands between: what opens it and what closes it, up to the answer."""
    turns = ((("system", system),) if system else ()) + (("user", _mark("PROMPT")),)
    before, _ = render(Record(turns, _mark("ANSWER"), 0, {}), template, tokenizer)
    opening, _, closing = before.rpartition(_mark("PROMPT"))
    return opening, closing
