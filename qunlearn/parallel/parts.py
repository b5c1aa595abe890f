"""Tensors in shards over the processes: this process's part of each, and the whole; others are their own part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def in_shards(tensor: Any) -> bool:
    """Return whether each process holds a part of it alone: it is a DTensor then, whose module is not imported here."""
    return hasattr(tensor, "to_local")


def part(tensor: Any) -> Tensor:
    """Return this process's part of a tensor, in the same memory; it may be empty."""
    mine: Tensor = tensor.detach().to_local() if in_shards(tensor) else tensor
    return mine


def cut(whole: Tensor, like: Any) -> Tensor:
    """Return the part of a whole tensor that is this process's, where `like` is in shards; else the whole."""
    if not in_shards(like):
        return whole
    (placement,), number = like.placements, like.device_mesh.get_local_rank()
    chunks = torch.chunk(whole, like.device_mesh.size(), dim=placement.dim)
    return chunks[number] if number < len(chunks) else whole.narrow(placement.dim, 0, 0)


def joined_parts(mine: Tensor, like: Any) -> Tensor:
    """Put the parts of all processes together, of a tensor that is in shards as `like` is; all call it at once."""
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    made = DTensor.from_local(mine, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    whole: Tensor = made.full_tensor()
    return whole


def any_in_shards(tensors: Sequence[Any]) -> bool:
    return any(in_shards(t) for t in tensors)
