"""Which process makes which pass of a step, and that one process is left alone."""

from __future__ import annotations

import json
import random

import pytest
import torch

from qunlearn.data.batch import PrefixGroup, micro_batches
from qunlearn.errors import ConfigError, DeviceError
from qunlearn.model.device import choose_device
from qunlearn.parallel.division import cost, loads, my_share, shares
from qunlearn.parallel.group import Group
from qunlearn.parallel.ranks import ALONE, Ranks, current, joined_as, on_main
from qunlearn.utils.launch import number_here, process_count


class Numbered(Ranks):
    """A process that talks to none."""

    def __init__(self, number: int, count: int) -> None:
        self.number, self.count = number, count


def step(seed: int, rows: int) -> list[PrefixGroup]:
    rng = random.Random(seed)
    return [PrefixGroup((i,), 0, rng.randint(10, 90)) for i in range(rows)]


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_in_one_share_and_none_has_much_more_to_do(seed: int, count: int) -> None:
    made = step(seed, 40)

    def passes_of(most: int) -> list[list[list[PrefixGroup]]]:
        return micro_batches(made, most, pack=True)

    found = []
    for number in range(count):
        with joined_as(Numbered(number, count)):
            found.append(my_share(made, 600, passes_of))
    assert sorted(group.members for share in found for one in share for row in one for group in row) == [
        (i,) for i in range(40)
    ]
    assert all(cost(one) <= 600 + 64 for share in found for one in share)
    done = [sum(map(cost, share)) for share in found]
    assert max(done) <= 1.35 * sum(group.length for group in made) / count + 2 * 64
    assert current() is ALONE and my_share(made, 600, passes_of) == passes_of(600)


def test_a_step_of_fewer_rows_than_processes() -> None:
    made = step(0, 2)
    found = []
    for number in range(3):
        with joined_as(Numbered(number, 3)):
            found.append(my_share(made, 600, lambda most: micro_batches(made, most, pack=True)))
    assert sorted(map(len, found)) == [0, 1, 1]


def test_the_longest_goes_to_whoever_has_least() -> None:
    assert shares([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]
    assert loads([[[PrefixGroup((0,), 0, 10)]]], 2) == [74, 0]


def test_what_the_main_process_computes() -> None:
    @on_main
    def f(x: int) -> int:
        """Doc."""
        return 2 * x

    assert (f(4), f.__name__, f.__doc__) == (8, "f", "Doc.")


def test_what_a_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (process_count(), number_here()) == (1, 0)  # left over from elsewhere
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (process_count(), number_here()) == (4, 3)
    with pytest.raises(DeviceError, match="4 processes cannot share cuda:1"):
        choose_device("cuda:1")
    for wrong in ("0", "-1", "two"):
        monkeypatch.setenv("WORLD_SIZE", wrong)
        with pytest.raises(ConfigError) as caught:
            process_count()
        assert caught.value.where == "WORLD_SIZE"


def test_processes_that_were_started_otherwise_are_named() -> None:
    """A file of another content on another machine would have the processes draw other steps."""

    class Told(Group):
        def _all_told(self, data: bytes) -> list[bytes]:
            other = {**json.loads(data), "the bad file": "sha256 b", "lora.r": "8"}
            return [data, data, json.dumps(other).encode()]

    group = Told(0, 3, 0)
    with pytest.raises(ConfigError) as caught:
        group.check_same(lambda: {"the bad file": "sha256 a", "lora.r": 16, "dtype": "fp32"})
    assert "the bad file: sha256 a in process 0, sha256 b in process 2" in str(caught.value)
    assert "lora.r: 16 in process 0, 8 in process 2" in str(caught.value)
    assert "dtype" not in str(caught.value) and "process 1" not in str(caught.value)


def test_one_process_is_left_alone() -> None:
    """What it hands in it gets back, itself; nothing is sent."""
    rows, numbers, parameter = [1, 2], {"kl": 1.0}, torch.zeros(2, requires_grad=True)
    assert ALONE.divided(rows, lambda given: given) is rows
    assert ALONE.each(rows, lambda given: given) == [rows]
    assert ALONE.add_gradients([parameter], numbers) is numbers and parameter.grad is None
    assert ALONE.add([parameter], numbers) is numbers and ALONE.main
    assert ALONE.first(lambda: 3) == ALONE.first_here(lambda: 3) == ALONE.from_main(lambda: 3) == 3
    assert ALONE.any(True) and not ALONE.any(False)
    state = torch.get_rng_state()
    ALONE.draw_apart(0, 3)
    assert bool((torch.get_rng_state() == state).all())
