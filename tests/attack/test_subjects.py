"""Other states of the model under audit: guarded, with the guard off, and merged."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
from conftest import call, few
from gguf_files import llama_gguf
from safetensors.torch import load_file

from qunlearn.attack import subjects
from qunlearn.hub.fingerprint import fingerprint
from qunlearn.merging.gguf import read_back_as
from qunlearn.merging.lora_tensors import WEIGHTS
from qunlearn.model.load import load_base
from qunlearn.report.audit import audit_line, audit_section, read_audit
from qunlearn.sandbox import ASSETS, data_file
from qunlearn.utils.output import MARK

pytestmark = pytest.mark.medium

MODEL, GOLD = ASSETS / "model", ASSETS / "gold"
CODE = data_file("code", "forget")


def by_name(found: Any) -> dict[str, Any]:
    return {f"{row['family']}.{row['format']}": row for row in found["rows"]}


def share(row: dict[str, Any], subject: str = "unlearned") -> float:
    return float(row["shares"][subject]["mean"])


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("guard") / "guard"
    ran = call("guard", "fit", "--model", "sandbox", "--bad", "sandbox:code/forget", "-o", out, "--device", "cpu")
    assert ran.code == 0, ran.stderr
    return out


@pytest.mark.slow
def test_a_guard_hides_what_the_weights_still_know(guard: Path, tmp_path: Path) -> None:
    """Asked through the guard the base gives little; with it off everything, and relearning brings it back through the
    guard no more than before it."""
    how = ("--control", GOLD, "--forget", CODE, "--budget", "quick", "--only", "A,C,D", "--device", "cpu")
    ran = call("audit", MODEL, "--guard", guard, *how, "-o", tmp_path / "a", "--json")
    assert ran.code in (0, 5), ran.stderr
    rows = by_name(ran.json)
    assert share(rows["formats.open"], "original") == 1.0
    assert share(rows["formats.open"]) < 0.2
    off = {name for name, row in rows.items() if row.get("aside") == "unguarded"}
    assert {"formats.open-unguarded", "layers.lens-unguarded", "relearning.half-unguarded"} == off
    assert share(rows["formats.open-unguarded"]) == 1.0
    assert rows["formats.open-unguarded"]["verdict"] == rows["layers.lens-unguarded"]["verdict"] == "leak"
    assert any(said.startswith("Guarded: the weights still know.") for said in ran.json["sentences"])
    assert share(rows["relearning.half"]) < share(rows["relearning.half-unguarded"]) == 1.0
    leaks = [row for name, row in rows.items() if row["verdict"] == "leak" and name not in off]
    assert (ran.json["status"] == "leaks") == bool(leaks)
    found = read_audit(tmp_path / "a")
    assert found is not None
    assert f"{len(leaks)} of " in audit_line(found)
    section = audit_section(found, str)
    assert section["headline"].startswith("The audit found leaks" if leaks else "No attack")
    again = call("audit", MODEL, "--guard", guard, *how, "-o", tmp_path / "a", "--json")
    assert again.code == 9  # finished


def test_one_model_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the original, the model under audit and the control each has gone when the next one is loaded."""
    loaded: list[weakref.ref[Any]] = []

    def load(folder: Path, spec: Any) -> Any:
        gc.collect()
        assert not [model for model in loaded if model() is not None]
        base = load_base(folder, spec)
        loaded.append(weakref.ref(base.model))
        return base

    monkeypatch.setattr(subjects, "load_base", load)
    how = ("--original", MODEL, "--control", GOLD, "--forget", few(tmp_path, CODE, 8), "--only", "formats.open,C")
    ran = call("audit", MODEL, *how, "--budget", "quick", "--device", "cpu", "-o", tmp_path / "a")
    assert ran.code in (0, 5), ran.stderr
    assert len(loaded) == 3


def test_without_the_guard_nothing_is_said_of_one(tmp_path: Path) -> None:
    how = ("--forget", CODE, "--budget", "quick", "--only", "formats.open", "--device", "cpu", "--json")
    ran = call("audit", GOLD, *how, "-o", tmp_path / "a")
    assert not any("uarded" in said for said in ran.json["sentences"])
    assert ran.json["guard"] is None


