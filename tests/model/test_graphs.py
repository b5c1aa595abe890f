"""Recorded passes: buckets of shapes, and gradients that are those of passes that were not recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qunlearn.data.batch import ALL, Batch, PrefixGroup, Row, collate
from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example
from qunlearn.model.kernels.buckets import bucketed, rounded_tokens
from qunlearn.model.kernels.graphs import Graphs
from qunlearn.model.policy import Policy

NOTHING = Record((), "", 0, {})


def example(first: int, length: int) -> Example:
    return Example(tuple(5 + (first * 7 + t) % 90 for t in range(length)), 1, length, 1, NOTHING)


def batch_of(lengths: Sequence[int], *, shared: bool = False) -> Batch:
    """Rows of these lengths end to end, the first two of them with a beginning in common."""
    if not shared:
        return collate([example(n, length) for n, length in enumerate(lengths)], ALL, 0, close_up=True, always=True)
    twins = [Example((*range(5, 11), 20 + n, 30 + n), 1, 8, 1, NOTHING) for n in range(2)]
    others = [example(n, length) for n, length in enumerate(lengths)]
    rows: list[Row] = [[PrefixGroup((0, 1), 6, 10)], *[[PrefixGroup((2 + n,), 0, x)] for n, x in enumerate(lengths)]]
    return collate([*twins, *others], ALL, 0, rows, close_up=True, always=True)


class Again:
    """In the place of a CUDA graph, where there is none: the same function again on the memory that was recorded."""

    def __init__(self, run: Callable[[Batch], Tensor], batch: Batch, parameters: Sequence[Tensor]) -> None:
        self.run, self.shape, self.parameters = run, batch.input_ids.shape, parameters
        self.passes = 0

    def forward(self, batch: Batch) -> Tensor:
        assert batch.input_ids.shape == self.shape
        self.passes += 1
        with torch.set_grad_enabled(bool(self.parameters)):
            self.hidden = self.run(batch)
        return self.hidden.detach()

    def backward(self, gradient: Tensor) -> None:
        found = torch.autograd.grad(self.hidden, list(self.parameters), gradient)
        for p, g in zip(self.parameters, found, strict=True):
            p.grad = g if p.grad is None else p.grad.add_(g)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("lengths", [(9, 9), (30, 4, 5), (70, 3), (17,) * 9])
def test_a_bucket_changes_no_hidden_state(new_policy: Callable[..., Policy], lengths: list[int], shared: bool) -> None:
    policy, batch = new_policy("none"), batch_of(lengths, shared=shared)
    padded = bucketed(batch, 0)
    layout = padded.layout
    assert layout is not None
    assert padded.input_ids.shape[1] == rounded_tokens(batch.input_ids.shape[1])
    assert len(layout.places.unique()) == len(layout.places)  # no place is written twice
    assert layout.tokens.flatten()[layout.places].tolist() == list(range(padded.input_ids.shape[1]))
    with torch.no_grad():
        theirs, ours = batch.pick(policy.hidden(batch)), padded.pick(policy.hidden(padded))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)


def test_buckets_are_few_and_waste_little() -> None:
    sizes = {rounded_tokens(n) for n in range(1, 4097)}
    assert len(sizes) <= 50
    assert all(n <= rounded_tokens(n) <= max(64, 1.125 * n + 1) for n in range(1, 4097))


def test_gradients_of_recorded_passes(new_policy: Callable[..., Policy]) -> None:
    """The second pass of a shape and all later ones are recorded, and add to the gradients what the first one adds."""
    policy = new_policy("none")
    for name, p in policy.trainable().items():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.05)
    made: list[Again] = []

    def record(*given: object) -> Again:
        made.append(Again(*given))  # type: ignore[arg-type]
        return made[-1]

    policy.model.train()
    batches = [bucketed(batch_of(lengths), 0) for lengths in ((9, 12), (10, 8), (60, 30))]

    def gradients() -> list[Tensor]:
        policy.model.zero_grad(set_to_none=True)
        for batch in (*batches, *batches):
            policy.hidden(batch).float().square().sum().backward()
        return [p.grad.clone() for p in policy.trainable().values() if p.grad is not None]

    wanted = gradients()
    policy.graphs = Graphs(list(policy.trainable().values()), record, pytest.fail)
    found = gradients()
    assert [again.passes for again in made] == [3, 1]  # the first two share a bucket
    assert len(found) == len(wanted) > 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert float((mine - theirs).norm()) <= 0.02 * float(theirs.norm())


def test_the_reference_is_recorded_apart(new_policy: Callable[..., Policy]) -> None:
    policy = new_policy("none")
    for p in policy.trainable().values():
        torch.nn.init.normal_(p, std=0.05)
    batch = bucketed(batch_of((9, 12)), 0)
    with policy.reference():
        wanted = policy.hidden(batch)
    made: list[Again] = []
    policy.graphs = Graphs([], lambda *given: made.append(Again(*given)) or made[-1], pytest.fail)  # type: ignore[func-returns-value]
    with policy.reference():
        for _ in range(3):
            torch.testing.assert_close(policy.hidden(batch), wanted)
    assert [again.passes for again in made] == [2]
    with policy.measured():  # neither of the two
        assert not torch.equal(policy.hidden(batch), wanted)


def test_what_cannot_be_recorded_runs_as_ever(new_policy: Callable[..., Policy]) -> None:
    policy, said = new_policy("none"), list[str]()
    batch = bucketed(batch_of((9, 12)), 0)

    def fails(*_: object) -> Again:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    policy.graphs = Graphs(list(policy.trainable().values()), fails, said.append)
    found = [policy.hidden(batch) for _ in range(4)]
    assert said == ["operation not permitted when stream is capturing"]  # once
    assert policy.graphs.off and all(torch.equal(h, found[0]) for h in found)


def test_a_batch_without_layout_has_no_bucket() -> None:
    batch = batch_of((9, 12))
    with pytest.raises(ValueError, match="layout"):
        bucketed(replace(batch, layout=None), 0)
