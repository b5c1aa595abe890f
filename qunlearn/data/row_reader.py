"""Read the rows of a file of any size in constant memory: JSONL, a JSON array, CSV or Parquet, packed or not."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qunlearn.data.csv_rows import csv_rows, looks_tabular, reads_as_prose
from qunlearn.data.file_types import (
    HEAD_BYTES,
    PACKED_ENDINGS,
    check_holds_rows,
    damage,
    damaged,
    is_parquet,
    packing,
    parquet_rows,
    unpacking,
)
from qunlearn.data.row_objects import UNREADABLE, Complain, as_row, document_rows
from qunlearn.data.row_shapes import kind
from qunlearn.errors import DataError

MAX_ROW_BYTES = 10_000_000
_CHUNK_BYTES = 1 << 16
_WHOLE_BYTES = 64 << 20  # of a file that is read whole, for its rows are inside one object
_HOLDS_ROWS = re.compile(rb'\{\s*"(data|rows|examples|train|features)"\s*:\s*\[')
_SPACE = " \t\r\n"
_TABLES, _PROSE = (".csv", ".tsv"), (".txt", ".md")
_LINES = (".jsonl", ".ndjson")
_JSON = re.compile(rb'\s*(?:\[\s*[\[{"\]]|\{\s*["}])')  # not so a text that begins with "[Illustration]"
_TEXT_HINT = "`qunlearn data import text FILE -o bad.jsonl` cuts a text into rows; a file of rows is JSONL or CSV"
Row = Mapping[str, Any]


class Problems:
    """What is wrong with a file, with its lines; reading ends when there is too much of it."""

    def __init__(self, path: Path, most: int = 8) -> None:
        self.path, self.most = path, most
        self.found: list[tuple[int, str]] = []

    def add(self, line: int, text: str) -> None:
        """Raises DataError at the last problem that is listed: nobody reads a million of them."""
        self.found.append((line, text))
        if len(self.found) >= self.most:
            self.raise_if_any(stopped=True)

    def raise_if_any(self, *, stopped: bool = False) -> None:
        """Raises DataError naming the line of each problem."""
        if not self.found:
            return
        (first, text), *rest = self.found
        listed = "".join(f"\n  {self.path}:{line}: {other}" for line, other in rest)
        end = "\n  and there reading was given up" if stopped else ""
        hint = "is it this format? --skip-broken leaves such rows out and counts them"
        raise DataError(f"{text}{listed}{end}", where=f"{self.path}:{first}", hint=hint)


def read_rows(path: Path, complain: Complain) -> Iterator[tuple[int, Row | str]]:
    """Yield (line, row) of each row; a bare text in a JSON array is a row too. What is no row goes to `complain`.

    The line is 1-based, of the row's beginning. Raises DataError for a file that cannot be read.
    """
    with _opened(path) as file:
        head = file.read(_CHUNK_BYTES)
    check_holds_rows(head.removeprefix(codecs.BOM_UTF8), str(path))
    if not head.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError("the file is empty", where=str(path))
    with _opened(path) as file:
        yield from rows_in(file, head, path, complain, _WHOLE_BYTES)


def rows_in(file: IO[bytes], head: bytes, path: Path, complain: Complain, most: int) -> Iterator[tuple[int, Row | str]]:
    """Yield what `read_rows` does of an opened file that begins with `head`; the path's ending helps to tell its type.

    Constant memory but for a document, an object that holds rows or goes over several lines: that has at most `most`
    bytes. Rows of one list on one line are numbered instead. Raises DataError.
    """
    ending, head = _ending(path), head.removeprefix(codecs.BOM_UTF8)
    if is_parquet(head):
        return parquet_rows(file, str(path))
    table = is_table(head, path)
    is_prose = ending in _PROSE and not (looks_tabular(head) if table else _JSON.match(head))
    if is_prose or (table and ending not in (*_TABLES, *_PROSE) and reads_as_prose(head)):
        raise DataError("is a plain text, not rows", where=str(path), hint=_TEXT_HINT)
    if table:
        return _table(file, path, complain)
    if head.lstrip()[:1] == b"[" and not (ending in _LINES and _has_lists_on_lines(head)):
        return _array(file, path, complain)
    if _is_document(head, ending):
        return _document(file, path, complain, most)
    return _lines(file, path, complain)


# -- which type a file is of -----------------------------------------------------------------------------


def is_table(head: bytes, path: Path) -> bool:
    """Return whether a file is read as CSV: by its ending, else where it does not begin as JSON does."""
    ending, start = _ending(path), head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    return ending in _TABLES or (ending not in (".json", *_LINES) and start not in (b"{", b"["))


def _ending(path: Path) -> str:
    endings = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in PACKED_ENDINGS]
    return endings[-1] if endings else ""


def _has_lists_on_lines(head: bytes) -> bool:
    """Return whether each line is a list, which is no row, and not the file one list of rows."""
    first, _, rest = head.lstrip().partition(b"\n")
    try:
        value = json.loads(first)
    except (RecursionError, ValueError):
        return False
    return isinstance(value, list) and bool(rest.strip() or not all(isinstance(row, (dict, str)) for row in value))


def _is_document(head: bytes, ending: str) -> bool:
    """Return whether a file is to be read whole, for its first line is no row or may hold all of them."""
    line, _, rest = head.lstrip().partition(b"\n")
    if not line.startswith(b"{"):
        return ending == ".json"
    if not rest and len(head) == _CHUNK_BYTES:  # the line goes on
        return ending == ".json" or _HOLDS_ROWS.match(line) is not None
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        in_pieces = error.pos >= len(line.decode("utf-8", "replace").rstrip()) or line.strip() == b"{"
        return in_pieces or (ending == ".json" and error.msg == "Extra data")
    except (RecursionError, ValueError):
        return False
    return ending not in _LINES and not rest.strip()


def read_text(path: Path) -> Iterator[str]:
    """Yield the lines of a text file; one without line ends comes in pieces. Raises DataError."""
    with _opened(path) as file:
        for number, raw in _bounded_lines(file, _CHUNK_BYTES):
            # A piece may end inside a character, which then begins the next one.
            yield _decode(raw, path, number)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    where, packed = str(path), ""
    try:
        with path.open("rb") as plain:
            if not plain.seekable():
                raise DataError("is a pipe, which is read but once", where=where, hint="save it in a file first")
            head = plain.read(HEAD_BYTES)
            plain.seek(0)
            packed = packing(head) or packed
            check_holds_rows(head, where)
            if packing(head):
                with unpacking(plain, head, where) as unpacked:
                    yield unpacked
            else:
                yield plain
    except FileNotFoundError:
        raise DataError("no such file", where=where, hint="check the path; hub:OWNER/NAME is a data set") from None
    except IsADirectoryError:
        raise DataError("is a folder, not a file", where=where, hint="give one file") from None
    except damaged() as error:
        # Unpackers raise an OSError without a number for what is damaged.
        if packed and getattr(error, "errno", None) is None:
            raise damage(packed, error, where) from None
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=where) from None


def _bounded_lines(file: IO[bytes], most: int) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) with at most `most` bytes at a time; only a line feed ends a line."""
    number, rest = 1, b""
    while piece := file.readline(most):
        piece, rest = rest + piece, b""
        if not piece.endswith(b"\n"):
            cut = _whole_characters(piece)
            piece, rest = piece[:cut], piece[cut:]
        yield number, piece
        number += piece.endswith(b"\n")
    if rest:
        yield number, rest


