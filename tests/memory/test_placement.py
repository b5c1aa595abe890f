"""Placing a decoder over several GPUs: cases computed by hand, and what holds for any."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qunlearn.memory.placement import Demand, place

# Four blocks of 10, embeddings of 5, a head of 7 that works with 6; a block works with 4; 2 on every GPU in use.
SMALL = Demand(blocks=(10, 10, 10, 10), first=5, last=7, working=4, head_working=6, every=2)


def test_one_gpu_holds_all() -> None:
    # 2 + 5 + 7 + 40, and 6 of the head, which are more than a block's 4
    placed = place(SMALL, [60])
    assert placed.fits and placed.spans == ((0, 4),)
    assert placed.gpus[0].embeddings and placed.gpus[0].head and placed.gpus[0].needs_bytes == 60
    assert not place(SMALL, [59]).fits


def test_two_gpus() -> None:
    # 2 + 5 + 20 + 4 = 31 and 2 + 7 + 20 + 6 = 35
    placed = place(SMALL, [35, 35])
    assert placed.fits and placed.spans == ((0, 2), (2, 4))
    assert [gpu.needs_bytes for gpu in placed.gpus] == [31, 35]
    assert [(gpu.embeddings, gpu.head) for gpu in placed.gpus] == [(True, False), (False, True)]


def test_what_is_left_over_goes_to_the_host() -> None:
    # The first: 2 + 5 + 10 + 4 = 21, no second block in 30; the last: 2 + 7 + 10 + 6 = 25.
    placed = place(SMALL, [30, 30])
    assert not placed.fits and placed.spans == ((0, 1), (1, 2)) and placed.host_blocks == (2, 4)
    assert not placed.host_embeddings and not placed.host_head


def test_ends_without_room_go_to_the_host_as_well() -> None:
    placed = place(SMALL, [6, 14])  # the embeddings need 7, the head 15
    assert placed.host_embeddings and placed.host_head and placed.host_blocks == (0, 4)
    assert not any(gpu.used or gpu.needs_bytes for gpu in placed.gpus)


def test_gpus_of_different_size_have_the_same_room_to_spare() -> None:
    # 2 + 5 + 30 + 4 = 41 of 46, 2 + 7 + 10 + 6 = 25 of 30: five are free on each
    placed = place(SMALL, [46, 30])
    assert placed.spans == ((0, 3), (3, 4))
    assert [gpu.limit_bytes - gpu.needs_bytes for gpu in placed.gpus] == [5, 5]


def test_more_gpus_than_blocks() -> None:
    placed = place(SMALL, [100] * 8)
    assert placed.fits and placed.gpus[0].embeddings and placed.gpus[7].head
    assert sorted(b for start, stop in placed.spans for b in range(start, stop)) == [0, 1, 2, 3]


def test_no_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="no GPUs"):
        place(SMALL, [])


size = st.integers(1, 30)
demands = st.builds(
    Demand,
    blocks=st.lists(size, min_size=1, max_size=7).map(tuple),
    first=st.integers(0, 30),
    last=size,
    working=size,
    head_working=size,
    every=size,
)
gpus = st.lists(st.integers(0, 120), min_size=1, max_size=4)


def needs(demand: Demand, spans: list[tuple[int, int]]) -> list[int]:
    """What each GPU needs, counted anew, with all ends in their places."""
    found = []
    for i, (start, stop) in enumerate(spans):
        first, last, blocks = i == 0, i == len(spans) - 1, demand.blocks[start:stop]
        if not (first or last or blocks):
            found.append(0)
            continue
        most = max(demand.working if blocks else 0, demand.head_working if last else 0)
        found.append(demand.every + first * demand.first + last * demand.last + sum(blocks) + most)
    return found


def all_spans(blocks: int, gpus: int) -> list[list[tuple[int, int]]]:
    """Every way to cut so many blocks, in their order, into so many parts."""
    cuts = itertools.combinations_with_replacement(range(blocks + 1), gpus - 1)
    return [list(itertools.pairwise((0, *cut, blocks))) for cut in cuts]


@settings(max_examples=300, deadline=None)
@given(demands, gpus)
def test_no_gpu_is_over_its_limit_and_everything_is_placed_once_in_order(demand: Demand, limits: list[int]) -> None:
    placed = place(demand, limits)
    assert all(gpu.needs_bytes <= gpu.limit_bytes for gpu in placed.gpus)
    spans = [*placed.spans, placed.host_blocks]
    assert [b for start, stop in spans for b in range(start, stop)] == list(range(len(demand.blocks)))
    assert [gpu.embeddings for gpu in placed.gpus].count(True) + placed.host_embeddings == 1
    assert [gpu.head for gpu in placed.gpus].count(True) + placed.host_head == 1
    assert not any(gpu.embeddings for gpu in placed.gpus[1:]) and not any(gpu.head for gpu in placed.gpus[:-1])


@settings(max_examples=300, deadline=None)
@given(demands, gpus)
def test_it_fits_where_any_cut_does_and_leaves_the_fullest_gpu_most_room(demand: Demand, limits: list[int]) -> None:
    placed = place(demand, limits)
    spare = {
        tuple(spans): min(limit - need for limit, need in zip(limits, needs(demand, spans), strict=True) if need)
        for spans in all_spans(len(demand.blocks), len(limits))
    }
    best = max(spare.values())
    assert placed.fits == (best >= 0)
    if placed.fits:
        assert [gpu.needs_bytes for gpu in placed.gpus] == needs(demand, list(placed.spans))
        assert spare[placed.spans] == best
