"""The queue of one process, and of several whose store is in this one's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from qunlearn.errors import ProcessLostError
from qunlearn.parallel import queue as queues
from qunlearn.parallel.group import Group
from qunlearn.parallel.queue import Queue, SharedQueue, queue_of, work_through
from qunlearn.parallel.ranks import ALONE, current, is_joined, joined_as


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.HashStore]:
    """A store for queues that are all this process's."""
    made = dist.HashStore()
    monkeypatch.setattr(queues, "store", lambda: made)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    yield made


def two(count: int, monkeypatch: pytest.MonkeyPatch) -> list[SharedQueue]:
    """The same queue as two processes have it."""
    made = []
    for _ in range(2):
        monkeypatch.setattr(queues, "_numbers", iter([7]))
        made.append(SharedQueue(count))
    return made


def test_one_process_has_all_in_turn() -> None:
    seen: list[tuple[str, int]] = []
    work_through(["a", "b", "c"], lambda item: len(seen), lambda item, found: seen.append((item, found)))
    assert seen == [("a", 0), ("b", 1), ("c", 2)]
    assert type(queue_of(3)) is Queue


def test_after_a_ctrl_c_what_is_there_is_told() -> None:
    told: list[str] = []

    def stopped(item: str) -> None:
        if item == "b":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work_through(["a", "b", "c"], stopped, lambda item, _: told.append(item))
    assert told == ["a"]


def test_each_item_is_taken_once_by_whoever_is_free(store: dist.HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = two(5, monkeypatch)
    ours, theirs = iter(one), iter(other)
    assert [next(ours), next(theirs), next(theirs), next(theirs)] == [0, 1, 2, 3]
    one.hand_in(0, {"x": 1.1})
    other.hand_in(2, None)
    assert one.news() == other.news() == [(0, {"x": 1.1}), (2, None)]
    other.hand_in(1, "late")
    assert one.news() == [(1, "late")] and one.news() == []
    assert [*ours] == [4] and [*theirs] == []


def test_who_stops_stops_all(store: dist.HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between steps of what they are at, and before they take something else; an error does the same."""
    one, other = two(5, monkeypatch)
    ours, theirs = iter(one), iter(other)
    assert (next(ours), next(theirs)) == (0, 1)
    with other.working():
        assert is_joined() and current().count == 1 and not current().asked_to_stop(mine=False)
        assert current().asked_to_stop(mine=True)
        with contextlib.suppress(ValueError), one:
            raise ValueError
        monkeypatch.setattr(queues, "_ASKED_EVERY_S", 0.0)
        assert current().asked_to_stop(mine=False)
    assert [*theirs] == [*ours] == []
    assert not ALONE.asked_to_stop(mine=False) and not is_joined()


def test_a_store_that_has_gone_is_a_lost_process(store: dist.HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> dist.HashStore:
        raise RuntimeError("connection reset")

    one, _ = two(5, monkeypatch)
    monkeypatch.setattr(queues, "store", gone)
    assert not one.stopped(at_once=True)  # what was begun is finished
    for act in (lambda: next(iter(one)), lambda: one.hand_in(0, 1), one.news):
        with pytest.raises(ProcessLostError):
            act()


@pytest.mark.parametrize("count", [1, 3])
def test_a_share_is_every_nth(count: int) -> None:
    shares = [[*(Group(n, count, n) if count > 1 else ALONE).share(range(7))] for n in range(count)]
    assert sorted(i for share in shares for i in share) == [*range(7)]
    assert shares[0] == [*range(0, 7, count)]


def test_inside_of_a_group_one_works_alone() -> None:
    with joined_as(Group(1, 3, 1)):
        assert is_joined() and current().count == 3
        with joined_as(ALONE):
            assert is_joined() and current() is ALONE
