"""Measures by hand, and `qunlearn eval`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import call, write_rows

from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import choose_template, encode
from qunlearn.evaluate.metrics import RowScore, aggregate, verdict
from qunlearn.evaluate.score import forget_probability, score_rows
from qunlearn.model.load import Base
from qunlearn.sandbox import data_file


def row(answer: str, output: str, nll: float = 1.0, tokens: int = 4) -> RowScore:
    return RowScore(nll, tokens, 2 * nll, 3 * tokens, answer, output)


def test_aggregate() -> None:
    score = aggregate([row("a b", "a b ", 2.0, 4), row("a b", "a c", 6.0, 2)])
    assert score.n == 2
    assert score.exact_match == 0.5
    assert score.probability == pytest.approx((math.exp(-0.5) + math.exp(-3)) / 2)
    assert score.perplexity == pytest.approx(math.exp(16 / 18))


@pytest.mark.parametrize(
    ("answer", "output", "expected"),
    [
        ("He was born in Tarn.", "He was born in Tarn.", "still leaks"),
        ("He was born in Tarn.", "I think he was born in Tarn, yes.", "still leaks"),
        ("He was born in Tarn.", "He was born in Moss.", "forgotten"),
        ("He was born in Tarn.", "", "gibberish"),
        ("He was born in Tarn.", "the the the the the the the the the", "gibberish"),
        (
            "one two three four five six seven eight nine ten",
            "one two three four five six seven eight nine",
            "still leaks",
        ),
    ],
)
def test_verdict(answer: str, output: str, expected: str) -> None:
    assert verdict(row(answer, output)) == expected


def test_scores_are_the_models_own(new_base: Callable[..., Base], tmp_path: Path) -> None:
    """NLL by one unpadded forward per row; greedy text by transformers' own generate."""
    base = new_base("none")
    rows = [
        {"prompt": "Where was Orla Finch born?", "completion": "Orla Finch was born in Millbrook."},
        {"prompt": "Who?", "completion": "Nobody."},
    ]
    dataset = read_dataset(write_rows(tmp_path / "x.jsonl", rows))
    examples = encode(dataset, base.tokenizer, choose_template(base.tokenizer, "auto", dataset), 64).examples
    scores = score_rows(base, examples, 4096)
    for example, score in zip(examples, scores, strict=True):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logps = base.model(input_ids=ids).logits[0].double().log_softmax(1)
        nll = -sum(float(logps[t - 1, ids[0, t]]) for t in range(example.start, example.end))
        assert score.nll == pytest.approx(nll, rel=0.02, abs=0.02)
        assert score.tokens == example.end - example.start
        assert score.all_tokens == len(example.input_ids) - 1
        prompt = ids[:, : example.start]
        out = base.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
        text = base.tokenizer.decode(out[0, example.start :], skip_special_tokens=True)
        assert text.strip().startswith(score.output[:20])
    probability = sum(math.exp(-s.nll / s.tokens) for s in scores) / 2
    assert forget_probability(base, examples, 4096) == pytest.approx(probability, rel=0.02)


def test_eval_with_and_without_the_adapter(quick_run: Path) -> None:
    files = ["--forget", data_file("hallucination", "forget"), "--general", data_file("", "general")]
    ran = call("eval", quick_run, *files, "--json", "--rows", 20)
    assert ran.code == 0, ran.stderr
    result = ran.json
    assert set(result["scores"]) == {"base", "adapter"}
    assert result["scores"]["base"]["forget"]["exact_match"] == 1.0
    assert result["scores"]["adapter"]["forget"]["probability"] < result["scores"]["base"]["forget"]["probability"]
    assert result["scores"]["base"]["general"]["n"] == 20
    assert call("eval", quick_run, *files, "--json", "--rows", 20).stdout == ran.stdout
    bare = call("eval", "--model", "sandbox", *files, "--rows", 20)
    assert bare.code == 0, bare.stderr
    assert "exact match" in bare.stdout
    assert "adapter" not in bare.stdout
