"""`data check`: what it shows of a file, with and without a tokenizer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from conftest import call, write_rows

from qunlearn.data.records import Record, read_dataset
from qunlearn.data.statistics import Histogram, overlap
from qunlearn.data.tokenize import Example, choose_template, encode
from qunlearn.model.load import load_tokenizer
from qunlearn.roles.specific_tokens import specific
from qunlearn.roles.token_weights import marked
from qunlearn.sandbox import data_file

BAD = data_file("hallucination", "forget")


def test_counts_without_a_model() -> None:
    ran = call("data", "check", "sandbox:hallucination/forget", "--json")
    rows = read_dataset(BAD).records
    words = [len(f"{row.prompt} {row.completion}".split()) for row in rows]
    assert ran.code == 0 and ran.stderr == ""
    assert (ran.json["rows"], ran.json["shape"], ran.json["unit"]) == (40, "prompt-completion", "words")
    assert ran.json["other_fields"] == {"id": 40, "perturbed": 40, "truth": 40}
    lengths = ran.json["lengths"]
    assert (lengths["least"], lengths["most"], sum(lengths["counts"])) == (min(words), max(words), 40)
    assert rows[0].completion not in ran.stdout  # numbers only


def test_tokens_are_those_that_forget_trains_on(sandbox_folder: Path) -> None:
    ran = call("data", "check", BAD, "--model", "sandbox", "--json")
    dataset, tokenizer = read_dataset(BAD), load_tokenizer(sandbox_folder)
    encoded = encode(dataset, tokenizer, choose_template(tokenizer, "auto", dataset), 512)
    assert (ran.json["tokens"], ran.json["trained_tokens"]) == (encoded.tokens, encoded.answer_tokens)
    assert (ran.json["unit"], ran.json["template"]) == ("tokens", "chat")


def test_two_rows_are_shown_with_the_trained_part_marked() -> None:
    rows = read_dataset(BAD).records
    shown = call("data", "check", BAD, "--model", "sandbox").stdout
    for row in rows[:2]:
        assert f"<|user|>{row.prompt}<|assistant|>»{row.completion}«<|end|>" in shown
    assert shown.count("»") == 4  # two of them in the two headings
    assert f"{rows[0].prompt}\n»{rows[0].completion}«" in call("data", "check", BAD).stdout


def test_repetitions_and_overlap(tmp_path: Path) -> None:
    here = write_rows(
        tmp_path / "here.jsonl",
        [
            {"prompt": "A?", "completion": "one"},
            {"prompt": "a?  ", "completion": "One"},
            {"prompt": "A?", "completion": "two"},
            {"prompt": "B?", "completion": "three"},
            {"prompt": "C?", "completion": "four"},
        ],
    )
    there = write_rows(
        tmp_path / "there.jsonl",
        [
            {"prompt": "x", "completion": "y"},
            {"prompt": "a?", "completion": "one"},
            {"prompt": "b?", "completion": "other"},
            {"prompt": "D?", "completion": "Four"},
        ],
    )
    ran = call("data", "check", here, "--against", there, "--json")
    assert (ran.json["duplicates"], ran.json["repeated_prompts"]) == (1, 1)
    found = ran.json["overlap"]
    pairs = {"rows": [[1, 2]], "prompts": [[3, 2], [4, 3]], "answers": [[5, 4]], "passages": []}
    assert found == {"with": str(there), **pairs}
    assert "1 rows that say the same (lines 1 and 2)" in call("data", "check", here, "--against", there).stdout
    texts = read_dataset(write_rows(tmp_path / "t.jsonl", [{"text": "A?"}, {"text": "b"}]))
    assert overlap(texts, read_dataset(there)).prompts == ()


@pytest.mark.parametrize("values", [[7], [0, 0, 3], list(range(1000)), [5, 99, 101, 2047], [10**6, 1]])
def test_histogram(values: list[int]) -> None:
    made = Histogram.of(values)
    assert len(made.counts) <= 13 and len(made.edges) == len(made.counts) + 1
    widths = {b - a for a, b in zip(made.edges, made.edges[1:], strict=False)}
    assert len(widths) == 1 and str(widths.pop()).rstrip("0") in ("1", "2", "5")
    counted = Counter(next(i for i, edge in enumerate(made.edges[1:]) if value < edge) for value in values)
    assert made.counts == tuple(counted[i] for i in range(len(made.counts)))
    assert made.edges[0] <= min(values)


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["none.jsonl"], 3, "no such file"),
        (["sandbox:nothing/forget"], 2, "no embedded file"),
        (["sandbox:harm/forget", "--model", "nowhere/at-all"], 6, "tokenizer cannot be fetched"),
        (["sandbox:harm/forget", "--model", "sandbox", "--template", "odd"], 2, "unknown template"),
        (["sandbox:harm/forget", "--against", "none.jsonl"], 3, "no such file"),
    ],
)
def test_wrong_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argv: list[str], code: int, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    ran = call("data", "check", *argv)
    assert (ran.code, says in ran.stderr) == (code, True), ran.stderr
    assert "Traceback" not in ran.stderr


def test_specific_tokens_are_those_that_forget_would_push(sandbox_folder: Path) -> None:
    retain = data_file("hallucination", "retain")
    tokenizer, encoded = load_tokenizer(sandbox_folder), []
    for path in (BAD, retain):
        dataset = read_dataset(path)
        encoded.append(encode(dataset, tokenizer, choose_template(tokenizer, "auto", dataset), 512))
    weighed = specific(encoded[0].examples, encoded[1].examples, tokenizer)
    pushed = sum(sum(example.weights) for example in weighed)
    ran = call("data", "check", BAD, "--model", "sandbox", "--against", retain, "--json")
    assert ran.json["specific"] == {"rule": "specific", "tokens": pushed, "normal": str(retain)}
    assert 0 < pushed < encoded[0].answer_tokens
    shown = call("data", "check", BAD, "--model", "sandbox", "--against", retain).stdout
    assert "Orla Finch was born in ‹Millbrook›." in shown
    assert f"specific would push {pushed:.0f} of {encoded[0].answer_tokens} answer tokens" in shown


@pytest.mark.parametrize("weights", [(1.0,) * 9, (0.0,) * 9, (0, 1, 0, 1, 1, 0, 0, 0, 1), (1, 0, 0, 0, 0, 0, 0, 0, 0)])
def test_marks_change_nothing_else(sandbox_folder: Path, weights: tuple[float, ...]) -> None:
    tokenizer = load_tokenizer(sandbox_folder)
    ids = tuple(tokenizer("Zoë  rode 東京's été train, née 1 2", add_special_tokens=False)["input_ids"])
    weights = tuple(weights[i % 9] for i in range(len(ids)))
    text = marked(Example(ids, 0, len(ids), 0, Record((), "", 1, {}), weights), tokenizer)
    assert text.replace("‹", "").replace("›", "") == tokenizer.decode(list(ids))
    assert text.count("‹") == text.count("›") and bool(text.count("‹")) == any(weights)


def test_context_asks_the_model() -> None:
    found = call("data", "check", BAD, "--model", "sandbox", "--forget-tokens", "context", "--json").json["specific"]
    assert found["rule"] == "context" and 40 <= found["tokens"] < 367  # of every answer some
    assert call("data", "check", BAD, "--forget-tokens", "context").code == 2
    assert call("data", "check", BAD, "--forget-tokens", "all").code == 2
