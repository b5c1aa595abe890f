"""Keep the gradients of a step apart by loss, and combine them along a common descent direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qunlearn.model.policy import Policy
from qunlearn.objectives.descent import common_descent
from qunlearn.parallel.parts import in_shards, part
from qunlearn.parallel.ranks import current


class Apart:
    """Each loss's gradient for itself: of all parameters, or of this process's part of those that are in shards."""

    def __init__(self, policy: Policy, names: Sequence[str]) -> None:
        self.policy, self.parameters = policy, list(policy.trainable().values())
        parts = policy.parts() if policy.in_shards else self.parameters
        self.sums = {name: [torch.zeros_like(mine) for mine in parts] for name in names}
        self._shards = current().shards if policy.in_shards else None
        if self._shards is not None:  # until the next step's: others go back while this process is done
            self._shards.received = self._take

    def push(self, losses: Mapping[str, Tensor]) -> None:
        """Add the gradients of a pass's losses."""
        for left, (name, loss) in zip(range(len(losses) - 1, -1, -1), losses.items(), strict=True):
            if self._shards is not None:
                place = [*self.sums].index(name)
                self._shards.ready(place)
                torch.autograd.backward(loss, retain_graph=left > 0)
                self._take(place)
                continue
            found = torch.autograd.grad(loss, self.parameters, retain_graph=left > 0, allow_unused=True)
            for kept, gradient in zip(self.sums[name], found, strict=True):
                if gradient is not None:
                    kept += gradient

    def _take(self, place: int) -> None:
        """Move what a way back has left in the parameters to the loss that it was for."""
        for kept, p in zip([*self.sums.values()][place], self.parameters, strict=True):
            if p.grad is not None:
                kept += part(p.grad)
                p.grad = None

    def unsummed(self) -> list[Tensor]:
        """Return what is still to be summed over processes: shards are when they come."""
        return [
            t for kept in self.sums.values() for t, p in zip(kept, self.parameters, strict=True) if not in_shards(p)
        ]

    def descend(self, met: Sequence[str]) -> dict[str, float]:
        """Set the step's gradient along the common descent direction; returns each loss's share.

        A loss that is met has no say. Its gradient vanishes, and scaled to length 1 as the others' it would be obeyed
        all the same: the step would go on away from the base with nothing left to forget.
        """
        for name in met:
            self.sums[name] = [torch.zeros_like(t) for t in self.sums[name]]
        total = None
        if self._shards is not None:
            self._shards.received = lambda place: None

            def total(numbers: Sequence[float]) -> float:
                return sum(current().over_parts(numbers, self.parameters))

        mixed, shares = common_descent(list(self.sums.values()), total)
        self.policy.set_gradients(mixed)
        return dict(zip(self.sums, shares, strict=True))
