"""A queue of work, by number: of several processes whoever is free takes the next item, and works on it alone.

The counter and what comes of the items are in the launcher's store. All processes make the queue and wait at its end.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from qunlearn.errors import QunlearnError
from qunlearn.parallel.group import linked, store
from qunlearn.parallel.ranks import Ranks, current, joined_as

T = TypeVar("T")
_PATIENCE = timedelta(days=30)  # for the others' last items
_ASKED_EVERY_S, _HEARD_EVERY_S = 1.0, 0.05
_numbers = itertools.count()  # a store outlives a queue: each has keys of its own


class Queue:
    """So many items, for one process: all in turn. `hand_in` keeps what came of one, `news` has what is new of it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._new: list[tuple[int, Any]] = []

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Work on an item: `current()` is one process alone meanwhile."""
        yield

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the items that are this process's, one by one."""
        yield from range(self.count)

    def hand_in(self, item: int, value: Any) -> None:
        """Say what came of an item, as JSON."""
        self._new.append((item, value))

    def news(self) -> list[tuple[int, Any]]:
        """Return what came of items, this process's and others', that was not returned before."""
        new, self._new = self._new, []
        return new

    def stop(self) -> None:
        """Let no process take another item."""

    def wait(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Return when no process works any more; `meanwhile` is called again and again, and once at the end."""
        meanwhile()


class SharedQueue(Queue):
    """The same for several processes. Raises ProcessLostError where one of them has gone."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._name, self._left = f"qunlearn/queue/{next(_numbers)}/", [*range(count)]
        self._asked_at, self._stopped = 0.0, False
        with linked():
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:  # others would work for hours on what is not to be finished
            with contextlib.suppress(RuntimeError):
                self.stop()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        with joined_as(_Working(self)):
            yield

    def __iter__(self) -> Iterator[int]:
        while not self.stopped(at_once=True):
            with linked():
                item = store().add(f"{self._name}taken", 1) - 1
            if item >= self.count:
                return
            yield item

    def hand_in(self, item: int, value: Any) -> None:
        with linked():
            store().set(f"{self._name}{item}", json.dumps(value))

    def news(self) -> list[tuple[int, Any]]:
        with linked():
            there = [item for item in self._left if store().check([f"{self._name}{item}"])]
            new = [(item, json.loads(store().get(f"{self._name}{item}"))) for item in there]
        self._left = [item for item in self._left if item not in there]
        return new

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            with linked():
                store().set(f"{self._name}stop", "")

    def stopped(self, *, at_once: bool = False) -> bool:
        """Return whether a process said stop; asked every second unless `at_once`, for steps may be shorter."""
        now = time.monotonic()
        if not self._stopped and (at_once or now - self._asked_at >= _ASKED_EVERY_S):
            self._asked_at = now
            with contextlib.suppress(RuntimeError):  # one that is lost keeps nobody from ending what it has begun
                self._stopped = store().check([f"{self._name}stop"])
        return self._stopped

    def wait(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Signals are handled while it waits: it does not wait in a message."""
        with linked():
            met = dist.barrier(group=self._group, async_op=True)
        while not met.is_completed():
            meanwhile()
            time.sleep(_HEARD_EVERY_S)
        with linked():
            met.wait()
        meanwhile()


class _Working(Ranks):
    """One process alone, which hears between steps that the queue is to stop."""

    def __init__(self, queue: SharedQueue) -> None:
        self._queue = queue

    def asked_to_stop(self, mine: bool) -> bool:
        return mine or self._queue.stopped()


def queue_of(count: int) -> Queue:
    """Return a queue of so many items for the processes that `current()` are."""
    return SharedQueue(count) if current().count > 1 else Queue(count)


def work_through(items: Sequence[T], work: Callable[[T], Any], hear: Callable[[T, Any], None]) -> None:
    """Work on all items, each in one process; every process hears what came of each, as JSON, as soon as it is known.

    Returns when all is done. After a Ctrl-C what is there is heard first.
    """
    with queue_of(len(items)) as queue:

        def tell() -> None:
            for number, value in queue.news():
                hear(items[number], value)

        try:
            for number in queue:
                with queue.working():
                    value = work(items[number])
                queue.hand_in(number, value)
                tell()
            queue.wait(tell)
        except KeyboardInterrupt:
            with contextlib.suppress(QunlearnError):
                tell()
            raise
