"""Measures while training: they say what the tables say, change nothing, and survive a kill; the holdout stays out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, sets, write_rows
from safetensors.torch import load_file
from test_architectures import CONFIGS
from test_resume import SMALL as COMMON
from test_resume import Killed, same_result, stop_at
from test_writer import make_base

from qunlearn.config.resolve import resolve
from qunlearn.sandbox import data_file
from qunlearn.training import retain_rows as normal_module
from qunlearn.training.watch import Watch
from qunlearn.utils.file_names import ADAPTER, METRICS, NORMAL, RECORD

pytestmark = pytest.mark.medium

# The model says random words: what else it is taught to say must not look like sentences that were lost.
SMALL = {**COMMON, "objective.eps2": 0.1, "train.lr": 2e-3}
WATCHED = {**SMALL, "stop.eval_every": 3}


ENDS = (0, 5)  # a model of random weights says no sentences, before or after


def rows_of(split: str, first: int, count: int) -> list[dict[str, Any]]:
    lines = data_file("hallucination", split).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[first : first + count]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, sandbox_folder: Path) -> Path:
    """A tiny model of random weights, and bad, normal and holdout rows."""
    folder = tmp_path_factory.mktemp("during")
    make_base(folder / "model", CONFIGS["llama"], sandbox_folder, torch.float32)
    write_rows(folder / "bad.jsonl", rows_of("forget", 0, 8))
    write_rows(folder / "normal.jsonl", rows_of("retain", 0, 8))
    write_rows(folder / "holdout.jsonl", rows_of("holdout", 0, 3))
    return folder


def command(work: Path, output: Path, values: Mapping[str, object], *more: object) -> list[str]:
    files = ("--bad", work / "bad.jsonl", "--normal", work / "normal.jsonl")
    args = ["forget", "--model", work / "model", *files, "-o", output, "--device", "cpu", *more]
    return [*map(str, args), *sets(values)]


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("watched") / "run"
    ran = call(*command(work, output, WATCHED, "--holdout", work / "holdout.jsonl"))
    assert ran.code in ENDS, ran.stderr
    assert "every 3 steps" in ran.stderr and "the holdout" in ran.stderr
    assert "| exact: forget 0 %, holdout 0 %" in ran.stderr
    return output


def test_measuring_changes_no_bit_of_the_result(work: Path, watched: Path, tmp_path: Path) -> None:
    """With dropout, so that a random number drawn while measuring would show."""
    ran = call(*command(work, tmp_path / "run", SMALL))
    assert ran.code in ENDS, ran.stderr
    a, b = (load_file(folder / ADAPTER / "adapter_model.safetensors") for folder in (watched, tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    timed = ("seconds", "tokens_per_s", "measured")
    mine, plain = (
        [{k: v for k, v in e.items() if k not in timed} for e in events(f)] for f in (watched, tmp_path / "run")
    )
    assert mine == plain
    assert [e["step"] for e in events(watched) if "measured" in e] == [0, 3, 6, 7]
    assert not any("measured" in e for e in events(tmp_path / "run"))  # none unless asked for


def test_what_is_measured_is_what_the_tables_say(watched: Path) -> None:
    """The run's own table is another way to the same numbers: rows and their aggregate."""
    record, found = json.loads((watched / RECORD).read_text()), {e["step"]: e.get("measured") for e in events(watched)}
    best = record["training"]["best"]["step"]
    assert found[best] is not None, best
    for when, step in (("before", 0), ("after", best)):
        assert set(found[step]) == {"forget", "holdout"}
        for name, values in found[step].items():
            table = record[when][name]
            assert values["n"] == table["n"] == 2
            assert values["exact_match"] == table["exact_match"]
            assert values["probability"] == pytest.approx(table["probability"], rel=1e-6)
            assert 0.0 <= values["extraction_strength"] <= 1.0
    assert record["before"]["holdout"] != record["after"]["holdout"]
    assert record["data"]["holdout"]["rows"] == 3


