"""From a file a person has to records: formats, shapes, and every problem with its line."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.data.csvtable import csv_rows
from qunlearn.errors import DataError, OutputError

_MAX_ROW_CHARS = 10_000_000
_UNPACKED_BYTES, _MAX_RATIO = 64 << 20, 100
_SHOWN, _SHOWN_FIELDS = 8, 12
_PROMPTS = {"prompt": "prompt-completion", "question": "question-answer", "instruction": "instruction"}
_ANSWERS = {
    "prompt": ("completion", "response", "answer"),
    "question": ("answer", "response", "completion"),
    "instruction": ("output", "response"),
}
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
_SHAPES_HINT = (
    "a row has prompt + completion/response/answer, question + answer, instruction (+ input) + output, messages, "
    "or text; name other fields with --prompt-field and --completion-field"
)


@dataclass(frozen=True)
class Record:
    """One row. `turns` are (role, content) before the answer, empty for plain text; `line` is 1-based."""

    turns: tuple[tuple[str, str], ...]
    completion: str
    line: int
    meta: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        return next((content for role, content in reversed(self.turns) if role == "user"), "")

    @property
    def system(self) -> str:
        return self.turns[0][1] if self.turns and self.turns[0][0] == "system" else ""

    @property
    def key(self) -> str:
        """Equal for rows that say the same, white space and letter case aside."""
        parts = [content for _, content in self.turns] + [self.completion]
        return "\x1f".join(" ".join(part.casefold().split()) for part in parts)


def asking(prompt: str, system: str = "") -> tuple[tuple[str, str], ...]:
    """Return the turns of a question, behind a system prompt where there is one."""
    return (("system", system), ("user", prompt)) if system.strip() else (("user", prompt),)


@dataclass(frozen=True)
class FieldNames:
    """Fields named by the user, where the file has names of its own."""

    prompt: str | None = None
    completion: str | None = None


@dataclass(frozen=True)
class Dataset:
    """A file's records, without duplicates, and what was inferred about it."""

    path: str
    records: tuple[Record, ...]
    shape: str
    fields: tuple[str, ...]
    sha256: str
    duplicates: int


@dataclass(frozen=True)
class _Shape:
    """How a file's rows are read: its shape, and the fields of prompt and answer."""

    name: str
    prompt: str | None
    completion: str
    extra: tuple[str, ...] = ()  # further fields that become part of the prompt

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(field for field in (self.prompt, *self.extra, self.completion) if field)


def read_dataset(path: str | Path, fields: FieldNames = FieldNames(), *, role: str = "bad") -> Dataset:
    """Read JSONL, JSON or CSV, gzipped or not, in any of the known shapes.

    Raises DataError naming file and line of every problem (the first few in full); no text of a row is in it.
    """
    raw = _read_bytes(Path(path), role)
    text = _decode(raw, str(path))
    problems: list[str] = []
    rows = list(_rows(text, Path(path), problems))
    if not rows and not problems:
        raise DataError("no rows in the file", where=str(path), hint=f"{role} needs at least one row")
    records: list[Record] = []
    shape: _Shape | None = None
    for line, row in rows:
        try:
            shape = shape or _infer(row, fields)
            records.append(_record(row, line, shape))
        except ValueError as error:
            problems.append(f"{path}:{line}: {error}")
            if shape is None and len(problems) >= _SHOWN:
                break  # no row has told the shape: the rest would say the same
    if problems or shape is None:
        problems.sort(key=_line_of)
        listed = "\n  ".join(p.split(": ", 1)[1] if i == 0 else p for i, p in enumerate(problems[:_SHOWN]))
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(listed + more, where=problems[0].split(": ", 1)[0], hint=_SHAPES_HINT)
    unique = {record.key: record for record in reversed(records)}
    kept = tuple(sorted(unique.values(), key=lambda record: record.line))
    sha256 = hashlib.sha256(raw).hexdigest()
    return Dataset(str(path), kept, shape.name, shape.fields, sha256, len(records) - len(kept))


