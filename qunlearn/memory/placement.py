"""Place a decoder over several GPUs: blocks in their order, embeddings on the first GPU, the output head on the last.

Numbers in, numbers out: what each part needs is counted in gpus.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Demand:
    """Bytes that the parts of a model need where they are placed.

    `blocks`: held for each decoder block throughout a step. `first`: the embeddings; `last`: the output head and what
    it is given. `working`: beside them wherever a block is computed; `head_working`: where the head is, not at the
    same time. `every`: on any GPU in use (CUDA context, workspace, masks).
    """

    blocks: tuple[int, ...]
    first: int
    last: int
    working: int
    head_working: int
    every: int


@dataclass(frozen=True)
class GpuShare:
    """The part of a model on one GPU: blocks from `start` up to but not including `stop`, embeddings, output head."""

    start: int
    stop: int
    embeddings: bool
    head: bool
    needs_bytes: int
    limit_bytes: int

    @property
    def used(self) -> bool:
        return self.stop > self.start or self.embeddings or self.head


@dataclass(frozen=True)
class Placement:
    """Where everything is: a share for each GPU, and what is left over for the host's memory, which comes last."""

    gpus: tuple[GpuShare, ...]
    host_blocks: tuple[int, int]
    host_embeddings: bool
    host_head: bool

    @property
    def fits(self) -> bool:
        """Return whether the GPUs hold everything."""
        return self.host_blocks[0] == self.host_blocks[1] and not self.host_embeddings and not self.host_head

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The blocks of each GPU: from, up to but not including."""
        return tuple((gpu.start, gpu.stop) for gpu in self.gpus)


def place(demand: Demand, limits: Sequence[int]) -> Placement:
    """Place a model over GPUs of so many bytes each, in order.

    Where everything fits, the GPU with the least room to spare has as much of it as any placement could leave it.
    Where it does not, the GPUs are filled from the first on and the last blocks are left over.
    """
    if not limits:
        raise ValueError("no GPUs")
    spans = _filled(demand, limits, 0)
    if spans is None:
        return _overfull(demand, limits)
    low, high = 0, max(limits)
    while high - low > 1:  # spare bytes on every GPU: possible with `low`, taken not to be with `high`
        middle = (low + high) // 2
        found = _filled(demand, limits, middle)
        if found is None:
            high = middle
        else:
            low, spans = middle, found
    return _placement(demand, limits, spans, embeddings=True, head=True)


def needed_bytes(demand: Demand, blocks: Sequence[int], *, embeddings: bool, head: bool) -> int:
    """Bytes of a GPU with these blocks (their sizes) and ends; 0 for one that is not used."""
    if not (blocks or embeddings or head):
        return 0
    ends = (demand.first if embeddings else 0) + (demand.last if head else 0)
    working = max(demand.working if blocks else 0, demand.head_working if head else 0)
    return demand.every + ends + sum(blocks) + working


def _filled(demand: Demand, limits: Sequence[int], spare: int) -> list[tuple[int, int]] | None:
    """The blocks of each GPU where each takes as many as it can while `spare` bytes stay free; None where some are
    left over, or an end finds no room."""
    spans, at = [], 0
    for i, limit in enumerate(limits):
        ends = {"embeddings": i == 0, "head": i == len(limits) - 1}
        start, at = at, _most(demand, at, limit - spare, **ends)
        if needed_bytes(demand, demand.blocks[start:at], **ends) > max(0, limit - spare):
            return None
        spans.append((start, at))
    return spans if at == len(demand.blocks) else None


def _most(demand: Demand, start: int, room: int, *, embeddings: bool, head: bool) -> int:
    """The block up to which a GPU of this room takes them."""
    held = needed_bytes(demand, demand.blocks[start : start + 1], embeddings=embeddings, head=head)
    stop = start
    while stop < len(demand.blocks) and held <= room:
        stop += 1
        held += demand.blocks[stop] if stop < len(demand.blocks) else 0
    return stop


def _overfull(demand: Demand, limits: Sequence[int]) -> Placement:
    """What the GPUs take of a model that does not fit: an end where there is room for it, then blocks from the first
    GPU on."""
    last = len(limits) - 1
    head = needed_bytes(demand, (), embeddings=False, head=True) <= limits[last]
    alone = last == 0 and head
    embeddings = needed_bytes(demand, (), embeddings=True, head=alone) <= limits[0]
    spans, at = [], 0
    for i, limit in enumerate(limits):
        start, at = at, _most(demand, at, limit, embeddings=embeddings and i == 0, head=head and i == last)
        spans.append((start, at))
    return _placement(demand, limits, spans, embeddings=embeddings, head=head)


def _placement(
    demand: Demand, limits: Sequence[int], spans: Sequence[tuple[int, int]], *, embeddings: bool, head: bool
) -> Placement:
    gpus = []
    for i, ((start, stop), limit) in enumerate(zip(spans, limits, strict=True)):
        ends = {"embeddings": embeddings and i == 0, "head": head and i == len(limits) - 1}
        needs = needed_bytes(demand, demand.blocks[start:stop], **ends)
        gpus.append(GpuShare(start, stop, needs_bytes=needs, limit_bytes=limit, **ends))
    left = (spans[-1][1], len(demand.blocks))
    return Placement(tuple(gpus), left, not embeddings, not head)
