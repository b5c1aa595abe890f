"""Packing: examples share rows and a prompt is computed once, and nothing a loss sees depends on it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, OPTConfig

from qunlearn.data.batch import ALL, ANSWER, CLOSED, collate, micro_batches, prefix_groups
from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example
from qunlearn.model.kernels.attention import use_layouts
from qunlearn.model.load import Base, LoadSpec, load_base
from qunlearn.model.packing_check import Packing, packing_of
from qunlearn.model.policy import Policy

NOTHING = Record((), "", 0, {})


def example(*ids: int, start: int = 1) -> Example:
    return Example(ids, start, len(ids), start, NOTHING)


def ragged(n: int, seed: int = 0) -> tuple[list[Example], list[list[int]]]:
    """Groups of one to four examples with a common prompt."""
    rng = random.Random(seed)
    examples, groups = [], []
    for _ in range(n):
        prompt = [rng.randrange(4, 900) for _ in range(rng.randint(1, 12))]
        group = []
        for _ in range(rng.randint(1, 4)):
            group.append(len(examples))
            answer = [rng.randrange(4, 900) for _ in range(rng.randint(1, 9))]
            examples.append(example(*prompt, *answer, start=len(prompt)))
        groups.append(group)
    return examples, groups


def test_a_family_computes_what_is_common_once() -> None:
    examples = [example(1, 2, 3, 4), example(1, 2, 5), example(1, 2, 3, 6, 7)]
    (group,) = prefix_groups(examples, [[0, 1, 2]], 100)
    assert (group.shared, group.length) == (2, 2 + 2 + 1 + 3)
    assert list(group.offsets(examples)) == [(0, 2), (1, 4), (2, 5)]
    same = prefix_groups([examples[0], examples[0]], [[0, 1]], 100)
    assert [(f.members, f.length) for f in same] == [((0, 1), 4)]


def test_a_family_stays_within_the_budget_and_needs_something_in_common() -> None:
    examples = [example(1, 2, 3, 4, 5), example(1, 2, 6, 7, 8), example(9, 2, 3)]
    assert [f.members for f in prefix_groups(examples, [[0, 1, 2]], 100)] == [(0, 1), (2,)]
    assert [f.members for f in prefix_groups(examples, [[0, 1, 2]], 7)] == [(0,), (1,), (2,)]
    assert [f.members for f in prefix_groups(examples, [[0, 1, 2]], math.inf)] == [(0, 1, 2)]  # pairs stay pairs


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("max_tokens", [8, 60, 500])
def test_micro_batches_hold_every_example_once_within_the_budget(pack: bool, max_tokens: int) -> None:
    examples, groups = ragged(30)
    made = micro_batches(prefix_groups(examples, groups, max_tokens), max_tokens, pack=pack)
    members = [i for rows in made for row in rows for group in row for i in group.members]
    assert sorted(members) == list(range(len(examples)))
    widths = [max(sum(f.length for f in row) for row in rows) for rows in made]
    for rows, width in zip(made, widths, strict=True):
        assert width * len(rows) <= max_tokens or (len(rows) == 1 and len(rows[0]) == 1)
        assert width == rows[0][0].length  # the longest group decides: attention costs no more than without packing
        assert pack or all(len(row) == 1 for row in rows)
    assert widths[0] == max(widths)


def test_short_rows_fill_up_long_ones() -> None:
    """The shape of a step: a few long prefix_groups and as many short normal rows."""
    rng = random.Random(5)
    examples = [example(*range(rng.randint(100, 120))) for _ in range(4)]
    examples += [example(*range(rng.randint(15, 40))) for _ in range(12)]
    made = prefix_groups(examples, [[i] for i in range(16)], 2048)
    filled = []
    for pack in (True, False):
        batches = [collate(examples, ALL, 0, rows) for rows in micro_batches(made, 2048, pack=pack)]
        filled.append(sum(b.tokens for b in batches) / sum(b.input_ids.numel() for b in batches))
    assert filled[0] > 0.85
    assert filled[1] < 0.5


def test_labels_are_the_next_tokens_wherever_an_example_lies() -> None:
    examples, groups = ragged(12, seed=2)
    spans = [(ALL, ANSWER, CLOSED)[i % 3] for i in range(len(examples))]
    for rows in micro_batches(prefix_groups(examples, groups, 90), 90, pack=True):
        batch = collate(examples, spans, 0, rows)
        at = 0
        for i in batch.examples:
            first, last = spans[i].of(examples[i])
            n = last - first
            labels, source = batch.labels[at : at + n], batch.source[at : at + n]
            assert labels.tolist() == list(examples[i].input_ids[first:last])
            assert batch.input_ids.flatten()[source].tolist() == list(examples[i].input_ids[first - 1 : last - 1])
            assert batch.rows[at : at + n].tolist() == [i] * n
            if batch.position_ids is not None:
                assert batch.position_ids.flatten()[source].tolist() == list(range(first - 1, last - 1))
            at += n
        assert at == batch.supervised_tokens


def test_the_mask_by_hand() -> None:
    """[a b | c | d] and [e] behind it in one row."""
    examples = [example(1, 2, 3), example(1, 2, 4), example(5)]
    made = prefix_groups(examples, [[0, 1], [2]], 99)
    batch = collate(examples, CLOSED, 0, [made])
    assert batch.mask is not None
    assert batch.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert batch.position_ids is not None
    assert batch.position_ids[0].tolist() == [0, 1, 2, 2, 0]


def test_packed_hidden_states_are_those_of_separate_rows(new_policy: Callable[..., Policy]) -> None:
    policy = new_policy("none")
    policy.model.float()
    examples, groups = ragged(10, seed=3)
    assert policy.packs(examples)
    (rows,) = micro_batches(prefix_groups(examples, groups, 10_000), 10_000, pack=True)
    packed, alone = collate(examples, ALL, 0, rows), collate(examples, ALL, 0)
    assert packed.tokens < alone.tokens
    with torch.no_grad():
        ours, theirs = packed.pick(policy.hidden(packed)), alone.pick(policy.hidden(alone))
    at = torch.cat([(alone.rows == i).nonzero().squeeze(1) for i in packed.examples])
    torch.testing.assert_close(ours, theirs[at], rtol=1e-4, atol=1e-4)


def test_rows_are_closed_up_where_that_saves_something() -> None:
    """[1 2 3 4 5 6] and [7 8] behind it: every token once, supervised where it was, in rows as before."""
    examples = [example(1, 2, 3, 4, 5, 6), example(7, 8)]
    batch, padded = (collate(examples, ALL, 0, close_up=close_up) for close_up in (True, False))
    assert batch.layout is not None
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
    assert batch.layout.places.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batch.layout.tokens[:, :2].tolist() == [[0, 1], [6, 7]]
    assert batch.layout.mask is None  # one example a row: causality is enough
    assert (padded.input_ids.flatten()[batch.layout.places] == batch.input_ids[0]).all()
    assert batch.source.tolist() == [0, 1, 2, 3, 4, 6]
    assert (batch.labels == padded.labels).all()
    assert collate(examples[:1], ALL, 0, close_up=True).layout is None
    even = [example(*range(16)), example(*range(15))]  # one of 32 places is padding
    assert collate(even, ALL, 0, close_up=True).layout is None


@pytest.mark.parametrize("shared", [True, False])
def test_closed_up_rows_have_the_states_and_gradients_of_padded_ones(
    new_policy: Callable[..., Policy], shared: bool
) -> None:
    policy = new_policy("none", checkpointing=False)
    policy.model.float()
    examples, groups = ragged(7, seed=4)
    groups = groups if shared else [[i] for i in range(len(examples))]
    (rows,) = micro_batches(prefix_groups(examples, groups, 10_000), 10_000, pack=shared)
    found = []
    for close_up in (True, False):
        batch = collate(examples, ALL, 0, rows, close_up=close_up)
        assert (batch.layout is not None) == close_up
        policy.model.zero_grad()
        states = batch.pick(policy.hidden(batch))
        states.square().sum().backward()
        gradients = [p.grad for name, p in policy.trainable().items() if ".lora_B." in name]
        assert all(g is not None and bool(g.any()) for g in gradients)
        found.append((states.detach(), torch.cat([g.flatten() for g in gradients if g is not None])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_only_attention_computes_padding(new_policy: Callable[..., Policy]) -> None:
    policy = new_policy("none")
    examples, groups = ragged(7, seed=4)
    (rows,) = micro_batches(prefix_groups(examples, groups, 10_000), 10_000, pack=True)
    batch = policy.collate(examples, [ALL] * len(examples), rows, pack=True)
    assert batch.input_ids.numel() == batch.tokens < batch.places.numel()
    assert policy.collate(examples, [ALL] * len(examples), rows, pack=False).layout is None


def test_other_attention_than_sdpa_keeps_its_padding(new_base: Callable[..., Base]) -> None:
    """As Gemma-2 has, whose scores are capped."""
    base = new_base("none")
    assert packing_of(base).layouts
    base.model.set_attn_implementation("eager")
    use_layouts(base.model)
    assert base.model.config._attn_implementation == "eager"
    assert not packing_of(base).layouts


def test_a_sliding_window_bounds_what_may_be_packed(sandbox_folder: object, tmp_path: object) -> None:
    shape = {"vocab_size": 1600, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(**shape, intermediate_size=96, num_key_value_heads=2, sliding_window=16)
    base = _saved(config, sandbox_folder, tmp_path)
    assert packing_of(base) == Packing(16, layouts=True)


def test_a_model_that_cannot_keep_examples_apart_is_found_out(sandbox_folder: object, tmp_path: object) -> None:
    shape = {"vocab_size": 1600, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = _saved(OPTConfig(**shape, ffn_dim=96, word_embed_proj_dim=64), sandbox_folder, tmp_path)
    able = packing_of(base).longest

    def deaf(**inputs: object) -> object:
        """A backbone that takes the arguments and does not heed them."""
        return real(input_ids=inputs["input_ids"])

    real = base.model.model.forward
    base.model.model.forward = deaf
    assert packing_of(base) == Packing(0, layouts=False)
    base.model.model.forward = lambda input_ids: real(input_ids=input_ids)
    assert packing_of(base).longest == 0
    assert able in (0, 1 << 30)


def _saved(config: object, sandbox_folder: object, folder: object) -> Base:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(sandbox_folder).save_pretrained(folder)
    base = load_base(folder, LoadSpec("none", device="cpu"))  # type: ignore[arg-type]
    return replace(base, model=base.model.float())


def test_a_batch_is_made_in_as_many_operations_whatever_it_holds() -> None:
    """Each one in Python is time that a GPU waits."""

    class Counted(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counted.operations += 1
            return func(*args, **(kwargs or {}))

    def operations(groups_of: int) -> int:
        examples, groups = ragged(groups_of)
        (rows,) = micro_batches(prefix_groups(examples, groups, 40), 1 << 20, pack=True)
        Counted.operations = 0
        with Counted():
            collate(examples, ANSWER, 0, rows, close_up=True, always=True)
        return Counted.operations

    assert operations(40) == operations(3) < 40