def check_overlap(one: Dataset, other: Dataset, message: str = "rows to forget are also in the normal data") -> None:
    """Raises DataError naming both lines of every row that is in both files."""
    lines = {record.key: record.line for record in one.records}
    both = [(lines[r.key], r.line) for r in other.records if r.key in lines]
    if both:
        listed = "\n  ".join(f"{one.path}:{a} and {other.path}:{b}" for a, b in both[:_SHOWN])
        more = f"\n  and {len(both) - _SHOWN} more" if len(both) > _SHOWN else ""
        raise DataError(
            f"{message}:\n  {listed}{more}",
            where=f"{other.path}:{both[0][1]}",
            hint="remove each from one of the two files",
        )


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows for their owner's eyes only (0600), whole or not at all. Raises OutputError."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=str(path)) from error


# -- bytes and formats -----------------------------------------------------------------------------------


def _read_bytes(path: Path, role: str) -> bytes:
    where = str(path)
    try:
        if stat.S_ISCHR(path.stat().st_mode) or stat.S_ISBLK(path.stat().st_mode):
            raise DataError("is a device, not a file", where=where, hint="give a file")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError("no such file", where=where, hint=f"check the path given to {role}") from None
    except IsADirectoryError:
        raise DataError("is a folder, not a file", where=where, hint="give one file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=where) from None
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = _unpacked(raw, where)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"damaged gzip: {error}", where=where, hint="pack the file again") from None
    if not raw.strip():
        raise DataError("the file is empty", where=where, hint=f"{role} needs at least one row")
    return raw


def _unpacked(raw: bytes, where: str) -> bytes:
    """A gzip's content, unless it is a bomb: texts are packed to a tenth, hardly ever to a hundredth."""
    most = max(_UNPACKED_BYTES, _MAX_RATIO * len(raw))
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
        content = file.read(most + 1)
    if len(content) > most:
        hint = "unpack it yourself, if you trust it"
        raise DataError(f"unpacks to more than {most >> 20} MiB, from {len(raw)} bytes", where=where, hint=hint)
    return content


