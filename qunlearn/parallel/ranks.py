"""The processes of a run as one object, which does nothing at all where there is one process.

Code that runs in every process asks `current()` for it: what share of the work is this one's, what the others found,
and whether any of them wants to stop. With one process each method hands back what it was given, so that neither bits
nor time nor memory change. The methods of several are in group.py; they must be called by all processes in the same
order, for each waits for the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
Read = Callable[[Any], T]  # makes a value from its JSON


class Rounds(Protocol):
    """Passes over a base in shards, which all processes take part in."""

    received: Callable[[int], None]  # told which sum of gradients a way back of others alone has left some for

    def wait(self) -> None:
        """Take part in the others' passes until no process has one to make."""

    def ready(self, place: int) -> None:
        """Announce a way back whose gradients are summed apart from those of other places."""


class Ranks:
    """One process: the main one, whose share is everything."""

    number = 0
    count = 1
    here = 0  # the same of those on this machine
    shards: Rounds | None = None  # where the base is in shards: what all take part in before they talk of anything else

    @property
    def main(self) -> bool:
        """Return whether this process prints, writes, locks and checkpoints: one does."""
        return self.number == 0

    def first(self, act: Callable[[], T]) -> T:
        """Act in the main process first, then in the others: what is fetched is fetched once."""
        return act()

    def first_here(self, act: Callable[[], T]) -> T:
        """The same on each machine: one process of each acts first."""
        return act()

    def from_main(self, compute: Callable[[], T], read: Read[T] | None = None) -> T:
        """Compute a value in the main process and tell it to the others, as JSON, from which `read` makes it again."""
        return compute()

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's share of items: what it has of them in `each`, and in `divided` without costs."""
        return items

    def each(self, items: Sequence[Any], compute: Callable[[Sequence[Any]], T], read: Read[T] | None = None) -> list[T]:
        """Compute a value of each process's share of the items; returns those of all processes that had any."""
        return [compute(items)]

    def divided(
        self,
        items: Sequence[Any],
        compute: Callable[[Sequence[Any]], list[T]],
        read: Read[T] | None = None,
        costs: Sequence[float] | None = None,
    ) -> list[T]:
        """Compute a value for each item, each process those of its share; returns all, in the order of the items.

        With `costs`, what each item costs, the shares cost about as much; without, each process has every nth.
        """
        return compute(items)

    def agreed(self, act: Callable[[], T]) -> T:
        """Act in every process, and return when all have; an OutputError in one of them is one in all."""
        return act()

    def any(self, mine: bool) -> bool:
        """Return whether any process says yes."""
        return mine

    def asked_to_stop(self, mine: bool) -> bool:
        """Return whether any process was asked to stop, asked between steps."""
        return mine

    def add_gradients(self, parameters: Sequence[Any], numbers: Mapping[str, float]) -> Mapping[str, float]:
        """Sum the parameters' gradients and the numbers over all processes; returns the sums of the numbers."""
        return numbers

    def add(self, tensors: Sequence[Any], numbers: Mapping[str, float]) -> Mapping[str, float]:
        """Sum tensors, in place, and numbers over all processes; returns the sums of the numbers."""
        return numbers

    def whole(self, parts: Sequence[Any], likes: Sequence[Any]) -> Iterator[Any]:
        """Put tensors together whose parts lie in all processes as those of `likes` do; others stay as they are."""
        return iter(parts)

    def over_parts(self, numbers: Sequence[float], likes: Sequence[Any]) -> list[float]:
        """Sum what each process has found in its parts of `likes`; what was found in whole tensors stays."""
        return [*numbers]

    def copy(self, tensors: Iterable[Any]) -> None:
        """Overwrite tensors with the main process's."""

    def draw_apart(self, seed: int, step: int) -> None:
        """Give the other processes random numbers of their own, which dropout draws; the main one keeps its."""

    def check_same(self, facts: Callable[[], Mapping[str, object]]) -> None:
        """Raises ConfigError where a process has another value of a fact than the main one."""


ALONE = Ranks()
_current: list[Ranks] = [ALONE]


def current() -> Ranks:
    """Return the processes of the run that this one belongs to."""
    return _current[-1]


def is_joined() -> bool:
    """Return whether the processes that were launched have joined already, or this one is alone for a while."""
    return len(_current) > 1


@contextlib.contextmanager
def joined_as(ranks: Ranks) -> Iterator[Ranks]:
    """Let `current()` answer with these while the block lasts."""
    _current.append(ranks)
    try:
        yield ranks
    finally:
        _current.pop()


def on_main(function: Callable[..., T]) -> Callable[..., T]:
    """Decorate a function whose result is JSON: the main process computes it for all, but inside a share of its own."""

    def told(*args: Any, **kwargs: Any) -> T:
        return current().from_main(lambda: function(*args, **kwargs))

    told.__name__, told.__doc__, told.__wrapped__ = function.__name__, function.__doc__, function  # type: ignore[attr-defined]
    return told
