"""`qunlearn data import`: stream a published data set into JSONL, and count what was dropped."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from qunlearn.data.formats import BAD, FORMATS, NORMAL, Format
from qunlearn.data.local_path import local_path
from qunlearn.data.page_marks import without_page_marks
from qunlearn.data.row_reader import Problems, Row, read_rows, read_text
from qunlearn.data.text_windows import Windows, windows
from qunlearn.errors import ConfigError, DataError, OutputError
from qunlearn.utils.console import facts, say, warn
from qunlearn.utils.files import sync
from qunlearn.utils.output import real
from qunlearn.utils.staging import held
from qunlearn.utils.text import folded

TEXT = "text"
NAMES = (*FORMATS, TEXT)
HUB = "hub:"
_IMPORTING = ".importing"
_PARTS = {2: ("train", "test"), 3: ("train", "val", "test")}


@dataclass(frozen=True)
class Source:
    """A file, or hub:OWNER/NAME with the subset and the part of it (train, validation, …); of that, `rows` from the
    row `skip` on, counted from 0."""

    location: str
    subset: str | None = None
    part: str | None = None
    skip: int = 0
    rows: int | None = None


@dataclass(frozen=True)
class Wanted:
    """What to take. `shares`: percentages of train and test, or train, val and test; empty: one file."""

    side: str | None = None
    limit: int | None = None
    shares: tuple[int, ...] = ()
    seed: int = 0
    skip_broken: bool = False
    cut: Windows = field(default_factory=Windows)
    overwrite: bool = False


@dataclass
class Imported:
    """What was done. `written`: rows of each file; `dropped`: how often each reason; `shared_answers`: test answers
    that are, word for word, answers of the training part too, to other prompts."""

    format: str
    source: str
    side: str
    read: int = 0
    written: dict[str, int] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    shared_answers: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "dropped": dict(self.dropped)}


def parse_shares(text: str | None) -> tuple[int, ...]:
    """Percentages such as 80/20 or, as in the paper, 70/10/20. Raises ConfigError."""
    if text is None:
        return ()
    parts = text.split("/")
    shares = tuple(int(part) for part in parts if part.isdecimal() and int(part) > 0)
    if len(shares) != len(parts) or len(shares) not in _PARTS or sum(shares) != 100:
        hint = "train/test or train/val/test in percent, such as 80/20 or 70/10/20"
        raise ConfigError(f"not shares that sum to 100: {text[:40]!r}", where="--split", hint=hint)
    return shares


def import_data(name: str, source: Source, output: Path, wanted: Wanted = Wanted()) -> Imported:
    """Read, convert and write, each file whole or not at all. Raises ConfigError, DataError, OutputError."""
    side = _check_side(name, wanted.side)
    paths = part_paths(output, len(wanted.shares))
    _check_outputs(paths, source, wanted.overwrite)
    done = Imported(name, source.location, side)
    counts = [0] * len(paths)
    with _private_files(paths) as (files, temporary):
        for row in _converted(name, source, wanted, done):
            i = _part_of(row, wanted) if wanted.shares else 0
            files[i].write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[i] += 1
            if sum(counts) == wanted.limit:
                break
        empty = [path for path, count in zip(paths, counts, strict=True) if not count]
        if empty:
            reasons = ", ".join(f"{n} x {reason}" for reason, n in done.dropped.most_common(4)) or "there are too few"
            raise DataError(f"no rows are left for {empty[0].name}: {reasons}", where=source.location)
        for file in files:
            file.flush()  # for who reads it back
        if len(paths) > 1:
            done.shared_answers = check_leaks(temporary)
        _check_outputs(paths, source, wanted.overwrite)  # much may have happened since it was asked first
    done.written = {str(path): count for path, count in zip(paths, counts, strict=True)}
    return done


def part_paths(output: Path, parts: int) -> list[Path]:
    """OUT itself, or OUT.train, OUT.test, before its ending."""
    if not parts:
        return [output]
    return [output.with_name(f"{output.stem}.{part}{output.suffix}") for part in _PARTS[parts]]


def show_imported(done: Imported) -> None:
    """Print what was read, written and dropped."""
    facts(
        f"{done.format}, {done.side}: {done.read} {'windows' if done.format == 'text' else 'rows'} read",
        [
            *((str(count), f"rows in {path}") for path, count in done.written.items()),
            *((str(count), f"dropped: {reason}") for reason, count in done.dropped.most_common()),
        ],
    )
    if len(done.written) > 1:
        say("no prompt is in more than one of the files (checked)")
    if done.shared_answers:
        warn(f"{done.shared_answers} answers outside the training part are, word for word, in it too")


# -- checks ----------------------------------------------------------------------------------------------


def _check_side(name: str, asked: str | None) -> str:
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(NAMES)}"
        raise ConfigError(f"unknown format {name!r}", where="data import", hint=hint)
    sides = FORMATS[name].sides if name != TEXT else (BAD, NORMAL)
    if asked is not None and asked not in sides:
        raise ConfigError(f"{name} has no side {asked!r}", where="--side", hint=f"one of {', '.join(sides)}")
    return asked or sides[0]


def _check_outputs(paths: Sequence[Path], source: Source, overwrite: bool) -> None:
    for path in paths:
        real(path)
        if path.is_dir():
            raise OutputError("is a folder, not a file", where=str(path), hint="name a file")
        if path.exists() and Path(source.location).exists() and path.samefile(source.location):
            raise OutputError("is the source itself", where=str(path), hint="choose another --output")
        if path.exists() and not overwrite:
            raise OutputError("exists", where=str(path), hint="choose another --output, or --overwrite")


@contextlib.contextmanager
def _private_files(paths: Sequence[Path]) -> Iterator[tuple[list[TextIO], list[Path]]]:
    """Files for their owner's eyes only (0600) that get their names when all of them are whole and on the disk.

    What a killed import left is written over by the next one of the same name. Raises OutputError, LockedError.
    """
    targets = [real(path) for path in paths]
    # Not the name that a run or a merge of this name has: an import that is over removes its folder.
    stage = targets[0].with_name(f".{targets[0].name}{_IMPORTING}")
    temporary = [stage / path.name for path in targets]
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(held(stage, paths[0]))
            stack.callback(shutil.rmtree, stage, ignore_errors=True)
            files = [stack.enter_context(_opened(path)) for path in temporary]
            yield files, temporary
            for file in files:
                file.flush()
                os.fsync(file.fileno())
                file.close()
            for made, path in zip(temporary, targets, strict=True):
                made.replace(path)
            sync(targets[0].parent)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=str(paths[0])) from error


def _opened(path: Path) -> TextIO:
    path.unlink(missing_ok=True)
    return os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8", errors="backslashreplace"
    )


# -- rows ------------------------------------------------------------------------------------------------


def _converted(name: str, source: Source, wanted: Wanted, done: Imported) -> Iterator[dict[str, Any]]:
    if name == TEXT:
        if source.location.startswith(HUB):
            lines = _hub_texts(source, done)
        else:
            lines = without_page_marks(lambda: _plain(_path(source)), done.dropped)
        for window in windows(lines, wanted.cut, done.dropped):
            done.read += 1
            yield window
        return
    known, problems = FORMATS[name], Problems(Path(source.location))

    def complain(line: int, text: str) -> None:
        if wanted.skip_broken:
            done.dropped["broken rows"] += 1
        else:
            problems.add(line, text)

    rows = hub_rows(source) if source.location.startswith(HUB) else read_rows(_path(source), complain)
    for line, row in rows:
        done.read += 1
        try:
            made = list(known.convert(_as_row(row, known), done.side))
        except ValueError as error:
            complain(line, str(error))
            continue
        for one in made:
            if isinstance(one, str):
                done.dropped[one] += 1
            elif not problems.found:  # a file with problems is read on for more of them only
                yield one
    problems.raise_if_any()


def _plain(path: Path) -> Iterator[str]:
    """Yield the lines of a file. Raises DataError where it holds rows, or marked-up text."""
    lines = read_text(path)
    first = next(lines, "")
    begins = first.lstrip("\ufeff \t\r\n")
    if begins.startswith("{\\rtf"):
        raise DataError("is rich text, not plain", where=str(path), hint="save it as plain text (.txt)")
    if begins[:1] in ("{", "[") and _is_json(begins):
        hint = 'give {"text": …} rows to --bad as they are; `qunlearn data import --help` names other formats'
        raise DataError("holds rows, not a plain text", where=str(path), hint=hint)
    yield from itertools.chain([first], lines)


def _is_json(line: str) -> bool:
    """Return whether a first line is a row of JSON, or begins a list of rows."""
    if line.strip() in ("[", "{", "[{"):
        return True
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _path(source: Source) -> Path:
    if source.subset or source.part:
        raise ConfigError("a file has no subset and no part", where="--subset --part", hint="hub:OWNER/NAME has")
    return local_path(source.location)


def _as_row(row: Row | str, known: Format) -> Row:
    if isinstance(row, dict):
        return row
    if not known.bare_text:
        raise ValueError("not an object but a text")
    return {"text": row}


def hub_rows(source: Source) -> Iterator[tuple[int, Row]]:
    """(number, row) of a public data set, streamed by the hub's own client. Raises DataError."""
    name = source.location.removeprefix(HUB)
    try:
        from datasets import load_dataset
    except ImportError:
        hint = "pip install 'qunlearn[hub]', or download the file and give its path"
        raise DataError("reading from the hub needs the package `datasets`", where=source.location, hint=hint) from None
    try:
        found = load_dataset(name, source.subset, split=source.part or "train", streaming=True)
        end = None if source.rows is None else source.skip + source.rows
        for number, row in enumerate(itertools.islice(found, source.skip, end), source.skip + 1):
            yield number, dict(row)
    except DataError:
        raise
    except Exception as error:  # the client passes on whatever its file systems and parsers raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        hint = "check the name, --subset and --part; or download the file and give its path"
        raise DataError(f"cannot be fetched: {first}", where=source.location, hint=hint) from error


