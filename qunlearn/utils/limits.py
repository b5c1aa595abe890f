"""Run a model author's code (a chat template) within limits of time and memory."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SECONDS, BYTES = 3.0, 512 << 20
# All blocks of this process together: a template that takes half a second a row would take hours for a file.
TOTAL_SECONDS, ROW_SECONDS = 10.0, 0.02


class OutOfBoundsError(Exception):
    """It took longer than it was given."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise OutOfBoundsError when the block takes longer than SECONDS, and MemoryError when it wants BYTES more memory.

    Python code only: a call into a library is not broken off. Where the system offers no such limits (Windows), and in
    threads, where signals do not arrive, the block runs without them; macOS knows the time limit only. All blocks
    together may take TOTAL_SECONDS, and ROW_SECONDS for each of them.
    """
    _account.check()
    with contextlib.ExitStack() as limits:
        limits.enter_context(_account.timed())
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
            limits.enter_context(_timed(SECONDS))
            limits.enter_context(_confined(BYTES))
        yield


class _Account:
    """How many blocks there were, and what processor time they took."""

    def __init__(self) -> None:
        self.blocks, self.seconds = 0, 0.0

    def check(self) -> None:
        if self.seconds > TOTAL_SECONDS + ROW_SECONDS * self.blocks:
            each = self.seconds / self.blocks
            raise OutOfBoundsError(f"it takes {each:.2f} s a row, {self.seconds:.0f} s for {self.blocks} rows so far")

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        started = time.process_time()
        try:
            yield
        finally:
            self.blocks, self.seconds = self.blocks + 1, self.seconds + time.process_time() - started


_account = _Account()


@contextlib.contextmanager
def _timed(seconds: float) -> Iterator[None]:
    def stop(_: int, __: FrameType | None) -> None:
        raise OutOfBoundsError(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _confined(size_bytes: int) -> Iterator[None]:
    """Address space: what there is, and so much more."""
    import resource

    try:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):  # no Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + size_bytes
    if soft != resource.RLIM_INFINITY:
        wanted = min(soft, wanted)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
