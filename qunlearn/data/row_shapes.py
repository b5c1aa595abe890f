"""Recognise the shapes of rows: which fields are the prompt and which the completion."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qunlearn.data.multiple_choice import chosen
from qunlearn.utils.text import is_clean

Row = Mapping[str, Any]
Turns = tuple[tuple[str, str], ...]

_SHOWN_FIELDS = 12
_CHOSEN, _REJECTED = "chosen", "rejected"
_KEPT = ("normal", "holdout", "instead", "against", "retain", "general")  # whose rows are what should stay
_DIALOGUES = ("messages", "conversations", "conversation", "dialogue", "dialog")
# Fields that ask, and for each those that answer it, the first that is there.
_ANSWERS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("completion", "response", "answer", "output", "target"),
    "question": ("answer", "response", "completion", "output"),
    "instruction": ("output", "response", "completion", "answer"),
    "query": ("response", "answer", "completion", "output"),
    "goal": ("target",),
    "input": ("output", "response", "completion", "answer", "target"),
}
_NAMES = {
    "prompt": "prompt-completion",
    "question": "question-answer",
    "instruction": "instruction",
    "query": "query-response",
    "goal": "goal-target",
    "input": "input-output",
}
_KNOWN_ROLES = ("user", "assistant", "system", "developer", "tool", "function", "ipython")
_ROLES = {role: role for role in _KNOWN_ROLES} | {
    "human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant",
}  # fmt: skip
# Fields that tell a published format which has to be imported, for it is more than a prompt and an answer.
_IMPORTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("right_answer", "hallucinated_answer"), "halueval"),
    (("right_response", "hallucinated_response"), "halueval"),
    (("right_summary", "hallucinated_summary"), "halueval"),
    (("chatgpt_response", "hallucination"), "halueval"),
    (("question", "best_answer"), "truthfulqa"),
    (("question", "best answer"), "truthfulqa"),
    (("response_0", "response_1"), "saferlhf"),
    (("prompt", "gt"), "muse"),
)
SHAPES_HINT = (
    "a row has prompt + completion/response/answer, question + answer, instruction (+ input) + output, input + output, "
    "query + response, goal + target, prompt + chosen + rejected, question + choices + answer, messages, or text; name "
    "other fields with --prompt-field and --completion-field"
)


@dataclass(frozen=True)
class FieldNames:
    """Fields named by the user, where files have names of their own: several with commas, the first that is there.

    `turns`: which answers of a dialogue are rows: the last, or all.
    """

    prompt: str | None = None
    completion: str | None = None
    turns: str = "last"


@dataclass(frozen=True)
class Shape:
    """How a file's rows are read: its shape, and the fields of prompt and answer."""

    name: str
    prompt: str | None
    completion: str
    extra: tuple[str, ...] = ()  # further fields that become part of the prompt

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(field for field in (self.prompt, *self.extra, self.completion) if field)


@dataclass(frozen=True)
class Said:
    """What a row says: the turns before an answer, and it. `earlier`: answers before it that are context only."""

    turns: Turns
    completion: str
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    earlier: int = 0


def asking(prompt: str, system: str = "") -> Turns:
    """Return the turns of a question, behind a system prompt where there is one."""
    return (("system", system), ("user", prompt)) if system.strip() else (("user", prompt),)


# -- which shape -----------------------------------------------------------------------------------------


def shape_of(rows: Iterable[Row], named: FieldNames, role: str) -> Shape:
    """Return the shape that most of a file's rows have. Raises ValueError with why the first has none, if none has."""
    votes: Counter[tuple[str, str | None, str]] = Counter()
    extra: dict[str, None] = {}
    why: ValueError | None = None
    for row in rows:
        try:
            shape = _infer(row, named, keep=role.lstrip("-") in _KEPT)
        except ValueError as error:
            why = why or error
            continue
        votes[shape.name, shape.prompt, shape.completion] += 1
        extra |= dict.fromkeys(shape.extra)
    if not votes:
        raise why or ValueError("no rows")
    name, prompt, completion = votes.most_common(1)[0][0]
    return Shape(name, prompt, completion, tuple(extra))


