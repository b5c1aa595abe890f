"""Several processes by torch.distributed: gloo on the CPU, NCCL between GPUs, as a launcher has set them up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qunlearn.errors import ConfigError, OutputError, ProcessLostError, QunlearnError, is_out_of_memory
from qunlearn.parallel.division import shares
from qunlearn.parallel.parts import in_shards, joined_parts
from qunlearn.parallel.ranks import ALONE, Ranks, Read, joined_as
from qunlearn.utils.launch import number_here, process_count, process_number

T = TypeVar("T")
# Of a wait for the others. While the main process makes retain rows for a large model they wait for hours; one that is
# lost is noticed by its closed connection, or by the launcher.
_PATIENCE = timedelta(hours=12)
_HEARD = "qunlearn/heard"  # there: how many have read the word of one that ended
_HEARD_WITHIN_S = 5.0
_ENDED = "qunlearn/ended/"  # in the launcher's store: how a process ended, by its number


class Group(Ranks):
    """The processes of one run. Every method waits until all have called it.

    Raises ProcessLostError where another process has gone.
    """

    def __init__(self, number: int, count: int, here: int) -> None:
        self.number, self.count, self.here = number, count, here

    # -- who does what -------------------------------------------------------------------------------

    def first(self, act: Callable[[], T]) -> T:
        """Where it fails in the main process the others do not act any more."""
        if not self.main:
            self.wait()
        value = act()
        if self.main:
            self.wait()
        self.wait()
        return value

    def first_here(self, act: Callable[[], T]) -> T:
        """Where it fails the failure is raised when all have acted: whoever handles it is not left behind."""
        if self.here:
            self.wait()
        try:
            with joined_as(ALONE):
                return act()
        finally:
            if not self.here:
                self.wait()
            self.wait()

    def from_main(self, compute: Callable[[], T], read: Read[T] | None = None) -> T:
        if self.main:
            with joined_as(ALONE):
                value = compute()
            self._told(_packed(value))
            return value
        told = json.loads(self._told(b""))
        return read(told) if read else told

    def share(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.number :: self.count]

    def each(self, items: Sequence[Any], compute: Callable[[Sequence[Any]], T], read: Read[T] | None = None) -> list[T]:
        mine = self.share(items)
        with joined_as(ALONE):
            value = compute(mine) if mine else None
        found = [json.loads(data) for data in self._all_told(_packed(value))][: max(1, len(items))]
        return [read(one) if read else one for one in found if one is not None]

    def divided(
        self,
        items: Sequence[Any],
        compute: Callable[[Sequence[Any]], list[T]],
        read: Read[T] | None = None,
        costs: Sequence[float] | None = None,
    ) -> list[T]:
        places = [[*range(len(items))[n :: self.count]] for n in range(self.count)]
        if costs is not None:
            places = shares(costs, self.count)
        with joined_as(ALONE):
            mine = [items[i] for i in places[self.number]]
            value = compute(mine) if mine else []
        out: list[Any] = [None] * len(items)
        for part, data in zip(places, self._all_told(_packed(value)), strict=True):
            for i, one in zip(part, json.loads(data), strict=True):
                out[i] = read(one) if read else one
        return out

    def agreed(self, act: Callable[[], T]) -> T:
        failed: OutputError | None = None
        try:
            value = act()
        except OutputError as error:
            failed = error
        if self.any(failed is not None):
            raise failed or OutputError("another process could not write", where="several processes")
        return value

    # -- what all found ------------------------------------------------------------------------------

    def any(self, mine: bool) -> bool:
        self._meet()
        return bool(self.highest(int(mine)))

    def highest(self, mine: int) -> int:
        """Return the highest of all processes' numbers; those that wait for this one are not waited for first."""
        flag = torch.tensor([mine])
        with linked():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag.item())

    def add_gradients(self, parameters: Sequence[Tensor], numbers: Mapping[str, float]) -> Mapping[str, float]:
        """A parameter has a gradient afterwards where it has one in any process."""
        there = [p.grad is not None for p in parameters]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        names = [f"\0{i}" for i in range(len(parameters))]
        marks = dict(zip(names, map(float, there), strict=True))
        found = self.add([p.grad for p in parameters if p.grad is not None], {**numbers, **marks})
        for p, name in zip(parameters, names, strict=True):
            if not found[name]:
                p.grad = None
        return {name: found[name] for name in numbers}

    def add(self, tensors: Sequence[Tensor], numbers: Mapping[str, float]) -> Mapping[str, float]:
        """One message: everything in one row of fp32."""
        self._meet()
        device = tensors[0].device if tensors else None
        told = torch.tensor(list(numbers.values()), dtype=torch.float32, device=device)
        flat = torch.cat([told, *(t.detach().reshape(-1).float() for t in tensors)])
        with linked():
            dist.all_reduce(flat)
        sums, *parts = torch.split(flat, [len(numbers), *(t.numel() for t in tensors)])
        for t, part in zip(tensors, parts, strict=True):
            t.copy_(part.view_as(t))
        return dict(zip(numbers, sums.tolist(), strict=True))

    def whole(self, parts: Sequence[Tensor], likes: Sequence[Any]) -> Iterator[Tensor]:
        self._meet()
        for mine, like in zip(parts, likes, strict=True):
            if in_shards(like):
                with linked():
                    mine = joined_parts(mine, like)
            yield mine

    def over_parts(self, numbers: Sequence[float], likes: Sequence[Any]) -> list[float]:
        found = {str(i): number for i, number in enumerate(numbers) if in_shards(likes[i])}
        if not found:
            return [*numbers]
        sums = self.add([], found)
        return [sums.get(str(i), number) for i, number in enumerate(numbers)]

    def copy(self, tensors: Iterable[Tensor]) -> None:
        self._meet()
        for t in tensors:
            whole = t.detach().contiguous()
            with linked(), torch.no_grad():
                dist.broadcast(whole.reshape(-1).view(torch.uint8), 0)
                if whole.data_ptr() != t.data_ptr():
                    t.copy_(whole)

    def draw_apart(self, seed: int, step: int) -> None:
        if not self.main:
            torch.manual_seed((seed + 1_000_003 * (step + 1) + self.number) % 2**63)

    def check_same(self, facts: Callable[[], Mapping[str, object]]) -> None:
        mine = {name: str(value) for name, value in facts().items()}
        told = [json.loads(data) for data in self._all_told(_packed(mine))]
        wrong = [
            f"{name}: {told[0].get(name, '')[:40]} in process 0, {other.get(name, '')[:40]} in process {number}"
            for name in dict.fromkeys([*told[0], *mine])
            for number, other in enumerate(told)
            if other.get(name) != told[0].get(name)
        ]
        if wrong:
            hint = "the same versions, model and files on every machine, and GPUs of one kind"
            message = "the processes were not started alike:\n  " + "\n  ".join(wrong)
            raise ConfigError(message, where="several processes", hint=hint)

    def asked_to_stop(self, mine: bool) -> bool:
        return self.any(mine)

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.any(False)

    # -- messages ------------------------------------------------------------------------------------

    def _meet(self) -> None:
        """Help those that still compute with a base in shards until all have come to the next message."""
        if self.shards is not None:
            self.shards.wait()

    def _told(self, data: bytes) -> bytes:
        self._meet()
        size = torch.tensor([len(data)])
        with linked():
            dist.broadcast(size, 0)
            row = _row(data, int(size.item()))
            dist.broadcast(row, 0)
        return row.numpy().tobytes()

    def _all_told(self, data: bytes) -> list[bytes]:
        self._meet()
        with linked():
            sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.count)]
            dist.all_gather(sizes, torch.tensor([len(data)]))
            most = max(int(size.item()) for size in sizes)
            rows = [torch.empty(most, dtype=torch.uint8) for _ in range(self.count)]
            dist.all_gather(rows, _row(data, most))
        return [row.numpy().tobytes()[: int(size.item())] for row, size in zip(rows, sizes, strict=True)]