def test_a_known_answer_is_seen_to_come_back(new_policy: Any) -> None:
    """On the sandbox, which knows its forget rows by heart; policy and random state stay as they were."""
    from qunlearn.data.records import read_dataset
    from qunlearn.data.tokenize import choose_template, encode

    policy = new_policy("none")
    known = read_dataset(data_file("hallucination", "forget"))
    template = choose_template(policy.tokenizer, "auto", known)
    examples = encode(known, policy.tokenizer, template, 64).examples[:3]
    state = torch.get_rng_state()
    policy.model.train()
    config = resolve(("x", {"stop.eval_every": 5, "train.steps": 7, "train.max_tokens": 256}))
    watch = Watch(policy, {"forget": examples, "none": []}, config)
    assert [step for step in range(8) if watch.due(step)] == [0, 5, 7]
    event = {"step": 5, "seconds": 1.0}
    seen = watch.see(event)
    assert seen["measured"].keys() == {"forget"}
    assert seen["measured"]["forget"]["exact_match"] == seen["measured"]["forget"]["leaks"] == 1.0
    assert seen["measured"]["forget"]["extraction_strength"] == 1.0
    assert "measured" not in event and watch.see({"step": 6}) == {"step": 6}
    assert policy.model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_holdout_the_held_back_rows_are_measured(work: Path, tmp_path: Path) -> None:
    ran = call(*command(work, tmp_path / "run", {**SMALL, "train.steps": 2}, "--eval-every", 1))
    assert ran.code in ENDS, ran.stderr
    assert [set(e["measured"]) for e in events(tmp_path / "run")] == [{"forget", "normal, held back"}] * 3


def test_a_killed_run_goes_on_to_the_same_measures(
    work: Path, watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = command(work, tmp_path / "run", WATCHED, "--holdout", work / "holdout.jsonl")
    with monkeypatch.context() as patch:
        stop_at(patch, 5, Killed())
        with pytest.raises(Killed):
            call(*args)
    other = write_rows(tmp_path / "other.jsonl", rows_of("holdout", 3, 3))
    refused = call(*command(work, tmp_path / "run", WATCHED, "--holdout", other, "--resume"))
    assert refused.code == 10 and "the holdout file" in refused.stderr
    ran = call(*args, "--resume")
    assert ran.code in ENDS, ran.stderr
    same_result(watched, tmp_path / "run")


@pytest.mark.slow
def test_the_holdout_is_never_trained_on(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("bad", "normal"):
        ran = call(*command(work, tmp_path / "run", SMALL, "--holdout", work / f"{split}.jsonl"))
        assert ran.code == 3
        assert "also in the holdout data" in ran.stderr and f"{split}.jsonl:1" in ran.stderr
    assert not (tmp_path / "run").exists()
    drawn: list[str] = []
    real = normal_module.self_made_rows

    def remembered(*args: Any) -> Any:
        made = real(*args)
        drawn[:] = [record.prompt for record in made.records]
        return made

    monkeypatch.setattr(normal_module, "self_made_rows", remembered)
    files = ("--model", "sandbox", "--bad", "sandbox:hallucination/forget", "--device", "cpu")
    quick = sets({**SMALL, "train.steps": 1, "data.normal_count": 24})
    first = call("forget", *files, "-o", tmp_path / "first", *quick)
    assert first.code == 5, first.stderr  # a step reaches nothing
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": p.upper(), "completion": "Other."} for p in drawn[:5]])
    second = call("forget", *files, "--holdout", held, "-o", tmp_path / "second", *quick)
    assert second.code == 5, second.stderr
    assert "5 self-made rows have a prompt of the holdout file, and are dropped" in second.stderr
    kept = [json.loads(line)["prompt"] for line in (tmp_path / "second" / NORMAL).read_text().splitlines()]
    assert kept == drawn[5:]


def test_eval_of_a_run_measures_its_holdout_too(watched: Path) -> None:
    ran = call("eval", watched, "--json", "--rows", 2, "--device", "cpu")
    assert ran.code == 0, ran.stderr
    assert list(ran.json["files"]) == ["forget", "holdout"]