def _infer(row: Row, named: FieldNames, *, keep: bool) -> Shape:
    """The shape a row has. Raises ValueError when it is none of the known ones."""
    there = _by_plain_name(row)
    asked = _named(row, named.prompt) if named.prompt else _first(there, _ANSWERS)
    system = tuple(name for name in (_first(there, ("system",)),) if name is not None and isinstance(row[name], str))
    if named.completion:
        answer = _named(row, named.completion)
        if named.prompt is None and (asked is None or asked == answer):
            return Shape("text", None, answer)
        return Shape("prompt-completion", asked, answer, system)
    if "choices" in there and "question" in there and (key := _first(there, ("answer", "answerkey", "label"))):
        return Shape("choices", there["question"], key, (there["choices"],))
    for prompt in [named.prompt] if named.prompt else [p for p in _ANSWERS if p in there]:
        answers = _ANSWERS.get(prompt, _ANSWERS["prompt"])
        if said := _first(there, answers):
            more = [there[name] for name in ("input", "context") if prompt == "instruction" and name in there]
            own = _named(row, prompt) if named.prompt else there[prompt]
            return Shape(_NAMES.get(prompt, "prompt-completion"), own, said, (*system, *more))
    if _CHOSEN in there and _REJECTED in there:
        return Shape("preference", asked, there[_CHOSEN if keep else _REJECTED], system)
    if not named.prompt and (dialogue := _first(there, _DIALOGUES)):
        return Shape("messages", None, dialogue, system)
    if not named.prompt and "text" in there:
        return Shape("text", None, there["text"])
    for fields, name in _IMPORTS:
        if all(f in there for f in fields):
            how = f"`qunlearn data import {name} FILE -o bad.jsonl`"
            raise ValueError(f"rows of {name}, which have to be imported: {how}; their fields are {_names(row)}")
    raise ValueError(f"no known shape; its fields are {_names(row)}")


def _by_plain_name(row: Row) -> dict[str, str]:
    """Fields by their name in small letters: spreadsheets have `Prompt`."""
    found: dict[str, str] = {}
    for name in row:
        if isinstance(name, str):
            plain = name.strip().lower()
            found[plain] = name if name == plain else found.get(plain, name)
    return found


def _first(there: Mapping[str, str], names: Iterable[str]) -> str | None:
    return next((there[name] for name in names if name in there), None)


def _named(row: Row, names: str) -> str:
    """The field that a user names, or the first of several that the row has."""
    if names in row:
        return names
    return next((name for part in names.split(",") if (name := part.strip()) in row), names)


# -- what a row says -------------------------------------------------------------------------------------


def read_row(row: Row, shape: Shape, turns: str = "last") -> list[Said]:
    """Return what a row says: one answer, or every one of a dialogue. Raises ValueError."""
    if shape.name == "messages":
        said = _answers(_behind(row, shape, _dialogue(row, shape.completion)), shape.completion, turns)
    elif shape.name == "choices":
        said = [_chosen(row, shape)]
    elif shape.name == "text":
        said = [Said((), text(row, shape.completion))]
    else:
        said = [_pair(row, shape)]
    for one in said:
        if not one.completion.strip():
            raise ValueError(f"{shape.completion!r} is empty: there is nothing to forget or keep")
    meta = {name: value for name, value in row.items() if name not in shape.fields}
    return [replace(one, meta={**meta, **one.meta}) for one in said]


def _pair(row: Row, shape: Shape) -> Said:
    before, answer = _ended(row, shape.completion)
    if any(role == "user" for role, _ in before):  # the whole conversation
        return Said(_behind(row, shape, before), answer)
    if shape.prompt is None:
        raise ValueError(f"{shape.completion!r} has no question in it, and no other field has one")
    return Said((*_question(row, shape), *before), answer)


def _question(row: Row, shape: Shape) -> Turns:
    """The turns of a prompt, which may be a list of messages."""
    field = shape.prompt or ""
    if _is_dialogue(row.get(field)):
        return _behind(row, shape, _dialogue(row, field))
    prompt = text(row, field)
    for name in shape.extra:
        if name.lower() in ("input", "context") and row.get(name):
            prompt = f"{prompt}\n\n{text(row, name)}"
    if not prompt.strip():
        raise ValueError(f"{field!r} is empty")
    return _behind(row, shape, (("user", prompt),))


