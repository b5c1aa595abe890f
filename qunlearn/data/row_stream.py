"""Stream the rows of a file of any size in constant memory: JSONL, a JSON array, or CSV, gzipped or not."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qunlearn.data.csv_rows import csv_rows
from qunlearn.data.file_types import (
    HEAD_BYTES,
    PACKED_ENDINGS,
    check_holds_rows,
    damaged,
    is_parquet,
    packing,
    parquet_rows,
    unpacking,
)
from qunlearn.data.row_reader import read_file
from qunlearn.errors import DataError

MAX_ROW_BYTES = 10_000_000
_CHUNK_BYTES = 1 << 16
_WHOLE_BYTES = 64 << 20  # of a file that is read whole, for its rows are inside one object
_HOLDS_ROWS = re.compile(rb'\{\s*"(data|rows|examples|train|features)"\s*:\s*\[')
_SPACE = " \t\r\n"
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


Complain = Callable[[int, str], None]


def read_rows(path: Path, complain: Complain) -> Iterator[tuple[int, Row | str]]:
    """(line, row) of each row; a bare text in a JSON array is a row too. What is no row goes to `complain`.

    The line is 1-based, of the row's beginning. Raises DataError for a file that cannot be read.
    """
    with _opened(path) as file:
        head = file.read(_CHUNK_BYTES).removeprefix(codecs.BOM_UTF8)
    check_holds_rows(head, str(path))
    start = head.lstrip()[:1]
    if not start:
        raise DataError("the file is empty", where=str(path))
    endings = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in PACKED_ENDINGS]
    with _opened(path) as file:
        if is_parquet(head):
            yield from parquet_rows(file, str(path))
        elif start == b"{" and path.stat().st_size <= _WHOLE_BYTES and _is_no_row(head):
            found = read_file(path, "SRC")
            for line, why in found.problems:
                complain(line, why)
            yield from found.rows
        elif start == b"[":
            yield from _array(file, path, complain)
        elif start == b"{":
            yield from _lines(file, path, complain)
        elif not endings or endings[-1] not in (".json", ".jsonl", ".ndjson"):
            yield from _table(file, path, complain)
        else:
            raise DataError("neither a JSON object nor a list of them", where=f"{path}:1")


def _is_no_row(head: bytes) -> bool:
    """Return whether a file of objects begins with one that holds rows, or that goes over several lines."""
    line = head.lstrip().split(b"\n", 1)[0].strip()
    return _HOLDS_ROWS.match(line) is not None or (len(line) < len(head) // 2 and not line.endswith(b"}"))


def read_text(path: Path) -> Iterator[str]:
    """The lines of a text file; one without line ends comes in pieces. Raises DataError."""
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
            raise DataError(f"damaged {packed}: {error}", where=where, hint="pack the file again") from None
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
        byte = raw[error.start]
        hint = "save the file as UTF-8"
        raise DataError(f"not UTF-8 (byte {byte:#04x})", where=f"{path}:{number}", hint=hint) from None


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
        text = _decode(raw, path, number)
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            complain(number, f"not JSON: {error.msg}, column {error.colno}")
        except (RecursionError, ValueError):
            complain(number, "not JSON that can be read: nested too deeply, or a number too long")
        else:
            if isinstance(value, dict):
                yield number, value
            else:
                complain(number, "not a JSON object")


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
            raise DataError("not UTF-8", where=f"{self._path}:{line}", hint="save the file as UTF-8") from None
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
    mark = window.next_mark()
    while mark != "]":
        value, end = _element(window, decoder, path)
        line = window.line
        window.drop(end)
        if isinstance(value, (dict, str)):
            yield line, value
        else:
            complain(line, "neither a JSON object nor a text")
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
            message = "not JSON that can be read: nested too deeply, or a number too long"
            raise DataError(message, where=f"{path}:{window.line}") from None


# -- CSV -------------------------------------------------------------------------------------------------


def _table(file: IO[bytes], path: Path, complain: Complain) -> Iterator[tuple[int, Row]]:
    def lines() -> Iterator[str]:
        for number, raw in _bounded_lines(file, MAX_ROW_BYTES):
            if not raw.endswith(b"\n") and len(raw) >= MAX_ROW_BYTES - 4:
                raise DataError(f"a line of more than {MAX_ROW_BYTES} bytes", where=f"{path}:{number}")
            yield _decode(raw, path, number)

    yield from csv_rows(lines(), path, MAX_ROW_BYTES, complain)
