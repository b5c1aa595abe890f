"""Write a weight file once, from beginning to end, hashing it on the way."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_FLUSH_BYTES = 1 << 27
_STAGE_BYTES = 1 << 22  # of one direct write: smaller ones are slower
_WRITES = 3 if hasattr(os, "pwrite") else 1  # under way at a time; a disk wants to have some to choose from
_UNIT = 4096  # what direct writes come in multiples of


class ShardFile:
    """A private file. `digest` is of all bytes that came; `size` counts them.

    Bytes are staged, hashed as they come, and written by other threads while more are staged. Where the system allows
    it they go past its page cache: no one reads them soon, and to keep gigabytes of them costs the processor as much
    time as the merge. Elsewhere a flush now and then leaves less to do at the end.
    """

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self.size = self._staged = 0
        self._at = self._flushed = 0  # where what is staged belongs; up to where a flush was asked for
        self._hasher, self._flusher, self._writer = (ThreadPoolExecutor(n) for n in (1, 1, _WRITES))
        self._writing: deque[Future[None]] = deque()
        self._flush: Future[None] | None = None
        # They begin at a page, as direct writes must.
        self._stages = deque(mmap.mmap(-1, _STAGE_BYTES) for _ in range(1 + _WRITES))
        self._descriptor, self._direct = _open(path)

    def write(self, block: memoryview) -> None:
        """Take a block, which is free again when this returns. Raises what an earlier one's writing raised."""
        hashed = self._hasher.submit(self.digest.update, block)
        try:
            self._stage(block)
        finally:
            hashed.result()

    def abandon(self) -> None:
        for pool in (self._hasher, self._writer, self._flusher):
            pool.shutdown(wait=True, cancel_futures=True)
        self._close()

    def close(self) -> None:
        """On the disk when it returns; most of it was sent there while the rest was computed."""
        self._wait_for_writes(0)
        last, whole = memoryview(self._stages[0])[: self._staged], self._staged // _UNIT * _UNIT
        self._put(last[:whole], self._at)
        self._go_by_the_cache()
        self._put(last[whole:], self._at + whole)
        self._flusher.shutdown(wait=True)
        self._check_flush()
        os.fsync(self._descriptor)
        last.release()
        self.abandon()

    def _stage(self, block: memoryview) -> None:
        self.size += len(block)
        while len(block):
            count = min(len(block), _STAGE_BYTES - self._staged)
            self._stages[0][self._staged : self._staged + count] = block[:count]
            self._staged, block = self._staged + count, block[count:]
            if self._staged == _STAGE_BYTES:
                self._send()

    def _send(self) -> None:
        """Have the full stage written, and go on with one that is free."""
        self._wait_for_writes(_WRITES - 1)
        self._writing.append(self._writer.submit(self._put, memoryview(self._stages[0]), self._at))
        self._stages.rotate(-1)
        self._at, self._staged = self._at + _STAGE_BYTES, 0
        if self._direct or self._at - self._flushed < _FLUSH_BYTES:
            return
        if not self._flush or self._flush.done():
            self._check_flush()
            self._flushed = self._at
            self._flush = self._flusher.submit(os.fsync, self._descriptor)

    def _wait_for_writes(self, left: int) -> None:
        """Wait until no more than that many are under way."""
        while len(self._writing) > left:
            self._writing.popleft().result()

    def _put(self, left: memoryview, at: int) -> None:
        while len(left):
            direct = self._direct
            try:
                count = _write_at(self._descriptor, left, at)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                count = 0  # a file system that opens a file so and then does not write so
            left, at = left[count:], at + count
            if len(left):
                self._go_by_the_cache()

    def _go_by_the_cache(self) -> None:
        if self._direct:
            import fcntl

            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            self._direct = False

    def _check_flush(self) -> None:
        """Raise what a flush raised: the system tells of a failed write once, to whoever asked first."""
        if self._flush is not None:
            self._flush.result()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _write_at(descriptor: int, data: memoryview, at: int) -> int:
    """Bytes written. Without pwrite (Windows) one write is under way at a time, and they come in order."""
    return os.pwrite(descriptor, data, at) if hasattr(os, "pwrite") else os.write(descriptor, data)


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether what it is given goes past the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o600), False
