"""Find the rows inside one JSON document: its columns, a list of them, or objects printed one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qunlearn.data.row_shapes import kind

Complain = Callable[[int, str], None]
UNREADABLE = "not JSON that can be read: nested too deeply, or a number too long"
# Fields of a row: an object that has one of them is a row, or holds its columns.
ROW_FIELDS = {"prompt", "question", "instruction", "input", "query", "text", "messages", "conversations", "completion"}
ROW_FIELDS |= {"chosen", "answer", "output", "response"}
_LISTS = ("data", "rows", "examples", "train")  # of a list of rows inside an object, the usual names first


def document_rows(text: str, complain: Complain) -> Iterator[tuple[int, Mapping[str, Any]]] | None:
    """Return (number, row) of each row of a document; None where it is no JSON document and may be lines of JSON.

    The number is the row's place in its list, or the line where it begins if the document is several objects. What
    is no row goes to `complain(number, why)`.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several objects, a line each or printed for people
            values = _sequence(text)
            return None if values is None else only_objects(values, complain)
        complain(error.lineno, f"not JSON: {error.msg}, column {error.colno}")
        return iter(())
    except (RecursionError, ValueError):
        complain(1, UNREADABLE)
        return iter(())
    if not isinstance(value, dict):
        complain(1, f"neither a JSON object nor a list of them but {kind(value)}")
        return iter(())
    return only_objects(list(enumerate(_inside(value, complain), 1)), complain)


def only_objects(values: list[tuple[int, Any]], complain: Complain) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the values that are objects; the others go to `complain`."""
    for number, value in values:
        try:
            yield number, as_row(value)
        except ValueError as error:
            complain(number, str(error))


def as_row(value: Any) -> Mapping[str, Any]:
    """Return a row, out of what the data sets' server wraps it in. Raises ValueError for what is none."""
    if not isinstance(value, dict):
        raise ValueError(f"not an object but {kind(value)}")
    if not (isinstance(value.get("row"), dict) and "row_idx" in value):
        return value
    if value.get("truncated_cells"):
        raise ValueError("the server has cut cells of this row: download the file itself")
    return dict(value["row"])


def _sequence(text: str) -> list[tuple[int, Any]] | None:
    """Return (line, value) of JSON values one after the other, over several lines or not; None where one is broken."""
    values: list[tuple[int, Any]] = []
    decoder, at, line, counted = json.JSONDecoder(), 0, 1, 0
    while True:
        while at < len(text) and text[at].isspace():
            at += 1
        if at >= len(text):
            return values
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (RecursionError, ValueError):
            return None
        values.append((line, value))


def _inside(value: dict[str, Any], complain: Complain) -> list[Any]:
    """Return the rows that one object holds: itself, its columns, or a list of them."""
    plain = {str(name).strip().lower() for name in value}
    if ROW_FIELDS & plain:
        return _columns(value, complain)
    lists = [name for name, rows in value.items() if isinstance(rows, list) and all(isinstance(r, dict) for r in rows)]
    if "rows" in lists and "features" in lists:  # as the data sets' server answers
        lists = ["rows"]
    if len(lists) > 1:
        named = ", ".join(repr(str(name)[:30]) for name in lists[:8])
        complain(1, f"holds several lists of rows: {named}; give a file with one of them")
        return []
    if lists:
        return list(value[lists[0]])
    usual = [value[name] for name in _LISTS if isinstance(value.get(name), list)]
    return usual[0] if usual else [value]


def _columns(value: dict[str, Any], complain: Complain) -> list[Any]:
    """Return the rows of an object of columns, each a list, or an object by row number; a row is itself."""
    columns = {name: list(c.values()) if isinstance(c, dict) else c for name, c in value.items()}
    plain = all(isinstance(c, list) and not any(isinstance(v, dict) for v in c) for c in columns.values())
    if not plain:
        return [value]
    if len({len(c) for c in columns.values()}) > 1:
        complain(1, f"holds columns of different lengths: {sorted({len(c) for c in columns.values()})}")
        return []
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
