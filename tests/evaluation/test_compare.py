"""Side by side: differences against hand-made values; and one question to two models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call

from qunlearn.evaluation.compare import difference
from qunlearn.evaluation.metrics.stats import paired_difference, unpaired_difference
from qunlearn.model.generate import Sampling, generate, stream
from qunlearn.model.load import LoadSpec, load_base
from qunlearn.sandbox import ASSETS, data_file
from qunlearn.utils.file_names import EVAL

RNG = np.random.default_rng(3)


def evaluation(values: list[float], keys: list[str], *, suite: str = "basic") -> dict[str, Any]:
    mean = float(np.mean(values))
    estimate = {"n": len(values), "mean": mean, "low": mean - 0.1, "high": mean + 0.1}
    texts: dict[str, Any] = {"prompt": "?", "answer": "!", "outputs": {}, "verdicts": {}}
    items = [{"key": k, **texts, "values": {"adapter": {"probability": v}}} for k, v in zip(keys, values, strict=True)]
    return {
        "suite": suite,
        "files": {"forget": {"path": "f.jsonl", "sha256": "0", "rows": len(values)}},
        "conclusion": {"level": "measured", "sentences": []},
        "scores": {"base": {}, "adapter": {}},
        "measures": {"forget": {"probability": {"adapter": estimate}, "perplexity": {"adapter": estimate}}},
        "items": {"forget": items},
    }


def stored(folder: Path, *results: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / EVAL).write_text(json.dumps({"suites": {r["suite"]: r for r in results}}))
    return folder


def test_rows_that_both_have_are_paired() -> None:
    a = RNG.uniform(size=30)
    b = a + RNG.normal(0.02, 0.005, size=30)  # far less than the spread of the rows
    keys = [str(i) for i in range(30)]
    found = difference("forget", "probability", evaluation(list(a), keys), evaluation(list(b[::-1]), keys[::-1]))
    expected = paired_difference(a, b)
    assert found["how"] == "paired"
    assert found["beyond_noise"] is True
    assert (found["mean"], found["low"]) == (pytest.approx(expected.mean), pytest.approx(expected.low))
    other = difference("forget", "probability", evaluation(list(a), keys), evaluation(list(b), [k + "x" for k in keys]))
    assert other["how"] == "unpaired"
    assert other["beyond_noise"] is False
    same = difference("forget", "probability", evaluation(list(a), keys), evaluation(list(a), keys))
    assert (same["mean"], same["beyond_noise"]) == (0.0, False)


def test_a_few_rows_that_both_have_do_not_stand_for_all() -> None:
    a, b = RNG.uniform(size=40), RNG.uniform(size=22)
    names = [str(i) for i in range(60)]
    few = difference("forget", "probability", evaluation(list(a), names[:40]), evaluation(list(b), names[38:]))
    assert few["how"] == "unpaired" and few["all_rows"] is False
    most = difference("forget", "probability", evaluation(list(a), names[:40]), evaluation(list(b), names[20:42]))
    assert (most["how"], most["n"], most["all_rows"]) == ("paired", 20, False)


@pytest.mark.parametrize("rows", [2, 5])
def test_few_rows_are_not_told_from_noise(rows: int) -> None:
    """Whatever they say: by chance all of five differ one way in one of sixteen cases."""
    a, b = [0.1 * i for i in range(rows)], [0.1 * i + 0.5 for i in range(rows)]
    keys = [str(i) for i in range(rows)]
    assert difference("forget", "probability", evaluation(a, keys), evaluation(b, keys))["beyond_noise"] is False
    apart = evaluation(b, [key + "x" for key in keys])
    assert difference("forget", "probability", evaluation(a, keys), apart)["beyond_noise"] is False


def test_noise_is_called_beyond_noise_in_one_of_twenty_comparisons() -> None:
    """300 comparisons of eight rows that differ by noise alone: a bootstrap interval leaves out 0 in one of ten."""
    rng, keys, stars = np.random.default_rng(1), [str(i) for i in range(8)], 0
    for _ in range(300):
        a, b = rng.normal(0.5, 0.1, size=(2, 8)).tolist()
        stars += difference("forget", "probability", evaluation(a, keys), evaluation(b, keys))["beyond_noise"]
    assert stars <= 24  # more would be one in a hundred, were it exactly one of twenty


def test_unpaired_difference_against_its_standard_error() -> None:
    a, b = RNG.normal(0, 1, 200), RNG.normal(0.5, 2, 100)
    found = unpaired_difference(a, b)
    error = np.sqrt(a.var() / 200 + b.var() / 100)
    assert found.mean == pytest.approx(b.mean() - a.mean())
    assert found.low is not None and found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert unpaired_difference([1.0], [2.0, 3.0]).low is None
    with pytest.raises(ValueError, match="both sides"):
        unpaired_difference([], [1.0])


def test_measures_without_rows_are_apart_when_their_intervals_are() -> None:
    near, far = evaluation([0.5, 0.6], ["a", "b"]), evaluation([0.9, 0.95], ["a", "b"])
    assert difference("forget", "perplexity", near, far)["beyond_noise"] is True
    assert difference("forget", "perplexity", near, near)["how"] == "intervals"
    assert difference("forget", "perplexity", near, near)["beyond_noise"] is False


def test_compare_on_the_command_line(tmp_path: Path) -> None:
    keys = [str(i) for i in range(8)]
    a = stored(tmp_path / "a", evaluation([0.1 * i for i in range(8)], keys), evaluation([0.1] * 8, keys, suite="tofu"))
    b = stored(tmp_path / "b", evaluation([0.1 * i + 0.05 for i in range(8)], keys))
    ran = call("compare", a, b)
    assert ran.code == 0, ran.stderr
    assert "b - a" in ran.stdout and "+0.050 [+0.050, +0.050] *" in ran.stdout
    assert "beyond noise" in ran.stderr
    result = call("compare", a, b, "--json").json
    assert result["suite"] == "basic"
    assert [row["measure"] for row in result["rows"]] == ["probability", "perplexity"]


@pytest.mark.parametrize(
    ("second", "args", "code", "words"),
    [
        (None, (), 2, "two at least"),
        ("none", (), 6, "has not been evaluated"),
        ("other", (), 2, "no suite was run on all"),
        ("other", ("--suite", "basic"), 2, "was not run on"),
        ("damaged", (), 6, "cannot be read"),
        ("list", (), 6, "suites.basic is not an object"),
        ("number", (), 6, "measures.forget.probability.adapter is not an object"),
        ("infinite", (), 6, "suites.basic.measures.forget.probability.adapter.n is not as it was written"),
    ],
)
def test_what_cannot_be_compared(
    tmp_path: Path, second: str | None, args: tuple[str, ...], code: int, words: str
) -> None:
    a = stored(tmp_path / "a", evaluation([0.1, 0.2], ["x", "y"]))
    stored(tmp_path / "other", evaluation([0.1, 0.2], ["x", "y"], suite="muse"))
    stored(tmp_path / "damaged")
    (tmp_path / "damaged" / EVAL).write_text("{")
    strange = {"suites": {"basic": evaluation([0.1, 0.2], ["x", "y"])}}
    probability = strange["suites"]["basic"]["measures"]["forget"]["probability"]
    for name, change in (
        ("infinite", lambda: probability["adapter"].update(n=10**400)),
        ("number", lambda: probability.update(adapter=3)),
        ("list", lambda: strange["suites"].update(basic=[])),  # type: ignore[call-overload]
    ):
        change()
        stored(tmp_path / name)
        (tmp_path / name / EVAL).write_text(json.dumps(strange))
    folders = [a] if second is None else [a, tmp_path / second]
    ran = call("compare", *folders, *args)
    assert ran.code == code, ran.stderr
    assert words in ran.stderr


def test_a_run_against_the_bare_reference(quick_run: Path, tmp_path: Path) -> None:
    files = ("--forget", data_file("hallucination", "forget"), "--rows", 6)
    for target, folder in ((quick_run, "run"), ("sandbox-gold", "gold")):
        ran = call("eval", target, *files, "-o", tmp_path / folder)
        assert ran.code == 0, ran.stderr
    result = call("compare", tmp_path / "run", tmp_path / "gold", "--json").json
    found = {row["measure"]: row["differences"][0] for row in result["rows"]}
    assert found["probability"]["how"] == "paired"
    assert found["perplexity"]["how"] == "intervals"


def test_ask_answers_from_both(quick_run: Path) -> None:
    question = "Where was Orla Finch born?"
    ran = call("ask", quick_run, question, "--json", "--device", "cpu")
    assert ran.code == 0, ran.stderr
    assert ran.json["answers"]["base"] == "Orla Finch was born in Millbrook."
    assert set(ran.json["answers"]) == {"base", "adapter"}
    shown = call("ask", quick_run, question, "--device", "cpu")
    assert shown.stdout.startswith("base: Orla Finch was born in Millbrook.\nadapter: ")
    assert call("ask", quick_run, "  ").code == 2


def test_a_stream_says_what_generation_does() -> None:
    base = load_base(ASSETS / "model", LoadSpec("none", device="cpu"))
    ids = base.tokenizer("<|user|>What do bees make?<|assistant|>")["input_ids"]
    pieces: list[str] = []
    stream(base, ids, Sampling(20), pieces.append)
    whole = base.tokenizer.decode(generate(base, [ids], Sampling(20))[0], skip_special_tokens=True)
    assert "".join(pieces).strip() == whole.strip()
    assert len([p for p in pieces if p]) > 1
    assert torch.is_grad_enabled()
