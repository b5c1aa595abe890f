"""Handle SIGINT, SIGTERM and SIGHUP: the first stops after the current step, the second at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, a scheduler or a shutdown, a closed terminal
_asked: list[int] = []
_SAID = b"stopping after this step; once more to stop at once\n"


def as_interrupts() -> None:
    """Have every signal that asks to end raise KeyboardInterrupt, so that what Ctrl-C keeps is kept then too.

    One that is ignored (nohup) stays ignored. Each is remembered: libraries lose an exception now and then.
    """

    def handle(number: int, _: FrameType | None) -> None:
        _asked.append(number)
        raise KeyboardInterrupt

    for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, handle)


def raise_if_asked() -> None:
    """Raise KeyboardInterrupt for a signal whose own exception was lost on the way."""
    if _asked:
        raise KeyboardInterrupt


def answered() -> None:
    """Forget the signals so far: a person has stopped one answer, not the conversation."""
    _asked.clear()


@contextlib.contextmanager
def stop_signals(same_within_s: float = 0.0) -> Iterator[Callable[[], bool]]:
    """While the block lasts the first signal is only remembered; yields whether there was one.

    The second raises KeyboardInterrupt, unless it comes within so many seconds of the first. A signal that is ignored
    (nohup) stays ignored; in other threads than the main one, where signals cannot be handled, nothing changes.
    """
    asked: list[float] = []  # when each came

    def handle(number: int, _: FrameType | None) -> None:
        asked.append(time.monotonic())
        if len(asked) > 1:
            if asked[-1] - asked[0] > same_within_s or not same_within_s:
                raise KeyboardInterrupt
            return
        with contextlib.suppress(OSError):  # print is not safe here, and the terminal may be what went away
            os.write(2, _SAID)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
