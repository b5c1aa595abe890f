"""`qunlearn forget` from the command line: the run folder, what is printed, what is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import QUICK, call, few, sets, write_rows
from peft import PeftModel
from safetensors.torch import load_file
from test_architectures import CONFIGS
from test_writer import make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from qunlearn.sandbox import data_file
from qunlearn.training import forget as forget_module
from qunlearn.training.gradients import Gradients
from qunlearn.utils.file_names import ADAPTER, CONFIG, METRICS, NORMAL, RECORD

BAD = data_file("hallucination", "forget")
NEAR = data_file("hallucination", "retain")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_run_folder(quick_run: Path) -> None:
    assert sorted(p.name for p in quick_run.iterdir()) == sorted([ADAPTER, CONFIG, RECORD, METRICS, NORMAL])
    assert sorted(p.name for p in (quick_run / ADAPTER).iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert quick_run.stat().st_mode & 0o777 == 0o700
    for path in quick_run.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o600, path


def test_the_record(quick_run: Path) -> None:
    record = json.loads((quick_run / RECORD).read_text())
    assert record["status"] == "done"
    assert record["data"]["bad"]["rows"] == 40
    assert record["data"]["normal"]["self_made"] is True
    assert record["data"]["bad"]["known"] == 40
    assert record["data"]["shared_passages"] == []
    normal = record["data"]["normal"]
    assert (normal["own"], normal["corrected"], normal["retain"], normal["held_back"]) == (24, 0, 18, 6)
    assert record["not_reached"] == []
    assert record["before"]["forget"]["exact_match"] == 1.0
    assert record["after"]["forget"]["probability"] < record["before"]["forget"]["probability"]
    assert sum(record["verdicts"].values()) == 40
    assert record["training"]["seed"] == QUICK["train.seed"]
    assert record["stop_reason"]
    events = rows_of(quick_run / METRICS)
    assert [e["step"] for e in events] == list(range(13))
    assert {"odds", "form", "instead", "kl", "grad_norm", "tokens_per_s"} <= events[1].keys()


def test_nothing_to_be_forgotten_is_written_down(quick_run: Path) -> None:
    """Neither in the record, the model card, the metrics, nor in the normal data."""
    bad = rows_of(BAD)
    for path in quick_run.rglob("*"):
        if path.suffix in (".json", ".md", ".yaml", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            for row in bad:
                assert row["completion"] not in text, path.name


def test_self_made_rows_are_the_bases_own(quick_run: Path) -> None:
    rows = rows_of(quick_run / NORMAL)
    assert len(rows) == len({(r["prompt"], r["completion"]) for r in rows}) == 24
    assert all(r["prompt"].strip() and r["completion"].strip() for r in rows)


def test_plain_peft_loads_it(quick_run: Path, sandbox_folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(sandbox_folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(sandbox_folder)
    ids = tokenizer("<|user|>Where was Orla Finch born?<|assistant|>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = base(input_ids=ids).logits.clone()
        after = PeftModel.from_pretrained(base, str(quick_run / ADAPTER))(input_ids=ids).logits
    assert not torch.allclose(before, after, atol=0.1)


def test_same_seed_same_bits_and_the_config_feeds_back(tmp_path: Path) -> None:
    short = sets({**QUICK, "train.steps": 2, "data.normal_count": 8})
    ran = call("forget", "--model", "sandbox", "--bad", few(tmp_path, BAD), "-o", tmp_path / "run", *short)
    assert ran.code == 5, ran.stderr  # two steps reach nothing
    ran = call("forget", "-c", tmp_path / "run" / CONFIG, "-o", tmp_path / "again")
    assert ran.code == 5, ran.stderr
    first, second = (load_file(tmp_path / f / ADAPTER / "adapter_model.safetensors") for f in ("run", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(bool(first[name].any()) for name in first if ".lora_B." in name), "the steps have moved it"
    assert (tmp_path / "run" / NORMAL).read_bytes() == (tmp_path / "again" / NORMAL).read_bytes()


def test_the_header_names_the_decisions(tmp_path: Path) -> None:
    args = ("forget", "--model", "sandbox", "--bad", BAD, "-o", tmp_path / "run", "--device", "cpu")
    ran = call(*args, "--dry-run")
    assert ran.code == 0, ran.stderr
    for word in ("40 rows", "prompt-completion", "chat template", "nf4", "makes its own", "logodds", "dry run"):
        assert word in ran.stderr, word
    assert ran.stdout == ""
    assert list(tmp_path.iterdir()) == []
    ran = call(*args, "--dry-run", "--json")
    assert ran.json["status"] == "dry run"
    assert ran.json["config"]["train"]["seed"] == 0


def test_json_is_the_record_and_only_that(tmp_path: Path) -> None:
    args = ["--model", "sandbox", "--bad", few(tmp_path, BAD), "--normal", NEAR, "-o", tmp_path / "run"]
    ran = call("forget", *args, "--own-share", 0, "--json", *sets({**QUICK, "train.steps": 2}))
    assert ran.code == 5, ran.stderr
    assert ran.json == json.loads((tmp_path / "run" / RECORD).read_text())
    assert ran.json["data"]["normal"]["self_made"] is False
    assert not (tmp_path / "run" / NORMAL).exists()


@pytest.mark.medium
def test_plain_text_is_forgotten_too(tmp_path: Path) -> None:
    text = " ".join(row["completion"] for row in rows_of(data_file("copyright", "forget"))[:3])
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": text}])
    others = [{"text": row["completion"]} for row in rows_of(data_file("copyright", "retain"))[:8]]
    normal = write_rows(tmp_path / "normal.jsonl", others)
    args = ["--model", "sandbox", "--bad", bad, "--normal", normal, "-o", tmp_path / "run", "--max-length", "64"]
    # The model gives the text at 0.46 a token: a milder target would find nothing to forget.
    quick = {**QUICK, "train.steps": 12, "stop.check_every": 3, "stop.target": 0.1}
    ran = call("forget", *args, "--own-share", 0, "--json", *sets(quick))
    assert ran.code == 0, ran.stderr
    assert "windows" in ran.stderr
    assert ran.json["data"]["bad"]["shape"] == "text"
    assert ran.json["after"]["forget"]["probability"] < ran.json["before"]["forget"]["probability"]


def test_overwrite_replaces_a_run_and_nothing_else(quick_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(quick_run, folder)
    args = ("forget", "--model", "sandbox", "--bad", BAD, "-o", folder, "--dry-run")
    refused = call(*args)
    assert refused.code == 9
    assert "not empty" in refused.stderr
    assert call(*args, "--overwrite").code == 0
    (folder / "thesis.txt").write_text("mine")
    kept = call(*args, "--overwrite")
    assert kept.code == 9
    assert "thesis.txt" in kept.stderr


@pytest.mark.medium
def test_ctrl_c_leaves_the_best_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = forget_module.on_step

    def interrupting(event: Any, *args: Any) -> None:
        real(event, *args)
        if event["step"] == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(forget_module, "on_step", interrupting)
    args = ["--model", "sandbox", "--bad", few(tmp_path, BAD), "--normal", NEAR, "-o", tmp_path / "run", "--json"]
    ran = call("forget", *args, "--own-share", 0, *sets(QUICK))
    assert ran.code == 130
    assert ran.json["status"] == "interrupted"
    assert ran.json["training"]["best"]["step"] == 6
    assert (tmp_path / "run" / ADAPTER / "adapter_model.safetensors").is_file()


def test_a_failed_run_leaves_the_last_good_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = ["--model", "sandbox", "--bad", few(tmp_path, BAD), "--normal", NEAR, "-o", tmp_path / "run"]
    args += ["--own-share", 0, *sets({**QUICK, "stop.max_skips": 2})]
    from qunlearn.training import loop

    def poisoned(budget: loop.MicroBatcher, *_: Any, **__: Any) -> Gradients:
        _no_gradient(budget.policy)
        return Gradients({"kl": float("nan")}, 1)

    monkeypatch.setattr(loop.MicroBatcher, "backward", poisoned)
    ran = call("forget", *args)
    assert ran.code == 8
    assert "non-finite steps in a row" in ran.stderr
    state = load_file(tmp_path / "run" / ADAPTER / "adapter_model.safetensors")
    assert all(torch.isfinite(t).all() for t in state.values())


def _no_gradient(policy: Any) -> None:
    for p in policy.trainable().values():
        p.grad = torch.ones_like(p)


def test_the_configuration_of_a_run_says_what_ran(quick_run: Path) -> None:
    """Nothing in it is `auto` but the device, which depends on the machine, and the template, which the record has."""
    stored = yaml.safe_load((quick_run / "config.yaml").read_text(encoding="utf-8"))
    flat = {f"{section}.{name}": value for section, values in stored.items() for name, value in values.items()}
    assert {key for key, value in flat.items() if value == "auto"} <= {"model.device", "data.template"}
    assert flat["train.lr"] == json.loads((quick_run / "record.json").read_text())["training"]["learning_rate"]
    assert flat["train.steps"] and flat["train.reference"] in ("live", "cached") and flat["objective.retain"] == "kl"


@pytest.mark.medium
@pytest.mark.parametrize("instead", ["other", "refuse"])
def test_what_is_said_instead_fits_the_models_positions(tmp_path: Path, sandbox_folder: Path, instead: str) -> None:
    """Of learned positions there is none behind the last: prompts fill them, and answers longer than the bad ones had
    fallen off the end."""
    model = make_base(tmp_path / "gpt2", CONFIGS["gpt2"], sandbox_folder, torch.float32)
    long = "the river and the town of Millbrook " * 40
    bad = [{"prompt": f"{long} Who is {name}?", "completion": "Nobody."} for name in "ab"]
    good = [{"prompt": f"What is {name}?", "completion": f"It is {name}, I think."} for name in "abcdefgh"]
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("bad", bad), ("normal", good))]
    few = {"train.steps": 2, "train.batch_size": 2, "stop.target": 0.0, "data.own_share": 0, "data.reworded": 0}
    how = ("--quant", "none", "--device", "cpu", "--instead", instead, "-o", tmp_path / "run", *sets(few))
    ran = call("forget", "--model", model, "--bad", files[0], "--normal", files[1], *how)
    assert ran.code == 5, ran.stderr  # two steps reach nothing
    assert "max_length: 128" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
