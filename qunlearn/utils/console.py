"""Print what a person reads: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qunlearn.utils.signals import raise_if_asked

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_consoles: dict[str, Any] = {}
documents: list[None] = []  # one for each JSON document that the running command has printed
warnings: list[str] = []  # what it has warned of, each once: its document says so too


class _Voice:
    """Whether this process prints at all: of several one does."""

    silent = False
    name = ""  # in front of what one of the others has to say


def silence(name: str) -> None:
    """Print nothing from here on, but errors of this process's own, under its name."""
    _Voice.silent, _Voice.name = True, f"{name}: "


def speak() -> str:
    """Print again, for a last word; returns the name to say it under."""
    _Voice.silent = False
    return _Voice.name


def err() -> Console:
    """The console for talk. Made on first use: rich is not needed for `--help`."""
    return _console("err", stderr=True)


def out() -> Console:
    """The console for data a person asked for: tables."""
    return _console("out", stderr=False)


def _console(name: str, *, stderr: bool) -> Console:
    from rich.console import Console

    file = _nowhere() if _Voice.silent else None
    stream = file or (sys.stderr if stderr else sys.stdout)
    made = _consoles.get(name)
    if made is None or made[0] is not stream:  # tests and pipes swap the streams
        # Off a terminal lines must not be folded at 80 columns: they are for grep and for logs.
        width = None if stream.isatty() else 160
        made = (
            stream,
            Console(file=file, stderr=stderr, highlight=False, emoji=False, soft_wrap=not stream.isatty(), width=width),
        )
        _consoles[name] = made
    console: Console = made[1]
    return console


@functools.cache
def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")  # as long as the process


def clean(text: str) -> str:
    """Text from a model or a file, safe for a terminal: control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() or c in "\n\t" or _is_text(c) else f"\\x{ord(c):02x}" for c in text)


def _is_text(c: str) -> bool:
    """Return whether a character that is not printable by itself is one that texts are written with: spaces of other
    widths, and what joins letters or keeps them apart."""
    return unicodedata.category(c) == "Zs" or c in "\u00ad\u200b\u200c\u200d"


def write_out(text: str, end: str = "\n") -> None:
    """Write a text to stdout for who reads it from there: as `clean` makes it, and otherwise as it is, tabs too."""
    file = out().file
    file.write(clean(text) + end)
    file.flush()  # whoever asks by a pipe waits for it


def say(text: str = "", style: str | None = None) -> None:
    """One line to stderr, as it is: nothing in it is read as markup. A terminal that is gone ends no run."""
    with contextlib.suppress(OSError):
        err().print(clean(text), style=style, markup=False)


def announce(text: str, style: str | None = None) -> None:
    """One line to stderr of each of several processes, of those that are silent too, under their names."""
    silent, _Voice.silent = _Voice.silent, False
    try:
        say(f"{_Voice.name if silent else ''}{text}", style)
    finally:
        _Voice.silent = silent


def warn(text: str) -> None:
    if text not in warnings:
        warnings.append(text)
    say(f"! {text}", style="yellow")


def begin_call() -> None:
    """Begin a call: what an earlier one in this process printed is not its own."""
    documents.clear()
    warnings.clear()


def emit_json(value: Any, *, warned: bool = True) -> None:
    """The one machine-readable result on stdout; with `warned` it has a list of what was warned of on the way."""
    documents.append(None)
    if warned and warnings and isinstance(value, Mapping):
        value = {**value, "warnings": [*warnings]}
    emit_json_line(value, indent=2)


def emit_json_line(value: Any, indent: int | None = None) -> None:
    """One of several results on stdout, each on a line of its own."""
    if _Voice.silent:
        return

    def text(ascii_only: bool) -> str:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False, default=str)

    try:
        made = text(False)
        made.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # escaped, nothing is lost where the stream cannot say a character
        made = text(True)
    sys.stdout.write(made + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    """JSON has no infinity: as a text, which a configuration reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def facts(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A header of decisions: names left, what was decided right."""
    from rich.table import Table
    from rich.text import Text

    if title:
        say(title, style="bold")
    if not err().is_terminal:
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            say(f"  {name:<{width}}  {value}")
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(f"  {clean(name)}"), Text(clean(value)))
    err().print(table)


@dataclass(frozen=True)
class Column:
    title: str
    right: bool = True


def table(title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, to_stdout: bool = False) -> None:
    """A table of texts; cells are never read as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=Text(clean(title)), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in columns:
        made.add_column(Text(clean(column.title)), justify="right" if column.right else "left", overflow="fold")
    for row in rows:
        made.add_row(*[Text(clean(cell)) for cell in row])
    (out() if to_stdout else err()).print(made)


class Meter:
    """A progress bar with ETA on a terminal, plain lines elsewhere."""

    def __init__(self, what: str, total: int, *, every_s: float = 5.0) -> None:
        self.what, self.total, self.every_s = what, total, every_s
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Meter:
        if err().is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(
                *columns, TextColumn("{task.fields[note]}", markup=False), console=err(), transient=True
            )
            self._task = self._bar.add_task(clean(self.what), total=self.total, note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()

    def extend(self, total: int) -> None:
        """Show from now on how much of more there is."""
        self.total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def at(self, done: int, note: str = "") -> None:
        """Show that `done` of the total is done; off a terminal a line every few seconds."""
        if self._bar is not None and self._task is not None:
            with contextlib.suppress(OSError):
                self._bar.update(self._task, completed=done, note=clean(note))
            return
        now = time.monotonic()
        if now - self._last >= self.every_s or done == self.total:
            self._last = now
            left_s = (now - self._start) / max(1, done) * (self.total - done)
            say(f"  {self.what} {done}/{self.total}  {note}  eta {left_s:.0f} s")


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Say what is being done while it is done; on a terminal the line goes away."""
    if err().is_terminal:
        from rich.text import Text

        with err().status(Text(clean(what))):
            yield
    else:
        say(f"{what} …")
        yield
    raise_if_asked()