def _behind(row: Row, shape: Shape, turns: Turns) -> Turns:
    """Turns behind the row's own field `system`, which the first row need not have; one among the turns goes first."""
    name = next((name for name in shape.extra if name.strip().lower() == "system" and row.get(name)), None)
    if name is None and isinstance(row.get("system"), str):
        name = "system"
    system = text(row, name) if name is not None else ""
    return turns if not system.strip() or turns[0][0] == "system" else (("system", system), *turns)


def _ended(row: Row, field: str) -> tuple[Turns, str]:
    """The turns before an answer that are in its own field, and the answer."""
    if not _is_dialogue(row.get(field)):
        return (), text(row, field)
    turns = _dialogue(row, field)
    if turns[-1][0] != "assistant":
        raise ValueError(f"{field!r} does not end with an answer of the assistant")
    return turns[:-1], turns[-1][1]


def _is_dialogue(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, dict) and ("role" in v or "from" in v) for v in value)
    )


def _dialogue(row: Row, field: str) -> Turns:
    listed = row.get(field)
    if not isinstance(listed, list) or not listed or not all(isinstance(turn, dict) for turn in listed):
        raise ValueError(f"{field!r} is not a list of objects")
    turns = []
    for turn in map(dict, listed):
        who, key = turn.get("role", turn.get("from")), "content" if "content" in turn else "value"
        if not isinstance(who, str):
            raise ValueError(f"a turn of {field!r} has no role")
        if who.lower() not in _ROLES:
            raise ValueError(f"a turn of {field!r} has a role that is none of {', '.join(_KNOWN_ROLES)}")
        turns.append((_ROLES[who.lower()], text(turn, key)))
    return tuple(turns)


def _answers(turns: Turns, field: str, wanted: str) -> list[Said]:
    """The last answer of a dialogue, or all of them, each with what is before it."""
    if len(turns) < 2 or turns[-1][0] != "assistant":
        raise ValueError(f"{field!r} does not end with an answer of the assistant to something")
    places = [i for i, (role, _) in enumerate(turns) if role == "assistant" and any(r == "user" for r, _ in turns[:i])]
    places = places or [len(turns) - 1]
    if wanted == "all":
        return [Said(turns[:i], turns[i][1]) for i in places]
    return [Said(turns[: places[-1]], turns[-1][1], earlier=len(places) - 1)]


def _chosen(row: Row, shape: Shape) -> Said:
    """A question of several choices: the right one's text, and the others as answers that are wrong."""
    question = text(row, shape.prompt or "")
    if not question.strip():
        raise ValueError(f"{shape.prompt!r} is empty")
    right, others = chosen(row.get(shape.extra[0]), row.get(shape.completion))
    return Said(asking(question), right, {"perturbed": others})


def text(row: Row, field: str) -> str:
    """Return the text of a field, which may be a list of parts that are texts. Raises ValueError."""
    if field not in row:
        raise ValueError(f"no field {field!r}; its fields are {_names(row)}")
    value = row[field]
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        kinds = {str(part.get("type", "?")) for part in value if not isinstance(part.get("text"), str)}
        if kinds:
            raise ValueError(f"{field!r} has a part that is no text but {_name(min(kinds))}")
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{field!r} is not a text but {kind(value)}")
    if not is_clean(value):
        raise ValueError(f"{field!r} has a NUL or half of a surrogate pair in it")
    return value


def _name(field: object) -> str:
    return repr(str(field)[:30])


def _names(row: Row) -> str:
    names = [_name(field) for field in list(row)[:_SHOWN_FIELDS]]
    more = [f"{len(row) - _SHOWN_FIELDS} more"] if len(row) > _SHOWN_FIELDS else []
    return ", ".join([*names, *more]) or "none"


def kind(value: object) -> str:
    """Return what a value of JSON is called, or by its type one that only other files can hold."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    named = names.get(type(value))
    return named or ("a number" if isinstance(value, int | float) else type(value).__name__)
