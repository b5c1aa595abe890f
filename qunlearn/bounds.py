"""Running what a model's author wrote (a chat template) within limits of time and memory."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SECONDS, BYTES = 3.0, 512 << 20


class OutOfBoundsError(Exception):
    """It took longer than it was given."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise OutOfBoundsError when the block takes longer than SECONDS, and MemoryError when it wants BYTES more memory.

    Python code only: a call into a library is not broken off. Where the system offers no such limits (Windows), and in
    threads, where signals do not arrive, the block runs without them; macOS knows the time limit only.
    """
    with contextlib.ExitStack() as limits:
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
            limits.enter_context(_timed(SECONDS))
            limits.enter_context(_confined(BYTES))
        yield


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
