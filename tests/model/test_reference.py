"""The untouched model's states: cached ones are the live ones, whatever happens to the file."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_batch import ragged

from qunlearn.data.batch import ALL, ANSWER
from qunlearn.data.tokenize import Example
from qunlearn.errors import OutputError
from qunlearn.evaluation import scores
from qunlearn.model import reference as module
from qunlearn.model.head import Head, token_logps
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Cached, Live, cache_path

MakePolicy = Callable[..., Policy]


@pytest.fixture
def policy(new_policy: MakePolicy) -> Policy:
    made = new_policy("nf4")
    with torch.no_grad():  # an adapter that does something: the reference must not
        for name, p in made.trainable().items():
            if ".lora_B." in name:
                p.fill_(0.02)
    return made


@pytest.fixture
def examples() -> list[Example]:
    return ragged(12, seed=4)[0]


def test_live_is_the_base_and_cached_is_live(policy: Policy, examples: list[Example], tmp_path: Path) -> None:
    live = Live(policy, 200)
    spans = [(ALL, ANSWER)[i % 2] for i in range(len(examples))]
    cached = Cached(tmp_path / "c.safetensors", live, examples)
    for i, (a, b) in enumerate(zip(live.states(examples, spans), cached.states(examples, spans), strict=True)):
        first, last = spans[i].of(examples[i])
        with policy.model.disable_adapter(), torch.no_grad():
            ids = torch.tensor([examples[i].input_ids])
            expected = policy.base.model.model(input_ids=ids).last_hidden_state[0, first - 1 : last - 1]
        torch.testing.assert_close(a, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(b, expected, rtol=2e-2, atol=2e-2)


def test_states_of_one_pass_are_held_to_score_answers(
    policy: Policy, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of 256 long windows were on the GPU together, twice over: gigabytes of a 7B model's."""
    states, held = [], []

    def heard(h: torch.Tensor, labels: torch.Tensor, head: Head) -> torch.Tensor:
        states.append(weakref.ref(h))
        held.append(sum(len(there) for ref in states if (there := ref()) is not None))
        return token_logps(h, labels, head)

    monkeypatch.setattr(scores, "token_logps", heard)
    found = scores.answer_logps(policy, examples, 200)
    assert len(held) > 1 and max(held) < sum(e.end - e.start for e in examples)
    whole = torch.cat(Live(policy, 200).states(examples, [ANSWER] * len(examples)))
    labels = torch.tensor([token for e in examples for token in e.input_ids[e.start : e.end]])
    torch.testing.assert_close(torch.cat(found), token_logps(whole, labels, policy.head))


def test_the_file_is_private_safetensors_of_the_size_that_was_announced(
    policy: Policy, examples: list[Example], tmp_path: Path
) -> None:
    cached = Cached(tmp_path / "c.safetensors", Live(policy, 200), examples)
    assert cached.fill() == cached.tokens == sum(len(e.input_ids) - 1 for e in examples)
    tensors = load_file(cached.path)
    assert tensors["states"].shape == (cached.tokens, policy.hidden_size)
    assert cached.path.stat().st_size == cached.size_bytes
    assert cached.path.stat().st_mode & 0o777 == 0o600


def test_filling_goes_on_where_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, policy: Policy, examples: list[Example], tmp_path: Path
) -> None:
    whole = Cached(tmp_path / "whole.safetensors", Live(policy, 40), examples)
    whole.fill()
    calls = iter(range(100))
    real = Live.states

    def killed(self: Live, *args: object) -> object:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Live, "states", killed)
    part = Cached(tmp_path / "part.safetensors", Live(policy, 40), examples)
    with pytest.raises(KeyboardInterrupt):
        part.fill()
    monkeypatch.undo()
    rest = Cached(part.path, Live(policy, 40), examples).fill()
    assert 0 < rest < whole.tokens
    assert part.path.read_bytes() == whole.path.read_bytes()
    assert Cached(part.path, Live(policy, 40), examples).fill() == 0


def test_a_damaged_chunk_is_computed_again_and_a_strange_file_made_anew(
    policy: Policy, examples: list[Example], tmp_path: Path
) -> None:
    cached = Cached(tmp_path / "c.safetensors", Live(policy, 40), examples)
    cached.fill()
    good = cached.path.read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 0xFF
    cached.path.write_bytes(damaged)
    assert 0 < Cached(cached.path, Live(policy, 40), examples).fill() < cached.tokens
    assert cached.path.read_bytes() == good
    for strange in (good[:-9], b"x" * len(good), b""):
        cached.path.write_bytes(strange)
        assert Cached(cached.path, Live(policy, 40), examples).fill() == cached.tokens
        assert cached.path.read_bytes() == good


def test_a_short_disk_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, policy: Policy, examples: list[Example], tmp_path: Path
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="reference cache needs"):
        Cached(tmp_path / "c.safetensors", Live(policy, 40), examples).fill()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(policy: Policy, examples: list[Example], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="reference cache cannot be written") as caught:
        Cached(tmp_path / "file" / "sub" / "c.safetensors", Live(policy, 40), examples).check_disk()
    assert "QUNLEARN_CACHE" in str(caught.value.hint)


def test_without_a_home_there_is_no_folder(
    monkeypatch: pytest.MonkeyPatch, policy: Policy, examples: list[Example]
) -> None:
    for name in ("QUNLEARN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError()))
    with pytest.raises(OutputError, match="no home folder"):
        cache_path(policy, "a", examples, 64)


def test_files_of_long_ago_and_too_many_make_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every run left its file, for ever."""
    monkeypatch.setattr(module, "_KEPT_BYTES", 250)
    day_s, now = 24 * 3600, time.time()
    ages = {"used": 90, "new": 0, "week": 7, "older": 20, "month": 31}
    for name, days in ages.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(bytes(100))
        os.utime(path, (now - days * day_s,) * 2)
    (tmp_path / "other.txt").touch()
    assert module.prune(tmp_path / "used.safetensors") == 200
    assert {path.stem for path in tmp_path.iterdir()} == {"used", "new", "week", "other"}
    assert module.prune(tmp_path / "none" / "x.safetensors") == 0


def test_the_name_depends_on_model_and_data(policy: Policy, examples: list[Example]) -> None:
    names = {
        cache_path(policy, "a", examples, 64),
        cache_path(policy, "b", examples, 64),
        cache_path(policy, "a", examples[1:], 64),
    }
    assert len(names) == 3
    assert cache_path(policy, "a", list(reversed(examples)), 64) in names
