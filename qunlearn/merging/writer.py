"""Write a planned merge shard by shard, each hashed, flushed and journalled before it counts."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qunlearn.errors import ModelError, OutputError
from qunlearn.hub.side_files import copy_into
from qunlearn.merging.compute import blocks
from qunlearn.merging.lora_tensors import Update
from qunlearn.merging.plan import MergePlan, Shard
from qunlearn.merging.shard_file import ShardFile
from qunlearn.merging.tensor_reader import RING, Reader
from qunlearn.model.device import torch_threads
from qunlearn.utils.console import Meter
from qunlearn.utils.files import PART, write_json
from qunlearn.utils.staging import Journal

_QUEUED = RING - 2  # blocks that may wait for the disk: one more is being computed, one is the caller's
_MARGIN_BYTES = 64 << 20
INDEX = "model.safetensors.index.json"


def write_model(plan: MergePlan, journal: Journal) -> None:
    """Write what is not written yet: shards first, then the index and the small files, the config last.

    Raises OutputError, and ModelError unless every update went into exactly one tensor.
    """
    left = [shard for shard in plan.shards if shard.name not in journal.files]
    _check_space(journal.folder, sum(shard.bytes for shard in left))
    used = [u for shard in plan.shards if shard not in left for piece in shard.pieces for u in piece.updates]
    found = done = plan.bytes - sum(shard.bytes for shard in left)
    started, shown = time.monotonic(), 0
    # Blocks that fit the cache are too small to be shared: two threads took three times as long as one.
    with torch_threads(1), Meter("MiB", plan.bytes >> 20) as meter, Reader() as reader, _Sink() as sink:
        for shard in left:

            def at(written: int, before: int = done) -> None:
                nonlocal shown
                if (now := (before + written) >> 20) > shown:
                    shown = now
                    speed = (before - found + written) / 2**20 / max(1e-3, time.monotonic() - started)
                    meter.at(now, f"{speed:.0f} MiB/s")

            used += _write_shard(plan, shard, journal, reader, sink, at)
            done += shard.bytes
        sink.drain()
    if 2 * len(used) != plan.adapter_tensors or len(set(used)) != len(used):
        message = f"{plan.adapter_tensors} adapter tensors, {2 * len(used)} used"
        raise ModelError(f"not every adapter tensor was used exactly once: {message}", hint="please report it")
    _write_small(plan, journal.folder)


def _write_shard(
    plan: MergePlan, shard: Shard, journal: Journal, reader: Reader, sink: _Sink, at: Callable[[int], None]
) -> list[Update]:
    """Compute a shard and hand its bytes to the sink; returns the updates that went in."""
    out = ShardFile(journal.folder / (shard.name + PART))
    try:
        sink.put(out.write, memoryview(shard.header))
        for piece in shard.pieces:
            written = 0
            for block in blocks(piece, reader, plan.rounding):
                sink.put(out.write, block)
                written += len(block)
                at(out.size)
            if written != piece.bytes:
                raise ModelError(f"{written} bytes of {piece.bytes} came", where=piece.name, hint="please report it")
        sink.put_aside(lambda: _finish(out, journal, shard.name))
    except BaseException:
        sink.finish()  # what is queued belongs to finished shards, and to this one, which stays without its name
        out.abandon()
        raise
    return [update for piece in shard.pieces for update in piece.updates]


def _finish(out: ShardFile, journal: Journal, name: str) -> None:
    out.close()
    journal.finish(name, out.digest.hexdigest())


class _Sink:
    """One thread that writes and hashes in order while the next block is being computed. After a failure it does
    nothing more: no shard gets its name behind a write that did not happen."""

    def __init__(self) -> None:
        self._pool, self._aside = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._failed = False
        self._waiting: deque[Future[Any]] = deque()
        self._apart: deque[Future[Any]] = deque()

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def put(self, work: Callable[..., Any], *args: Any) -> None:
        """Queue a piece of work; waits when too much is queued, and raises what an earlier one raised."""
        self._waiting.append(self._pool.submit(self._do, work, args))
        while len(self._waiting) > _QUEUED:
            self._waiting.popleft().result()

    def put_aside(self, work: Callable[[], Any]) -> None:
        """Queue what waits for the disk and need not hold up what is put next."""
        self.put(lambda: self._apart.append(self._aside.submit(self._do, work, ())))

    def drain(self) -> None:
        """Wait for all of it, and raise what failed."""
        for queue in (self._waiting, self._apart):
            while queue:
                queue.popleft().result()

    def finish(self) -> None:
        """Do what is queued, and take no more."""
        self._pool.shutdown(wait=True)
        self._aside.shutdown(wait=True)

    def _do(self, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if self._failed:
            return
        try:
            work(*args)
        except BaseException:
            self._failed = True
            raise


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _MARGIN_BYTES:
        message = f"{(needed + _MARGIN_BYTES) / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free"
        raise OutputError(f"the disk is full: {message}", where=str(folder.parent), hint="free space")


def _write_small(plan: MergePlan, folder: Path) -> None:
    """Index, tokenizer and the rest; the config, without which no library loads the folder, last."""
    if len(plan.shards) > 1:
        write_json(folder / INDEX, plan.index)
    copy_into(folder, plan.companions)
    for name in plan.companions:
        (folder / name).chmod(0o600)
    write_json(folder / "config.json", plan.config)
