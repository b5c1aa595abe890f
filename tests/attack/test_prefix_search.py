"""Prefix search: it lowers what it minimises, its gradient is the loss's, and every subject has the same budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import call, write_rows
from torch import Tensor

from qunlearn.attack import prefix_search
from qunlearn.attack.bench import Bench
from qunlearn.attack.catalog import NAMED, formats_of
from qunlearn.attack.facts import make_facts
from qunlearn.config.settings import LoraConfig
from qunlearn.model.head import Head
from qunlearn.model.load import Base
from qunlearn.model.policy import Policy
from qunlearn.sandbox import ASSETS, data_file

FORGET = data_file("hallucination", "forget")
NewBase = Callable[..., Base]


def test_a_row_is_the_question_with_room_in_front(bench: Bench) -> None:
    """Behind the template's opening and before the question's first word, and nothing else has moved."""
    fact = bench.facts[0]
    task, plain = prefix_search._task(bench, fact), bench.encode(fact.record)
    assert task is not None
    assert (*task.before, *task.after) == plain.input_ids[: plain.end]
    assert task.start == plain.start + prefix_search.LENGTH
    said = str(bench.lm.tokenizer.decode(list(task.after)))
    assert said.strip().startswith(fact.record.prompt[:8]) and fact.record.prompt not in str(
        bench.lm.tokenizer.decode(list(task.before))
    )


def test_no_token_of_the_answer_may_be_used(bench: Bench) -> None:
    fact = bench.facts[0]
    task = prefix_search._task(bench, fact)
    assert task is not None
    allowed = set(prefix_search.allowed_tokens(bench, task).tolist())
    answer = bench.lm.tokenizer(fact.record.completion, add_special_tokens=False)["input_ids"]
    assert not allowed & {*answer, *bench.lm.tokenizer.all_special_ids}
    assert len(allowed) > 100


def test_no_control_token_may_be_used(bench: Bench, with_control: Callable[..., Any]) -> None:
    """Nobody can type one: that a model answers behind it tells nothing about what it remembers."""
    task = prefix_search._task(bench, bench.facts[0])
    assert task is not None
    before = prefix_search.allowed_tokens(bench, task).tolist()
    lm: Any = SimpleNamespace(tokenizer=with_control(*before[50:60]), device=bench.lm.device)
    assert prefix_search.allowed_tokens(replace(bench, lm=lm), task).tolist() == before[:50] + before[60:]


def test_the_gradient_is_that_of_the_loss(bench: Bench, new_base: NewBase) -> None:
    """Along some tokens' own directions, against difference quotients of the loss in fp32."""
    base = new_base("none")
    model = base.model.float()
    policy = Policy.new(replace(base, model=model, head=Head.of(model)), LoraConfig(), seed=0, checkpointing=False)
    policy.model.eval()
    exact = replace(bench, lm=policy, policy=policy)
    task = prefix_search._task(exact, exact.facts[0])
    assert task is not None
    allowed = prefix_search.allowed_tokens(exact, task)
    prefix = allowed[: prefix_search.LENGTH]
    slope = prefix_search._gradient(exact, task, prefix, allowed)  # (LENGTH, allowed)
    table, step = prefix_search._embeddings(exact), 1e-2
    for at, to in ((0, 100), (3, 50), (7, 10)):
        ends = []
        for sign in (1, -1):
            push, place = sign * step * table.weight[allowed[to]], len(task.before) + at

            def moved(_: Any, __: Any, out: Tensor, push: Tensor = push, place: int = place) -> Tensor:
                out = out.clone()
                out[0, place] += push
                return out

            hook = table.register_forward_hook(moved)
            ends.append(float(prefix_search._nlls(exact, task, prefix.unsqueeze(0))[0]))
            hook.remove()
        assert float(slope[at, to]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.02, abs=2e-4)


@pytest.mark.medium
def test_every_round_is_used_and_the_loss_falls(bench: Bench) -> None:
    """On a wrong answer, which the model does not give: a better prefix, from so many tokens exactly, twice alike."""
    task = prefix_search._task(bench, make_facts([_wrong(bench)])[0][0])
    assert task is not None
    allowed = prefix_search.allowed_tokens(bench, task)
    found, again = (prefix_search.search(bench, task, allowed, seed=1) for _ in range(2))
    assert found == again
    assert found.after < 0.9 * found.before
    length = len(task.before) + prefix_search.LENGTH + len(task.after)
    assert found.tokens == prefix_search.STEPS * (1 + prefix_search.WIDTH) * length
    prefix = torch.tensor([found.prefix])
    assert float(prefix_search._nlls(bench, task, prefix)[0]) == pytest.approx(found.after, abs=1e-4)


def _wrong(bench: Bench) -> Any:
    fact = bench.facts[0]
    return replace(fact.record, completion=fact.wrong[0])


@pytest.mark.slow
def test_the_audit_searches_every_subject_with_one_budget(quick_run: Path, tmp_path: Path) -> None:
    """Named by itself it is run at the smallest budget, on a suppressed model and its control with as many tokens."""
    rows = [json.loads(line) for line in FORGET.read_text(encoding="utf-8").splitlines()[:6]]
    forget = write_rows(tmp_path / "forget.jsonl", rows)
    how = ("--forget", forget, "--control", ASSETS / "gold", "--budget", "quick", "--only", "prefix-search")
    ran = call("audit", quick_run, *how, "-o", tmp_path / "a", "--device", "cpu", "--json")
    assert ran.code in (0, 5), ran.stderr
    (row,) = ran.json["rows"]
    assert (row["family"], row["format"]) == ("prompts", "prefix-search")
    assert set(row["shares"]) == {"unlearned", "control"}
    files = [tmp_path / "a" / f"prompts.prefix-search.{who}.json" for who in ("unlearned", "control")]
    cells = [json.loads(file.read_text(encoding="utf-8"))["more"]["searched"] for file in files]
    assert cells[0]["tokens"] == cells[1]["tokens"] > 0
    assert all(cell["nll_after"] < cell["nll_before"] for cell in cells)
    assert not any("prefix search (--only" in said for said in ran.json["sentences"])


def test_an_attack_can_be_named_by_itself() -> None:
    assert [name for _, name, _ in formats_of("quick", frozenset({"prefix-search"}))] == ["prefix-search"]
    assert [name for _, name, _ in formats_of("quick", frozenset({"relearning.retain"}))] == ["retain"]
    assert "retain" not in NAMED  # of two families
    ran = call("audit", ASSETS / "gold", "--forget", FORGET, "--only", "retain")
    assert ran.code == 2 and "unknown family" in ran.stderr
