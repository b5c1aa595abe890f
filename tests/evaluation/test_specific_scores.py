"""The specific tokens of bad answers in the scores and in the before/after table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qunlearn.data.batch import ANSWER
from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import choose_template, encode
from qunlearn.evaluation.metrics import aggregate
from qunlearn.evaluation.scores import row_nlls, score_rows, token_stats
from qunlearn.model.load import Base
from qunlearn.sandbox import data_file


def test_specific_tokens_are_counted_apart(new_base: Callable[..., Base]) -> None:
    sandbox = new_base()
    dataset = read_dataset(data_file("hallucination", "forget"))
    rows = encode(dataset, sandbox.tokenizer, choose_template(sandbox.tokenizer, "auto", dataset), 512).examples[:3]
    weighed = [replace(e, weights=tuple(float(t % 3 == i) for t in range(e.end - e.start))) for i, e in enumerate(rows)]
    plain, marked = token_stats(sandbox, rows, 512), token_stats(sandbox, weighed, 512)
    for example, before, after in zip(weighed, plain, marked, strict=True):
        assert replace(after, specific_nll=0.0, specific_tokens=0) == before
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logps = sandbox.model(input_ids=ids).logits[0].double().log_softmax(-1)
        chosen = [example.start + t for t, weight in enumerate(example.weights) if weight]
        nll = -sum(float(logps[t - 1, example.input_ids[t]]) for t in chosen)
        assert after.specific_tokens == len(chosen)
        assert after.specific_nll == pytest.approx(nll, abs=0.05)  # the model computes in bf16 where it can
    total = aggregate(score_rows(sandbox, weighed, 512))
    expected = [math.exp(-s.specific_nll / s.specific_tokens) for s in marked]
    assert total.specific_probability == pytest.approx(sum(expected) / 3)
    assert aggregate(score_rows(sandbox, rows, 512)).specific_probability is None


def test_a_run_records_them(quick_run: Path) -> None:
    record = json.loads((quick_run / "record.json").read_text())
    before, after = record["before"], record["after"]
    assert before["forget"]["specific_probability"] > 0.9 > after["forget"]["specific_probability"]
    assert 0 <= after["forget"]["extraction_strength"] <= before["forget"]["extraction_strength"] <= 1
    assert "specific_probability" not in before["normal, held back"]


def test_of_a_long_answer_no_token_counts_for_the_others(new_base: Callable[..., Base]) -> None:
    """A few tokens at 1e-6 had made a mean of 0.2 of a passage whose other tokens were as likely as before."""
    sandbox = new_base()
    dataset = read_dataset(data_file("hallucination", "forget"))
    (row,) = encode(dataset, sandbox.tokenizer, choose_template(sandbox.tokenizer, "auto", dataset), 512).examples[:1]
    ids = [*row.input_ids[: row.start], 7, *row.input_ids[row.start : row.end], *row.input_ids[row.start : row.end]]
    n = len(ids) - row.start
    unlikely = replace(row, input_ids=tuple(ids), end=len(ids))
    few = replace(unlikely, weights=(1.0,) * 12 + (0.0,) * (n - 12))
    with torch.no_grad():
        logps = sandbox.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nlls = [-float(logps[t - 1, ids[t]]) for t in range(row.start, len(ids))]
    assert n > 12 and nlls[0] > 3
    for example, expected in ((unlikely, sum(min(nll, 3.0) for nll in nlls)), (few, sum(nlls[:12]))):
        ((nll, tokens),) = row_nlls(sandbox, [example], ANSWER, 512, most=[3.0])
        assert (nll, tokens) == (pytest.approx(expected, rel=1e-3), 12 if example is few else n)