def test_a_guard_of_another_base_is_refused(tmp_path: Path) -> None:
    bad, normal = (few(tmp_path, data_file("code", split), 16) for split in ("forget", "retain"))
    guard, given = tmp_path / "guard", ("--bad", bad, "--normal", normal, "--rows", 16)
    ran = call("guard", "fit", "--model", "sandbox", *given, "-o", guard, "--strength", "agnostic", "--device", "cpu")
    assert ran.code == 0, ran.stderr
    ran = call("audit", GOLD, "--guard", guard, "--forget", CODE, "-o", tmp_path / "a", "--device", "cpu")
    assert ran.code == 6 and "another base" in ran.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_merged_model_is_a_subject_of_its_own(quick_run: Path, tmp_path: Path) -> None:
    """What was merged answers as the adapter does, and its rows are tested by themselves."""
    merged = tmp_path / "merged"
    assert call("merge", quick_run, "-o", merged, "--no-measure", "--device", "cpu").code == 0
    how = ("--control", GOLD, "--budget", "quick", "--only", "A", "--device", "cpu", "--json")
    ran = call("audit", quick_run, "--merged", merged, *how, "-o", tmp_path / "a")
    assert ran.code in (0, 5), ran.stderr
    rows = by_name(ran.json)
    aside = [row for row in rows.values() if row.get("aside") == "merged"]
    assert {row["format"] for row in aside} == {f"{r['format']}-merged" for r in rows.values() if not r.get("aside")}
    for name in ("open", "prefix4", "choice-text"):
        ours, theirs = rows[f"formats.{name}"], rows[f"formats.{name}-merged"]
        assert abs(share(ours) - share(theirs)) <= 0.15
        assert share(ours, "control") == share(theirs, "control")
    assert any(said.startswith("Merged, ") for said in ran.json["sentences"])


def test_what_was_merged_into_another_base_is_refused(quick_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(GOLD, other)
    (other / MARK).write_text(json.dumps({"base": "of another model"}), encoding="utf-8")
    ran = call("audit", quick_run, "--merged", other, "-o", tmp_path / "a")
    assert ran.code == 2 and "another base" in ran.stderr
    ran = call("audit", GOLD, "--merged", other, "--forget", CODE, "-o", tmp_path / "a")
    assert ran.code == 2 and "only a run has a merged form" in ran.stderr


def test_what_was_merged_from_another_run_is_refused(quick_run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(MODEL, tmp_path / "other"))
    base, theirs = fingerprint(Path(MODEL)), {WEIGHTS: "of another run"}
    (other / MARK).write_text(json.dumps({"base": base, "adapters": [theirs]}), encoding="utf-8")
    ran = call("audit", quick_run, "--merged", other, "-o", tmp_path / "a")
    assert ran.code == 2 and "another run" in ran.stderr and not (tmp_path / "a").exists()


def test_a_gguf_file_is_a_subject_of_its_own(quick_run: Path, tmp_path: Path) -> None:
    """Made of the retrained model it gives what the control gives: it is the file that answers, and not the run."""
    file = llama_gguf(GOLD, tmp_path / "model.gguf", "q8_0")
    how = ("--control", GOLD, "--budget", "quick", "--only", "formats.open", "--device", "cpu", "--json")
    ran = call("audit", quick_run, "--merged", file, *how, "-o", tmp_path / "a")
    assert ran.code in (0, 5), ran.stderr
    row = by_name(ran.json)["formats.open-merged"]
    assert row["title"].endswith(", merged")
    assert share(row) == share(row, "control") <= 0.05
    assert ran.json["merged"] == str(file) and "GGUF" in ran.json["notes"][0]


@pytest.mark.parametrize("form", ["f32", "q8_0"])
def test_a_gguf_file_is_read_as_the_model_it_was_made_of(form: str, tmp_path: Path) -> None:
    """Its weights, but for their rounding, beside the base's configuration and tokenizer."""
    (tmp_path / "model").mkdir()
    file = llama_gguf(MODEL, tmp_path / "model.gguf", form)
    read_back_as(file, MODEL, tmp_path / "model", trust=False)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (MODEL, tmp_path / "model"))
    for name, weight in ours.items():
        read = theirs.get(name, theirs["lm_head.weight"])  # the embedding is the head, and kept once
        most = float(weight.abs().max()) / (2000 if form == "f32" else 200)
        assert float((read.float() - weight.float()).abs().max()) <= most


def test_gguf_files_that_are_none_or_of_another_model(
    quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(merged: Path, code: int, *said: str) -> None:
        ran = call("audit", quick_run, "--merged", merged, "--only", "formats.open", "-o", tmp_path / "a")
        assert ran.code == code and all(part in ran.stderr for part in said), ran.stderr
        assert not (tmp_path / "a").exists()

    refused(tmp_path / "gone.gguf", 6, "no such file")
    file = tmp_path / "model.gguf"
    file.write_text("a page of text")
    refused(file, 6, "is no GGUF file")
    whole = llama_gguf(MODEL, tmp_path / "whole", "q8_0").read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(file, 6, "cannot be read")
    llama_gguf(MODEL, file, "q8_0", blocks=2)
    refused(tmp_path, 6, "another model than the run's base")  # a folder as `export` leaves it
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(file, 2, "pip install gguf")