def _whole_characters(piece: bytes) -> int:
    """Return where to cut so that no UTF-8 character is cut in two."""
    for back in range(1, min(4, len(piece)) + 1):
        byte = piece[-back]
        if byte & 0b1100_0000 != 0b1000_0000:  # the first byte of a character
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(piece) - back if length > back else len(piece)
    return len(piece)


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        raise _not_utf8(raw[error.start], path, line) from None


def _not_utf8(byte: int, path: Path, line: int) -> DataError:
    return DataError(f"not UTF-8 (byte {byte:#04x})", where=f"{path}:{line}", hint="save the file as UTF-8")


# -- one object a line -----------------------------------------------------------------------------------


def _lines(file: IO[bytes], path: Path, complain: Complain) -> Iterator[tuple[int, Row | str]]:
    too_long = 0
    for number, raw in _bounded_lines(file, MAX_ROW_BYTES):
        if number == too_long:  # the rest of a line that was given up
            continue
        if not raw.endswith(b"\n") and len(raw) >= MAX_ROW_BYTES - 4:
            too_long = number
            complain(number, f"a row of more than {MAX_ROW_BYTES} bytes")
            continue
        text = _decode(raw, path, number).removesuffix("\n")  # which is not part of a column
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            complain(number, f"not JSON: {error.msg}, column {error.colno}")
        except (RecursionError, ValueError):
            complain(number, UNREADABLE)
        else:
            if isinstance(value, dict):
                yield number, value
            else:
                complain(number, f"not an object but {kind(value)}")