def _decode(raw: bytes, path: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        hint = "save the file as UTF-8"
        raise DataError(f"not UTF-8 (byte {raw[error.start]:#04x})", where=f"{path}:{line}", hint=hint) from None


def _rows(text: str, path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of each row; what is no row goes into `problems`."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    ending = suffixes[-1] if suffixes else ""
    start = text.lstrip()[:1]
    if ending == ".csv" or (ending not in (".json", ".jsonl", ".ndjson") and start not in ("{", "[")):
        yield from _csv_rows(text, path, problems)
    elif ending == ".json" or (start == "[" and ending not in (".jsonl", ".ndjson")):
        yield from _json_rows(text, path, problems)
    else:
        yield from _jsonl_rows(text, path, problems)


def _jsonl_rows(text: str, path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    # Only line feeds end a line: U+2028 and others may stand inside a JSON text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if len(line) > _MAX_ROW_CHARS:
            problems.append(f"{path}:{number}: a row of {len(line)} characters is too long")
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not JSON: {error.msg}, column {error.colno}")
        except (RecursionError, ValueError):
            problems.append(f"{path}:{number}: not JSON that can be read: nested too deeply, or a number too long")
        else:
            if isinstance(value, dict):
                yield number, value
            else:
                problems.append(f"{path}:{number}: not an object but {_kind(value)}")


def _json_rows(text: str, path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # one object per line under the name .json
            yield from _jsonl_rows(text, path, problems)
            return
        problems.append(f"{path}:{error.lineno}: not JSON: {error.msg}, column {error.colno}")
        return
    except (RecursionError, ValueError):
        problems.append(f"{path}:1: not JSON that can be read: nested too deeply, or a number too long")
        return
    if isinstance(value, dict):
        lists = [value[name] for name in ("data", "rows", "examples", "train") if isinstance(value.get(name), list)]
        value = lists[0] if lists else [value]
    if not isinstance(value, list):
        problems.append(f"{path}:1: not a list of objects but {_kind(value)}")
        return
    for number, row in enumerate(value, 1):
        if isinstance(row, dict):
            yield number, row
        else:
            problems.append(f"{path}:{number}: row {number} is not an object but {_kind(row)}")


def _csv_rows(text: str, path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    def complain(line: int, why: str) -> None:
        problems.append(f"{path}:{line}: {why}")

    try:
        yield from csv_rows(io.StringIO(text, newline=""), path, _MAX_ROW_CHARS, complain)
    except DataError as error:
        problems.append(str(error))


# -- shapes ----------------------------------------------------------------------------------------------


def _infer(row: Mapping[str, Any], named: FieldNames) -> _Shape:
    """The shape a row has. Raises ValueError when it is none of the known ones."""
    system = ("system",) if isinstance(row.get("system"), str) else ()
    if named.completion:
        if named.prompt is None:
            return _Shape("text", None, named.completion)
        return _Shape("prompt-completion", named.prompt, named.completion, system)
    for prompt in [named.prompt] if named.prompt else [p for p in _PROMPTS if p in row]:
        answers = _ANSWERS.get(prompt, _ANSWERS["prompt"])
        answer = next((a for a in answers if a in row), None)
        if answer:
            extra = ("input",) if prompt == "instruction" and "input" in row else ()
            return _Shape(_PROMPTS.get(prompt, "prompt-completion"), prompt, answer, (*system, *extra))
    for field in ("messages", "conversations"):
        if field in row and not named.prompt:
            return _Shape("messages", None, field)
    if "text" in row and not named.prompt:
        return _Shape("text", None, "text")
    raise ValueError(f"no known shape; its fields are {_names(row)}")


def _record(row: Mapping[str, Any], line: int, shape: _Shape) -> Record:
    if shape.name == "messages":
        turns, completion = _dialogue(row, shape.completion)
    else:
        completion = _text(row, shape.completion)
        turns = _turns(row, shape) if shape.prompt else ()
    if not completion.strip():
        raise ValueError(f"{shape.completion!r} is empty: there is nothing to forget or keep")
    meta = {name: value for name, value in row.items() if name not in shape.fields}
    return Record(turns, completion, line, meta)


def _turns(row: Mapping[str, Any], shape: _Shape) -> tuple[tuple[str, str], ...]:
    prompt = _text(row, shape.prompt or "")
    if "input" in shape.extra and row.get("input"):
        prompt = f"{prompt}\n\n{_text(row, 'input')}"
    if not prompt.strip():
        raise ValueError(f"{shape.prompt!r} is empty")
    return asking(prompt, _text(row, "system") if "system" in shape.extra and row.get("system") else "")


def _dialogue(row: Mapping[str, Any], field: str) -> tuple[tuple[tuple[str, str], ...], str]:
    listed = row.get(field)
    if not isinstance(listed, list) or not all(isinstance(turn, dict) for turn in listed):
        raise ValueError(f"{field!r} is not a list of objects")
    turns = []
    for turn in listed:
        who, key = turn.get("role", turn.get("from")), "content" if "content" in turn else "value"
        if not isinstance(who, str):
            raise ValueError(f"a turn of {field!r} has no role")
        turns.append((_ROLES.get(who, who), _text(turn, key)))
    if len(turns) < 2 or turns[-1][0] != "assistant":
        raise ValueError(f"{field!r} does not end with an answer of the assistant to something")
    return tuple(turns[:-1]), turns[-1][1]


def is_clean(text: str) -> bool:
    """Whether a text can be tokenised and written: no NUL, no half of a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def _text(row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise ValueError(f"no field {field!r}; its fields are {_names(row)}")
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{field!r} is not a text but {_kind(value)}")
    if not is_clean(value):
        raise ValueError(f"{field!r} has a NUL or half of a surrogate pair in it")
    return value


def _name(field: object) -> str:
    return repr(str(field)[:30])


def _names(row: Mapping[str, Any]) -> str:
    names = [_name(field) for field in list(row)[:_SHOWN_FIELDS]]
    more = [f"{len(row) - _SHOWN_FIELDS} more"] if len(row) > _SHOWN_FIELDS else []
    return ", ".join([*names, *more]) or "none"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _line_of(problem: str) -> int:
    return int(problem.split(": ", 1)[0].rsplit(":", 1)[1])