def _hub_texts(source: Source, done: Imported) -> Iterator[str]:
    for number, row in hub_rows(source):
        text = row.get("text")
        if not isinstance(text, str):
            raise DataError("has no field 'text'", where=f"{source.location}:{number}")
        yield f"{text}\n"


# -- train and test --------------------------------------------------------------------------------------


def prompt_key(row: Mapping[str, Any]) -> str:
    """Equal for rows that ask the same, white space and letter case aside."""
    return folded(str(row.get("prompt") or row.get("text") or ""))


def _part_of(row: Mapping[str, Any], wanted: Wanted) -> int:
    """By a hash of the prompt, so that all answers to one prompt are on one side, however long the file is."""
    digest = hashlib.sha256(f"{wanted.seed}\x1f{prompt_key(row)}".encode("utf-8", "replace")).digest()
    at, below = int.from_bytes(digest[:8], "big") % 10_000 / 100, 0
    for i, share in enumerate(wanted.shares):
        below += share
        if at < below:
            return i
    return len(wanted.shares) - 1


def check_leaks(files: Sequence[Path]) -> int:
    """Test (and validation) answers that are in the first file too. Raises DataError when a prompt is in both."""
    prompts, answers = set[int](), Counter[int]()
    for file in files[1:]:
        for row in _read_back(file):
            prompts.add(_short(prompt_key(row)))
            answers[_short(_answer(row))] += 1
    shared = 0
    for row in _read_back(files[0]):
        if _short(prompt_key(row)) in prompts:
            raise DataError("a prompt is both in the training part and in another", where=str(files[0]))
        shared += answers.pop(_short(_answer(row)), 0)
    return shared


def _answer(row: Mapping[str, Any]) -> str:
    return folded(str(row.get("completion") or row.get("text") or ""))


def _short(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def _read_back(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
