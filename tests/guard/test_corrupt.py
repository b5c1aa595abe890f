"""The corruption functions against their formulas, and what holds for all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qunlearn.errors import GuardError
from qunlearn.guard.corrupt import CORRUPTIONS, Corruption, noise_seed
from qunlearn.guard.request import FUNCTIONS

IDS = [5, 9, 2, 7, 1]


def embeddings() -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def test_noise_on_the_first_dimensions_is_the_published_formula_with_the_same_noise() -> None:
    e, k, sigma = embeddings(), 3, 50.0
    rng = torch.Generator().manual_seed(noise_seed(4, IDS))
    noise = torch.randn(4, k, generator=rng).double().numpy()
    expected = e.double().numpy().copy()
    expected[:4, :k] += sigma * noise
    made = Corruption("noise-first", sigma, k, 4).apply(e, range(4), IDS)
    np.testing.assert_allclose(made.double().numpy(), expected, rtol=1e-6)


def test_zeroing_and_flipping_take_each_tokens_largest_dimensions() -> None:
    e = embeddings()
    zeroed = Corruption("zero-top", 1.0, 2).apply(e, range(5), IDS)
    flipped = Corruption("flip-top", 1.0, 2).apply(e, range(5), IDS)
    for t in range(5):
        largest = np.argsort(-np.abs(e[t].numpy()))[:2]
        assert (zeroed[t, largest] == 0).all() and (zeroed[t] != 0).sum() == 6
        assert torch.equal(flipped[t, largest], -e[t, largest])


def test_order_is_changed_and_nothing_else() -> None:
    e = embeddings()
    assert torch.equal(Corruption("reverse-order").apply(e, range(4), IDS)[:4], e[:4].flip(0))
    shuffled = Corruption("shuffle").apply(e, range(4), IDS)
    assert not torch.equal(shuffled, e)
    assert torch.equal(shuffled[:4].sort(0).values, e[:4].sort(0).values)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_function_repeats_itself_and_leaves_other_tokens_and_its_input(name: str) -> None:
    e = embeddings()
    before, corruption = e.clone(), Corruption(name, 3.0, 2)
    one, two = (corruption.apply(e, [0, 1, 3], IDS) for _ in range(2))
    assert torch.equal(one, two) and torch.equal(e, before)
    assert torch.equal(one[[2, 4]], e[[2, 4]]) and not torch.equal(one, e)


def test_noise_differs_by_prompt_and_seed() -> None:
    assert len({noise_seed(0, IDS), noise_seed(1, IDS), noise_seed(0, IDS[:-1])}) == 3


def test_what_fp16_cannot_hold_is_an_error() -> None:
    with pytest.raises(GuardError, match="overflows float16"):
        Corruption("noise-first", 1e6).apply(embeddings().half(), range(4), IDS)


def test_the_command_line_knows_every_row_of_the_table() -> None:
    assert set(FUNCTIONS) == set(CORRUPTIONS)