# -- one JSON document -----------------------------------------------------------------------------------


def _document(file: IO[bytes], path: Path, complain: Complain, most: int) -> Iterator[tuple[int, Row | str]]:
    raw = file.read(most + 1)
    if len(raw) > most:
        hint = "JSONL, one object a line, is read at any size"
        raise DataError(f"one JSON document of more than {most >> 20} MiB", where=str(path), hint=hint)
    rows = document_rows(_decode(raw, path, 1), complain)
    yield from _lines(io.BytesIO(raw), path, complain) if rows is None else rows


# -- a JSON array ----------------------------------------------------------------------------------------


class _Window:
    """The part of a text that is being looked at. `line` is that of its first character."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.line, self.ended = "", 1, False

    def grow(self) -> bool:
        """Read as much again as is held, so that a long row costs twice its length and no more."""
        if self.ended:
            return False
        raw = self._file.read(max(_CHUNK_BYTES, len(self.text)))
        self.ended = not raw
        try:
            self.text += self._decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + raw.count(b"\n", 0, error.start)
            raise _not_utf8(error.object[error.start], self._path, line) from None
        return True

    def drop(self, end: int) -> None:
        self.line += self.text.count("\n", 0, end)
        self.text = self.text[end:]

    def next_mark(self) -> str:
        """The next character that is no white space, which stays; empty at the end."""
        while True:
            rest = self.text.lstrip(_SPACE)
            self.drop(len(self.text) - len(rest))
            if rest or not self.grow():
                return rest[:1]


def _array(file: IO[bytes], path: Path, complain: Complain) -> Iterator[tuple[int, Row | str]]:
    """The elements of an array, each decoded when it is there whole."""
    window, decoder = _Window(file, path), json.JSONDecoder()
    window.next_mark()
    window.drop(1)  # the opening bracket
    mark, count = window.next_mark(), 0
    while mark != "]":
        value, end = _element(window, decoder, path)
        count += 1
        number = window.line if window.line > 1 else count
        window.drop(end)
        try:
            yield number, value if isinstance(value, str) else as_row(value)
        except ValueError as error:
            complain(number, f"row {count} is {error}")
        mark = window.next_mark()
        if mark == ",":
            window.drop(1)
            mark = window.next_mark()
        elif mark != "]":
            where = f"{path}:{window.line}"
            raise DataError("the file ends inside its list" if not mark else "not JSON: no comma here", where=where)
    window.drop(1)
    if window.next_mark():
        raise DataError("there is something after the list", where=f"{path}:{window.line}")


def _element(window: _Window, decoder: json.JSONDecoder, path: Path) -> tuple[Any, int]:
    while True:
        try:
            return decoder.raw_decode(window.text)
        except json.JSONDecodeError as error:
            # Half a row is not JSON either: only when no more can be had is it known to be wrong.
            if len(window.text) <= MAX_ROW_BYTES and window.grow():
                continue
            line = window.line + error.lineno - 1
            raise DataError(f"not JSON: {error.msg}, column {error.colno}", where=f"{path}:{line}") from None
        except (RecursionError, ValueError):
            raise DataError(UNREADABLE, where=f"{path}:{window.line}") from None


# -- CSV -------------------------------------------------------------------------------------------------


def _table(file: IO[bytes], path: Path, complain: Complain) -> Iterator[tuple[int, Row]]:
    def lines() -> Iterator[str]:
        for number, raw in _bounded_lines(file, MAX_ROW_BYTES):
            if not raw.endswith(b"\n") and len(raw) >= MAX_ROW_BYTES - 4:
                raise DataError(f"a line of more than {MAX_ROW_BYTES} bytes", where=f"{path}:{number}")
            yield _decode(raw, path, number)

    yield from csv_rows(lines(), path, MAX_ROW_BYTES, complain)
