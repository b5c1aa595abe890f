"""The reference's hidden states (the base, adapter off): computed live, or cached in a file.

LoRA leaves the output head as it is, so D numbers a token say everything about the reference's distribution.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qunlearn.data.batch import ALL, Batch, Span, micro_batches, prefix_groups
from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example
from qunlearn.errors import OutputError
from qunlearn.model.policy import Policy

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Ids = tuple[int, ...]
_NOTHING = Record((), "", 0, {})
_SPARE_BYTES = 64 << 20
_ELSEWHERE = "--reference live, or QUNLEARN_CACHE=FOLDER"
# Files of earlier runs: used in the last month, and the latest ones up to this size, are kept.
_KEPT_S, _KEPT_BYTES = 30 * 24 * 3600, 20 << 30


class Reference(Protocol):
    """Where reference states come from."""

    def states(self, examples: Sequence[Example], spans: Sequence[Span], layer: int | None = None) -> list[Tensor]:
        """The hidden states (n, D) that predict each example's supervised tokens, on the policy's device: the final
        ones, or those behind a block."""
        ...


@dataclass(frozen=True)
class Live:
    """The policy with its adapters off, now."""

    policy: Policy
    max_tokens: int
    pack: bool = True

    def states(self, examples: Sequence[Example], spans: Sequence[Span], layer: int | None = None) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for batch, h in self.passes(examples, spans, layer):
            sizes = [spans[i].count(examples[i]) for i in batch.examples]
            found.update(zip(batch.examples, torch.split(h, sizes), strict=True))
        return [found[i] for i in range(len(examples))]

    @torch.no_grad()
    def passes(
        self, examples: Sequence[Example], spans: Sequence[Span], layer: int | None = None
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each pass with its states (n, D), for who needs no others beside them."""
        policy, pack = self.policy, self.pack and self.policy.packs(examples)
        made = prefix_groups(examples, ([i] for i in range(len(examples))), self.max_tokens)
        for rows in micro_batches(made, self.max_tokens, pack=pack):
            batch = policy.collate(examples, spans, rows, pack=pack)
            with policy.reference():
                h = batch.pick(policy.hidden(batch, layer))
            yield batch, h


@dataclass(frozen=True)
class _Chunk:
    """Rows whose states are computed together, always the same ones: so the file does not depend on who filled it."""

    rows: tuple[Ids, ...]
    start: int  # in the file, in tokens
    stop: int


@dataclass(frozen=True)
class _File:
    mapped: np.memmap[Any, Any]
    states: Tensor  # (tokens, D), a view of `mapped`
    checksums: np.ndarray[Any, Any]  # (chunks,), likewise; 0 = still to be computed


class Cached:
    """The states of given examples in one safetensors file, filled on first use and read from then on.

    Filling can be interrupted and resumed, and a chunk whose checksum is wrong is computed again.
    """

    def __init__(self, path: Path, live: Live, examples: Iterable[Example]) -> None:
        self.path, self.live = path, live
        self.width, self.dtype = live.policy.hidden_size, live.policy.dtype
        self.chunks, self._at = _layout(examples, live.max_tokens)
        self.tokens = self.chunks[-1].stop if self.chunks else 0
        self._file: _File | None = None

    @property
    def size_bytes(self) -> int:
        return len(self._header()) + self._state_bytes + 8 * len(self.chunks)

    def check_disk(self) -> None:
        """Raises OutputError when the file would not fit, or its folder cannot be written."""
        if self.path.exists():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            free = shutil.disk_usage(self.path.parent).free
        except OSError as error:
            message = f"the reference cache cannot be written: {error.strerror}"
            raise OutputError(message, where=str(self.path.parent), hint=_ELSEWHERE) from error
        if free < self.size_bytes + _SPARE_BYTES:
            message = f"the reference cache needs {self.size_bytes / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
            raise OutputError(message, where=str(self.path), hint=f"free space, or {_ELSEWHERE}")

    def make(self) -> None:
        """Make the file where it is not there. Raises OutputError."""
        self.check_disk()
        self._open()

    def fill(
        self, observe: Callable[[int, int], None] = lambda done, total: None, share: tuple[int, int] = (0, 1)
    ) -> int:
        """Compute what is not there yet; returns of how many tokens. Raises OutputError.

        `share`: of chunks in turn, which are this process's, and of how many processes that fill the same file. After
        a share it is to be filled whole: the others' is only looked at then.
        """
        self.check_disk()
        file, computed = self._open(), 0
        for number, chunk in enumerate(self.chunks):
            part, mine = file.states[chunk.start : chunk.stop], number % share[1] == share[0]
            if mine and (not file.checksums[number] or file.checksums[number] != _checksum(part)):
                examples = [_bare(ids) for ids in chunk.rows]
                part.copy_(torch.cat(self.live.states(examples, [ALL] * len(examples))))
                file.mapped.flush()
                file.checksums[number] = _checksum(part)
                computed += chunk.stop - chunk.start
            observe(chunk.stop, self.tokens)
        file.mapped.flush()
        if share == (0, 1):
            self._file = file
        return computed

    def states(self, examples: Sequence[Example], spans: Sequence[Span], layer: int | None = None) -> list[Tensor]:
        if layer is not None:  # a few blocks cost little, and a file for each would not
            return self.live.states(examples, spans, layer)
        if self._file is None:
            self.fill()
            return self.states(examples, spans)
        out = []
        for example, span in zip(examples, spans, strict=True):
            start = self._at[example.input_ids] - 1  # the state at position t predicts token t + 1
            wanted = torch.tensor([start + t for t in span.positions(example)], dtype=torch.long)
            out.append(self._file.states[wanted].to(self.live.policy.device))
        return out

    @property
    def _state_bytes(self) -> int:
        return self.tokens * self.width * self.dtype.itemsize

    def _header(self) -> bytes:
        """The safetensors header, padded so that what follows is aligned."""
        ends = self._state_bytes, self._state_bytes + 8 * len(self.chunks)
        tensors = {
            "states": {"dtype": _DTYPES[self.dtype], "shape": [self.tokens, self.width], "data_offsets": [0, ends[0]]},
            "checksums": {"dtype": "I64", "shape": [len(self.chunks)], "data_offsets": [*ends]},
        }
        text = json.dumps(tensors).encode()
        text += b" " * (-(8 + len(text)) % 64)
        return len(text).to_bytes(8, "little") + text

    def _open(self) -> _File:
        """Map the file, made with everything still to be computed when it is not there or not this one."""
        header = self._header()
        try:
            if not _begins_with(self.path, header, self.size_bytes):
                temporary = self.path.with_suffix(f".{os.getpid()}")
                with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                    file.write(header)
                    file.truncate(self.size_bytes)
                temporary.replace(self.path)
            mapped = np.memmap(self.path, mode="r+")
        except OSError as error:
            message = f"the reference cache cannot be written: {error.strerror}"
            raise OutputError(message, where=str(self.path), hint=_ELSEWHERE) from error
        middle = len(header) + self._state_bytes
        states = torch.from_numpy(mapped[len(header) : middle]).view(self.dtype).view(self.tokens, self.width)
        return _File(mapped, states, mapped[middle:].view(np.int64))


