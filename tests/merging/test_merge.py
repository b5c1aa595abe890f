"""`merge` and `export`: what is written loads with plain transformers and peft, and says what the adapter says."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from conftest import QUICK, call
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qunlearn.evaluation.metrics import SetScore
from qunlearn.merging.request import MergeOptions, MergeRequest, check_merge
from qunlearn.merging.verify import BAD, _sets, came_back
from qunlearn.model.load import LoadSpec, dequantized, keep_training_path, load_base
from qunlearn.model.policy import Policy
from qunlearn.utils.file_names import ADAPTER
from qunlearn.utils.output import MARK


def logits(model: object) -> torch.Tensor:
    ids = torch.arange(4, 44).reshape(2, 20)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()  # type: ignore[no-any-return, operator]


@pytest.fixture(scope="module")
def small_run(quick_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, of which few rows are measured."""
    folder = tmp_path_factory.mktemp("small") / "run"
    shutil.copytree(quick_run, folder)
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("table_rows: 40", "table_rows: 6"))
    return folder


def drawn(count: int) -> list[int]:
    """The places of the rows that the small run measures, by its seed."""
    return sorted(random.Random(QUICK["train.seed"]).sample(range(count), 6))


@pytest.mark.parametrize("base", ["original", pytest.param("dequantized", marks=pytest.mark.slow)])
def test_merged_is_base_plus_adapter(quick_run: Path, sandbox_folder: Path, tmp_path: Path, base: str) -> None:
    ran = call("merge", quick_run, "-o", tmp_path / "m", "--base", base, "--json")
    report = ran.json
    # Into the original weights, or quantised again, some of it may come back: this was a short run.
    assert ran.code == (5 if report["status"] == "came back" else 0), ran.stderr
    assert base == "original" or "merged" not in report["back"]
    assert report["tensors"] == len(load_file(quick_run / ADAPTER / "adapter_model.safetensors")) == 2 * 4 * 7
    assert report["divergence"] < 0.1
    assert set(report["scores"]) == {"base", "adapter", "merged", "nf4"}
    assert all(set(sets) == {"bad answers", "normal, held back"} for sets in report["scores"].values())
    record = json.loads((quick_run / "record.json").read_text())  # the rows and numbers are those of the run
    for title, own in (("bad answers", "forget"), ("normal, held back", "normal, held back")):
        for column, when in (("base", "before"), ("adapter", "after")):
            found, known = report["scores"][column][title], record[when][own]
            shared = ("n", "probability", "exact_match", "perplexity")  # which words are specific, a run alone knows
            assert [found[name] for name in shared] == pytest.approx([known[name] for name in shared], rel=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template
    spec = LoadSpec("none", device="cpu")
    plain = load_base(sandbox_folder, spec)
    if base == "dequantized":
        plain = dequantized(load_base(sandbox_folder, LoadSpec("nf4", device="cpu")))
    expected = logits(PeftModel.from_pretrained(plain.model, str(quick_run / ADAPTER)))
    difference = (logits(merged).log_softmax(-1) - expected.log_softmax(-1)).abs()
    assert difference.mean() < 0.05  # bf16 rounding of the sum
    assert sorted(p.suffix for p in (tmp_path / "m").iterdir() if p.suffix in (".bin", ".pt", ".pkl")) == []


def test_of_many_rows_a_merge_measures_those_that_the_run_did(
    small_run: Path, new_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Drawn from the run's seed: the first rows of a file may all be of one kind."""
    (source,) = check_merge([small_run], tmp_path / "m", MergeOptions()).sources
    assert source.forget_rows is not None
    prompts = [record.prompt for record in source.forget_rows.records]
    assert [row.record.prompt for row in _sets(source, new_policy())[BAD]] == [prompts[i] for i in drawn(len(prompts))]


def test_the_update_is_the_scaled_product(quick_run: Path, sandbox_folder: Path, tmp_path: Path) -> None:
    """W + (alpha / r) B A, in float64 from the files alone."""
    assert call("merge", quick_run, "-o", tmp_path / "m", "--no-measure").code == 0
    adapter = load_file(quick_run / ADAPTER / "adapter_model.safetensors")
    config = json.loads((quick_run / ADAPTER / "adapter_config.json").read_text())
    base, merged = (load_file(f / "model.safetensors") for f in (sandbox_folder, tmp_path / "m"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    expected = set()
    for name in adapter:
        if ".lora_A." not in name:
            continue
        weight = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        a, b = adapter[name].double(), adapter[name.replace(".lora_A.", ".lora_B.")].double()
        update = config["lora_alpha"] / config["r"] * b @ a
        torch.testing.assert_close(merged[weight].double(), base[weight].double() + update, rtol=2**-7, atol=2**-9)
        expected.add(weight)
    assert changed <= expected
    assert len(changed) > 0.9 * len(expected)


def test_coming_back() -> None:
    def score(probability: float, exact: float) -> SetScore:
        return SetScore(40, probability, exact, 2.0)

    assert not came_back(score(0.01, 0), score(0.02, 0), 0.05)
    assert not came_back(score(0.2, 0), score(0.3, 0), 0.05)
    assert came_back(score(0.01, 0), score(0.1, 0), 0.05)
    assert came_back(score(0.01, 0), score(0.01, 0.1), 0.05)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("back", "words", "remedy"),
    [
        (["merged", "nf4"], "in the merged model, at nf4", "--base dequantized"),
        pytest.param(["nf4"], "at nf4", "with the adapter beside it (qunlearn export)", marks=pytest.mark.slow),
    ],
)
def test_what_came_back_has_its_exit_code(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: list[str], words: str, remedy: str
) -> None:
    monkeypatch.setattr("qunlearn.merging.verify.gates_failed", lambda *_: back)
    ran = call("merge", small_run, "-o", tmp_path / "m", "--gate", "none", "--json")
    assert ran.code == 5
    assert f"came back {words}" in ran.stderr
    assert remedy in ran.stderr
    assert ran.json["back"] == back
    assert (tmp_path / "m" / "config.json").is_file()


@pytest.mark.medium
def test_the_gate_measures_the_written_model_quantised(small_run: Path, tmp_path: Path) -> None:
    ran = call("merge", small_run, "-o", tmp_path / "m", "--gate", "int8,nf4", "--json")
    scores = ran.json["scores"]
    assert list(scores) == ["base", "adapter", "merged", "int8", "nf4"]
    from qunlearn.data.records import read_dataset
    from qunlearn.data.tokenize import choose_template, encode
    from qunlearn.evaluation.metrics import aggregate
    from qunlearn.evaluation.scores import score_rows
    from qunlearn.sandbox import data_file

    four = load_base(tmp_path / "m", LoadSpec("nf4", device="cpu"))
    dataset = read_dataset(data_file("hallucination", "forget"))
    rows = encode(dataset, four.tokenizer, choose_template(four.tokenizer, "auto", dataset), 512).examples
    expected = aggregate(score_rows(four, [rows[i] for i in drawn(len(rows))], 2048))
    assert scores["nf4"]["bad answers"]["probability"] == pytest.approx(expected.probability, rel=1e-4)
    assert scores["nf4"]["bad answers"]["exact_match"] == expected.exact_match
    assert scores["nf4"]["bad answers"]["probability"] != scores["merged"]["bad answers"]["probability"]


def test_an_unknown_device_is_refused_before_anything_is_measured(quick_run: Path, tmp_path: Path) -> None:
    ran = call("merge", quick_run, "-o", tmp_path / "m", "--device", "gpu")
    assert ran.code == 7 and "unknown device" in ran.stderr and "measuring" not in ran.stderr
    assert not (tmp_path / "m").exists()


def test_without_measuring(quick_run: Path, tmp_path: Path) -> None:
    ran = call("merge", quick_run, "-o", tmp_path / "m", "--no-measure", "--json")
    assert ran.code == 0 and ran.json["scores"] == {} and ran.json["divergence"] is None
    assert "nothing was measured" in ran.stderr
    assert call("merge", quick_run, "-o", tmp_path / "n", "--no-measure", "--gate", "nf4").code == 2
    assert call("merge", quick_run, "-o", tmp_path / "n", "--gate", "q4_k_m").code == 2


def test_runs_of_one_name_are_told_apart() -> None:
    """Every recipe's run folder is called `run`: what is measured of one must not stand for the other."""
    runs = [SimpleNamespace(name=name) for name in ("run", "other", "run")]
    request = cast("MergeRequest", SimpleNamespace(sources=runs))
    assert MergeRequest.names.fget(request) == ["run (1)", "other", "run (3)"]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_two_runs_are_measured_each_on_its_own(small_run: Path, tmp_path: Path) -> None:
    second = tmp_path / small_run.name
    shutil.copytree(small_run, second)
    path = second / ADAPTER / "adapter_model.safetensors"
    save_file({n: t.neg() if "lora_B" in n else t for n, t in load_file(path).items()}, path)
    (second / "normal.jsonl").unlink()
    ran = call("merge", small_run, second, "-o", tmp_path / "m", "--gate", "none", "--json")
    assert ran.code == 5, ran.stderr  # the second takes away what the first had added: all is back
    scores = ran.json["scores"]
    bad = {f"bad answers of {small_run.name} ({n})" for n in (1, 2)}
    assert set(scores["merged"]) == bad | {f"normal, held back of {small_run.name} (1)"}
    for title in bad:
        assert scores["merged"][title]["exact_match"] == scores["base"][title]["exact_match"] == 1
    assert "what it held back is not measured" in ran.stderr


def test_runs_that_saw_different_bases(quick_run: Path, tmp_path: Path) -> None:
    shutil.copytree(quick_run, tmp_path / "second")
    path = tmp_path / "second" / "config.yaml"
    path.write_text(path.read_text().replace("quant: nf4", "quant: fp4"))
    ran = call("merge", quick_run, tmp_path / "second", "-o", tmp_path / "m", "--base", "dequantized")
    assert ran.code == 2 and "different forms" in ran.stderr
    assert not (tmp_path / "m").exists()


@pytest.mark.medium
@pytest.mark.parametrize("quant", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_export_in_few_bits_loads_with_plain_transformers(small_run: Path, tmp_path: Path, quant: str) -> None:
    ran = call("export", small_run, "-o", tmp_path / "e", "--format", "merged", "--quant", quant, "--json")
    assert ran.code in (0, 5), ran.stderr
    assert list(ran.json["scores"]) == ["base", "adapter", quant]
    config = json.loads((tmp_path / "e" / "config.json").read_text())["quantization_config"]
    assert config["load_in_4bit"] is (quant == "nf4") and config["load_in_8bit"] is (quant == "int8")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "e", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    kinds = {type(m).__name__ for m in loaded.modules()}
    assert ("Linear4bit" if quant == "nf4" else "Linear8bitLt") in kinds
    assert AutoTokenizer.from_pretrained(tmp_path / "e").chat_template
    assert {p.suffix for p in (tmp_path / "e").iterdir()} <= {".json", ".safetensors", ".jinja"}
    # The same as merging in 16 bits and having transformers quantise while it loads.
    assert call("merge", small_run, "-o", tmp_path / "m", "--no-measure").code == 0
    other = load_base(tmp_path / "m", LoadSpec(quant, device="cpu", as_stored=True)).model
    keep_training_path(loaded)  # repacking for AVX512-BF16 fails at this width
    torch.testing.assert_close(logits(loaded), logits(other), rtol=0, atol=0)


def test_export_refuses_what_it_does_not_write(quick_run: Path, tmp_path: Path) -> None:
    for args in (
        ["--format", "onnx"],
        ["--quant", "nf4"],
        ["--format", "merged", "--quant", "q4"],
        ["--llama-cpp", "."],
    ):
        assert call("export", quick_run, "-o", tmp_path / "e", *args).code == 2
    assert list(tmp_path.iterdir()) == []


def test_merge_without_the_bad_file_says_so(quick_run: Path, tmp_path: Path) -> None:
    shutil.copytree(quick_run / ADAPTER, tmp_path / "a")
    ran = call("merge", tmp_path / "a", "-o", tmp_path / "m", "--json")
    assert ran.code == 0, ran.stderr
    assert "nothing is measured" in ran.stderr
    assert ran.json["divergence"] is None


def test_an_output_is_not_overwritten_unasked(quick_run: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("mine")
    ran = call("merge", quick_run, "-o", tmp_path / "m")
    assert ran.code == 9
    assert (tmp_path / "m" / "mine").read_text() == "mine"


def test_export_is_the_adapter_alone(quick_run: Path, sandbox_folder: Path, tmp_path: Path) -> None:
    ran = call("export", quick_run, "-o", tmp_path / "e", "--json")
    assert ran.code == 0, ran.stderr
    assert f"convert_lora_to_gguf.py {tmp_path / 'e'} --base {sandbox_folder} --outfile" in ran.stderr
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert ran.json["files"] == names == sorted(p.name for p in (tmp_path / "e").iterdir() if p.name != MARK)
    for name in names:
        assert (tmp_path / "e" / name).read_bytes() == (quick_run / ADAPTER / name).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(sandbox_folder)
    PeftModel.from_pretrained(base, str(tmp_path / "e"))
    gpu = (tmp_path / "e" / "README.md").read_text()
    assert gpu.startswith("---\nbase_model:")
    assert "exact match" in gpu
