"""A weight file on its way to the disk: written once, from beginning to end, and hashed on the way."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_FLUSH_BYTES = 1 << 27
_STAGE_BYTES = 1 << 22  # of one direct write: smaller ones are slower
_UNIT = 4096  # what direct writes come in multiples of


class ShardFile:
    """A private file. `digest` is of all bytes that came; `size` counts them.

    Bytes are staged, hashed as they come, and written by a thread of its own while more are staged. Where the system
    allows it they go past its page cache: no one reads them soon, and to keep gigabytes of them costs the processor
    as much time as the merge. Elsewhere they are flushed now and then.
    """

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self.size = self._staged = self._written = self._flushed = 0
        self._hasher, self._writer, self._flusher = (ThreadPoolExecutor(1) for _ in range(3))
        self._writing: Future[None] | None = None
        self._flush: Future[None] | None = None
        self._stages = [mmap.mmap(-1, _STAGE_BYTES) for _ in range(2)]  # begin at a page, as direct writes must
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
        self._check_written()
        last, whole = memoryview(self._stages[0])[: self._staged], self._staged // _UNIT * _UNIT
        self._put(last[:whole])
        self._go_by_the_cache()
        self._put(last[whole:])
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
                self._check_written()
                self._writing = self._writer.submit(self._put, memoryview(self._stages[0]))
                self._stages.reverse()
                self._staged = 0

    def _check_written(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _put(self, left: memoryview) -> None:
        while len(left):
            try:
                count = os.write(self._descriptor, left)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                count = 0  # a file system that opens a file so and then does not write so
            self._written += count
            left = left[count:]
            if len(left):
                self._go_by_the_cache()
        if (
            not self._direct
            and self._written - self._flushed >= _FLUSH_BYTES
            and (not self._flush or self._flush.done())
        ):
            self._check_flush()
            self._flushed = self._written
            self._flush = self._flusher.submit(os.fsync, self._descriptor)

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


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether what it is given goes past the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o600), False