def _packed(value: Any) -> bytes:
    return json.dumps(value, default=dataclasses.asdict).encode()


def _row(data: bytes, size: int) -> Tensor:
    row = torch.zeros(max(1, size), dtype=torch.uint8)
    if data:
        row[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return row[:size] if size else row[:0]


# -- beginning and end -----------------------------------------------------------------------------------


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that a launcher has started, and leave them at the end; alone without a launcher.

    A process that fails says so in the launcher's store, so that the others can tell what happened. Raises
    ConfigError, ProcessLostError.
    """
    count = process_count()
    if count == 1:
        yield ALONE
        return
    number = process_number()
    _connect(number, count)
    ranks = Group(number, count, number_here())
    try:
        with joined_as(ranks):
            yield ranks
            with contextlib.suppress(ProcessLostError):  # after Ctrl-C some are gone before others
                ranks.wait()  # a launcher ends all when the first ends with another code than 0
    except BaseException as error:
        if ranks.shards is not None and _is_lost_link(error):
            raise _lost() from error
        if not isinstance(error, ProcessLostError):
            _leave_word(number, error)
            if number == 0 and isinstance(error, Exception):
                _let_hear(count)
        raise
    dist.destroy_process_group()


def _connect(number: int, count: int) -> None:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or number >= count:
        hint = "start it by torchrun or accelerate launch"
        raise ConfigError(f"WORLD_SIZE is {count}, but {missing or 'RANK'} does not fit", where="launcher", hint=hint)
    here, backend = number_here(), "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
        if here < torch.cuda.device_count():
            torch.cuda.set_device(here)
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        hint = "is MASTER_ADDR:MASTER_PORT reachable from every machine, and free on the first?"
        raise ProcessLostError(
            f"the processes did not find each other: {first}", where="launcher", hint=hint
        ) from error


@contextlib.contextmanager
def linked() -> Iterator[None]:
    """Name a lost connection. Raises ProcessLostError."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise _lost() from error


def _is_lost_link(error: BaseException) -> bool:
    """Return whether torch's own messages, with which weights are gathered, have found another process gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _lost() -> ProcessLostError:
    """Return the error that says which process ended, and how, where it has left word."""
    hint = "its own message tells more; the same command continues from what was kept, forget's with --resume"
    for number in range(process_count()):
        if number != process_number() and (word := _word_of(number)):
            said = ProcessLostError(f"process {number} has ended: {word}", where="several processes", hint=hint)
            said.told = number == 0
            with contextlib.suppress(RuntimeError):
                store().add(_HEARD, 1)
            return said
    return ProcessLostError("a process of this run is gone", where="several processes", hint=hint)


def store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _leave_word(number: int, error: BaseException) -> None:
    first = str(error).splitlines()[0][:200] if isinstance(error, QunlearnError) else type(error).__name__
    with contextlib.suppress(Exception):
        store().set(f"{_ENDED}{number}", first)


def _let_hear(count: int) -> None:
    """Keep the store, which lives in this process where no launcher holds it, until the others have read the word."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    kept, until = store(), time.monotonic() + _HEARD_WITHIN_S
    dist.destroy_process_group()  # they notice by the closed connection
    with contextlib.suppress(RuntimeError):
        while kept.add(_HEARD, 0) < count - 1 and time.monotonic() < until:
            time.sleep(0.05)


def _word_of(number: int) -> str:
    with contextlib.suppress(Exception):
        if store().check([f"{_ENDED}{number}"]):
            return str(store().get(f"{_ENDED}{number}").decode())
    return ""
