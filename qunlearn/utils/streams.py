"""Prepare stdout and stderr: any character can be printed, and a closed or full stream is a named error."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from qunlearn.errors import OutputError

PIPE_CLOSED = 141  # what a shell says of a tool whose reader went away: 128 + SIGPIPE


def prepare() -> None:
    """Replace the process's streams by ones that never raise for a character, nor for talk that nobody hears."""
    _open_missing()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _rebuilt(sys.stdout, _Data)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _rebuilt(sys.stderr, _Talk)


def _open_missing() -> None:
    """Give a closed stream its number back: the next file that is opened would get it, and what is printed."""
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:  # writing to it fails as to a closed one
        continue
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - a number, open to the end
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _rebuilt(stream: io.TextIOWrapper, kind: type[io.TextIOWrapper]) -> io.TextIOWrapper:
    encoding, by_line = stream.encoding, stream.line_buffering
    # A character that the encoding lacks is a question mark: an hour of training does not end for a dash.
    return kind(stream.detach(), encoding=encoding, errors="replace", line_buffering=by_line)


class _Data(io.TextIOWrapper):
    """stdout: data that somebody waits for. A reader that went away ends the process; other faults are OutputErrors."""

    def write(self, text: str, /) -> int:
        return int(self._tried(super().write, text))

    def flush(self) -> None:
        self._tried(super().flush)

    def _tried(self, act: Callable[..., Any], *values: Any) -> Any:
        try:
            return act(*values)
        except OSError as error:
            with contextlib.suppress(OSError):  # what is left in the buffer goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if isinstance(error, BrokenPipeError):
                raise SystemExit(PIPE_CLOSED) from None
            message = f"cannot be written: {error.strerror or error}"
            raise OutputError(message, where="stdout", hint="check where it is redirected to") from error


class _Talk(io.TextIOWrapper):
    """stderr: what is said on the way. A terminal that is gone, or a full disk, ends no run."""

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()
