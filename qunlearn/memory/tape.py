"""Simulate autograd's tape in numbers: how much memory a computation needs, with or without checkpointing.

A tape lists operations in the order they run: what each makes, what it keeps for its backward pass, what it needs on
the side. Playing it forward and backward tells the most bytes that are ever alive at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

Value = int  # an index into Tape.sizes


@dataclass(frozen=True)
class Op:
    """One operation. Sizes in bytes; `kept` are values, `kept_aside` what is kept and is no value (masks, statistics).

    `passes`: the gradient of each input is the output's own, no new tensor. `solid`: the gradient it makes can be
    added to in place; that of a matrix product, which autograd sees through a view, cannot.
    """

    inputs: tuple[Value, ...]
    output: Value
    kept: frozenset[Value]
    kept_aside: int
    forward: int
    backward: int
    passes: bool
    solid: bool


@dataclass(frozen=True)
class Peak:
    """Bytes beyond what was there before. `kept`: for the backward pass; `most`: at the worst moment of it."""

    kept: int
    most: int


class Tape:
    """Operations in order. Values that are given (inputs of the stretch) cost nothing and are never freed."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.stored: list[int] = []  # of a view nothing
        self.ops: list[Op] = []
        self._owner: dict[Value, Value] = {}
        self._given: set[Value] = set()
        self._last_use: dict[Value, int] = {}

    def given(self, size: float) -> Value:
        self._given.add(len(self.sizes))
        return self._new(size)

    def op(
        self,
        inputs: Iterable[Value],
        size: float,
        *,
        keeps: Iterable[Value] = (),
        keeps_output: bool = False,
        aside: float = 0,
        forward: float = 0,
        backward: float = 0,
        passes: bool = False,
        solid: bool = True,
        in_place: bool = False,
    ) -> Value:
        """Add an operation that makes a value of `size` bytes, or `in_place` of its first input; `forward` and
        `backward` are bytes on the side."""
        output, inputs = self._new(size), tuple(inputs)
        if in_place:
            self._share(output, inputs[0])
        kept = frozenset(self._owner.get(v, v) for v in ({*keeps, output} if keeps_output else keeps))
        self.ops.append(Op(inputs, output, kept, int(aside), int(forward), int(backward), passes, solid))
        self.hold(*inputs)
        return output

    def view(self, of: Value, size: float) -> Value:
        """A part of a value: no memory of its own, but its gradient has."""
        value = self.op([of], size)
        self._share(value, of)
        return value

    def hold(self, *values: Value) -> None:
        """Some variable names these values still: they are alive until here."""
        for value in values:
            self._last_use[self._owner.get(value, value)] = len(self.ops) - 1

    def _share(self, value: Value, of: Value) -> None:
        self.stored[value] = 0
        self._owner[value] = self._owner.get(of, of)

    def _new(self, size: float) -> Value:
        self.sizes.append(int(size))
        self.stored.append(int(size))
        return len(self.sizes) - 1

    # -- playing -------------------------------------------------------------------------------------

    def checkpointed(self) -> Peak:
        """The backward pass of the stretch, which begins by computing it again."""
        return _Backward(self).play(recompute=True)

    def remembered(self) -> Peak:
        """The backward pass with everything kept from the forward pass."""
        return _Backward(self).play(recompute=False)

    def recomputed(self) -> int:
        """Most bytes alive while it is computed again; that ends where the last thing to be kept is there."""
        end = max((i for i, op in enumerate(self.ops) if op.kept or op.kept_aside), default=-1)
        if end >= 0 and not self.ops[end].kept_aside and self.ops[end].output not in self.ops[end].kept:
            end -= 1  # what an operation keeps of its inputs it keeps before it runs
        return self._forward(self.ops[: end + 1], keep=True)

    def passing(self) -> int:
        """Most bytes alive in a forward pass that keeps nothing."""
        return self._forward(self.ops, keep=False)

    def _forward(self, ops: list[Op], *, keep: bool) -> int:
        kept, live, most = set(self._given), 0, 0
        for i, op in enumerate(ops):
            live += self.stored[op.output] + (op.kept_aside if keep else 0)
            most = max(most, live + op.forward + (0 if keep else op.kept_aside))
            if keep:
                kept |= op.kept
            ending = {v for v, last in self._last_use.items() if last == i} - kept
            live -= sum(self.stored[v] for v in ending)
        return most


class _Backward:
    """One play of the backward pass: which gradients and kept values are alive."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.live = self.most = 0
        self.keepers = Counter(v for op in tape.ops for v in op.kept if v not in tape._given)
        self.gradients: dict[Value, int] = {}  # value -> buffer
        self.buffers: list[tuple[int, bool]] = []  # size, solid
        self.holders: Counter[int] = Counter()

    def play(self, *, recompute: bool) -> Peak:
        ops, sizes = self.tape.ops, self.tape.sizes
        kept = sum(self.tape.stored[v] for v in self.keepers) + sum(op.kept_aside for op in ops)
        self.gradients[ops[-1].output] = self._buffer(sizes[ops[-1].output], True)
        there = not recompute
        if there:
            self.live += kept
        for op in reversed(ops):
            if not there and (op.kept or op.kept_aside):
                self._mark(self.tape.recomputed())
                self.live += kept
                there = True
            self._step(op)
        return Peak(kept, self.most)

    def _step(self, op: Op) -> None:
        sizes, arriving = self.tape.sizes, self.gradients.pop(op.output)
        made = []
        for value in op.inputs:
            if op.passes:
                self.holders[arriving] += 1
            made.append((value, arriving if op.passes else self._buffer(sizes[value], op.solid)))
        self._mark(op.backward)
        self._drop(arriving)
        self.live -= op.kept_aside
        for value in op.kept:
            self.keepers[value] -= 1
            if self.keepers[value] == 0:
                self.live -= self.tape.stored[value]
        for value, buffer in made:
            self._accumulate(value, buffer)

    def _accumulate(self, value: Value, buffer: int) -> None:
        old = self.gradients.get(value)
        if old is None:
            self.gradients[value] = buffer
        elif self.holders[old] == 1 and self.buffers[old][1]:
            self._drop(buffer)
        else:
            self.gradients[value] = self._buffer(self.tape.sizes[value], True)
            self._mark()
            self._drop(old)
            self._drop(buffer)

    def _buffer(self, size: int, solid: bool) -> int:
        self.buffers.append((size, solid))
        self.live += size
        self.holders[len(self.buffers) - 1] = 1
        return len(self.buffers) - 1

    def _drop(self, buffer: int) -> None:
        self.holders[buffer] -= 1
        if self.holders[buffer] == 0:
            self.live -= self.buffers[buffer][0]

    def _mark(self, aside: int = 0) -> None:
        self.most = max(self.most, self.live + aside)