def cache_path(policy: Policy, model_fingerprint: str, examples: Iterable[Example], max_tokens: int) -> Path:
    """The file for these examples under this base: named by a hash of all that decides about its content.

    It is in the folder QUNLEARN_CACHE, else in XDG_CACHE_HOME, else in ~/.cache. Raises OutputError.
    """
    digest = hashlib.sha256()
    for part in (model_fingerprint, policy.base.quantization, policy.device.type, str(policy.dtype), str(max_tokens)):
        digest.update(part.encode() + b"\0")
    for ids in _distinct(examples):
        digest.update(np.array(ids, dtype=np.int64).tobytes() + b"\0")
    try:
        folder = os.environ.get("QUNLEARN_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise OutputError("the reference cache has no home folder to be in", hint=_ELSEWHERE) from error
    return Path(folder) / "qunlearn" / "reference" / f"{digest.hexdigest()[:32]}.safetensors"


def prune(used: Path) -> int:
    """Remove files beside `used` that no run has used for long, or that are too many together; returns their bytes.

    A file that another process has mapped stays readable for it until it ends.
    """
    gone = total = 0
    with contextlib.suppress(OSError):
        os.utime(used)
        files = [path for path in used.parent.glob("*.safetensors") if path != used]
        for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
            size, age = path.stat().st_size, time.time() - path.stat().st_mtime
            total += size
            if age > _KEPT_S or total > _KEPT_BYTES:
                path.unlink()
                gone += size
    return gone


def _distinct(examples: Iterable[Example]) -> list[Ids]:
    """Token ids, each row once, longest first."""
    return sorted({example.input_ids for example in examples}, key=lambda ids: (-len(ids), ids))


def _layout(examples: Iterable[Example], max_tokens: int) -> tuple[list[_Chunk], dict[Ids, int]]:
    """Chunks of about `max_tokens` tokens, and where each row begins in the file."""
    chunks: list[_Chunk] = []
    at: dict[Ids, int] = {}
    rows: list[Ids] = []
    start = stop = 0
    for ids in _distinct(examples):
        if rows and sum(map(len, rows)) + len(ids) > max_tokens:
            chunks.append(_Chunk(tuple(rows), start, stop))
            rows, start = [], stop
        rows.append(ids)
        at[ids] = stop
        stop += len(ids) - 1
    if rows:
        chunks.append(_Chunk(tuple(rows), start, stop))
    return chunks, at


def _bare(ids: Ids) -> Example:
    return Example(ids, 1, len(ids), 1, _NOTHING)


def _checksum(part: Tensor) -> int:
    """Never 0, which says that there is nothing yet."""
    return zlib.crc32(part.contiguous().view(torch.uint8).numpy().tobytes()) + 1


def _begins_with(path: Path, header: bytes, size: int) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header
