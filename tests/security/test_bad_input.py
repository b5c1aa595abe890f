"""What a person can get wrong: one clear message, a documented exit code, nothing written, nothing lost."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ran, call, few, sets, write_rows

from qunlearn.errors import EXIT_CODES
from qunlearn.sandbox import data_file
from qunlearn.utils.file_names import ADAPTER, CONFIG, METRICS, NORMAL, RECORD

PAIR = {"prompt": "Where was Orla Finch born?", "completion": "In Millbrook."}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_rows(tmp_path / "bad.jsonl", [PAIR])
    return tmp_path


def refused(ran: Ran, code: int, *words: str) -> None:
    assert ran.code == code, ran.stderr
    assert code in EXIT_CODES
    assert ran.stderr.count("error: ") == 1
    assert "Traceback" not in ran.stderr
    for word in words:
        assert word in ran.stderr, ran.stderr


def forget(work: Path, *args: object, model: object = "sandbox") -> Ran:
    before = sorted(work.rglob("*"))
    ran = call("forget", "--model", model, "--bad", work / "bad.jsonl", "-o", work / "run", "--device", "cpu", *args)
    assert sorted(work.rglob("*")) == before, "something was written"
    return ran


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("is empty",)),
        (b'{"prompt": "a", "completion": "b"}\n{oops', ("bad.jsonl:2", "not JSON")),
        (b'{"a": "b"}', ("bad.jsonl:1", "no known shape", "--prompt-field")),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', ("bad.jsonl:2", "no field 'completion'")),
        (b'{"prompt": "a", "completion": ""}', ("bad.jsonl:1", "is empty")),
        (b'{"prompt": "a", "completion": "b"}\n\xe9', ("bad.jsonl:2", "not UTF-8")),
    ],
)
def test_data_files(work: Path, content: bytes, words: tuple[str, ...]) -> None:
    (work / "bad.jsonl").write_bytes(content)
    refused(forget(work), 3, *words)


def test_missing_file(work: Path) -> None:
    (work / "bad.jsonl").unlink()
    refused(forget(work), 3, "no such file", "bad.jsonl")


def test_an_answer_that_does_not_fit(work: Path) -> None:
    write_rows(work / "bad.jsonl", [PAIR, {"prompt": "a", "completion": "long " * 100}])
    refused(forget(work, "--max-length", 32), 3, "bad.jsonl:2", "do not fit in 32 tokens", "--max-length")


def test_the_same_row_in_bad_and_normal(work: Path) -> None:
    write_rows(work / "normal.jsonl", [{"prompt": "x", "completion": "y"}, PAIR])
    refused(forget(work, "--normal", work / "normal.jsonl"), 3, "normal.jsonl:2", "bad.jsonl:1")


def test_too_little_normal_data(work: Path) -> None:
    write_rows(work / "normal.jsonl", [{"prompt": "x", "completion": "y"}])
    refused(forget(work, "--normal", work / "normal.jsonl", "--own-share", 0), 3, "two rows")


def _copy(sandbox: Path, work: Path) -> Path:
    return Path(shutil.copytree(sandbox, work / "model"))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupted(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def not_numbers(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: torch.full_like(t, float("nan")) for n, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def missing_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (no_weights, "weights"),
        (only_pickle, "only pickled weights"),
        (truncated, "model.safetensors"),
        (corrupted, "model.safetensors"),
        (not_numbers, "not finite"),
        (no_config, "config.json"),
        (no_tokenizer, "tokenizer"),
        (missing_tensor, "up_proj"),
    ],
)
def test_model_folders(work: Path, sandbox_folder: Path, break_it: Callable[[Path], None], word: str) -> None:
    folder = _copy(sandbox_folder, work)
    break_it(folder)
    refused(forget(work, model=folder), 6, word)


def test_unknown_model_name(work: Path) -> None:
    ran = forget(work, model="lama-7b")
    refused(ran, 6, "lama-7b", "llama-7b")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda_where_it_was_demanded(work: Path) -> None:
    refused(forget(work, "--device", "cuda"), 7, "CUDA")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--set", "train.lrr=1"), ("train.lrr", "train.lr")),
        (("--lr", "fast"), ("train.lr", "a number")),
        (("--quant", "nf5"), ("model.quant", "nf4")),
        (("--eps1", "0", "--eps2", "0", "--eps3", "0"), ("nothing to train",)),
        (("-c", "nowhere.yaml"), ("nowhere.yaml", "cannot be read")),
        (("--template", "vicuna"), ("--template", "vicuna")),
    ],
)
def test_settings(work: Path, args: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(forget(work, *args), 2, *words)


def test_unknown_flags_and_commands() -> None:
    assert call("forget", "--modle", "x").code == 2
    assert call("forgte").code == 2
    refused(call("forget", "--bad", "x"), 2, "--model")
    refused(call("forget", "--model", "x"), 2, "--bad")


def test_wrong_target_modules(work: Path) -> None:
    refused(forget(work, "--target-modules", "qqq"), 6, "qqq")


def test_output_that_cannot_be_written(work: Path) -> None:
    (work / "run").write_text("a file")
    refused(forget(work), 9, "not a folder")


def test_a_full_disk_is_noticed_before_the_work(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1000))  # type: ignore[attr-defined]
    refused(forget(work), 9, "disk is full")


def test_a_disk_that_fills_up_leaves_nothing_half_written(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qunlearn.training import record as record_module

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(work / "run" / "adapter_model.safetensors"))

    monkeypatch.setattr(record_module, "save_adapter", full)
    bad, normal = (few(work, data_file("hallucination", split), 16) for split in ("forget", "retain"))
    args = ("--model", "sandbox", "--bad", bad, "--normal", normal, "--steps", 1, "--device", "cpu")
    ran = call(
        "forget", *args, "-o", work / "run", *sets({"data.normal_count": 8, "data.reworded": 0, "stop.table_rows": 4})
    )
    refused(ran, 9, "disk is full")
    assert not (work / "run").exists() and "--resume continues" in ran.stderr  # what was trained is kept, aside


# -- merge, export, eval -----------------------------------------------------------------------------------


def test_a_run_that_is_none(work: Path) -> None:
    refused(call("merge", work / "none", "-o", work / "m"), 6, "no such folder")
    refused(call("merge", work, "-o", work / "m"), 6, "no adapter")
    refused(call("export", work, "-o", work / "m"), 6, "no adapter")
    refused(call("eval", work, "--forget", work / "bad.jsonl"), 6, "no adapter")


def test_an_adapter_of_another_base(work: Path, quick_run: Path, sandbox_folder: Path) -> None:
    other = sandbox_folder.parent / "gold"
    refused(call("merge", quick_run, "--model", other, "-o", work / "m"), 6, "another base")
    refused(call("eval", quick_run, "--model", other, "--forget", work / "bad.jsonl"), 6, "another base")
    assert not (work / "m").exists()


def test_a_cut_off_adapter(work: Path, quick_run: Path) -> None:
    run = Path(shutil.copytree(quick_run, work / "run"))
    path = run / ADAPTER / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    refused(call("merge", run, "-o", work / "m"), 6, "damaged")
    (run / RECORD).write_text("{")
    refused(call("merge", run, "-o", work / "m"), 6, "record.json")
    assert not (work / "m").exists()


def test_wrong_words(work: Path, quick_run: Path) -> None:
    refused(call("merge", quick_run, "-o", work / "m", "--base", "quantised"), 2, "--base", "dequantized")
    refused(call("export", quick_run, "-o", work / "m", "--format", "onnx"), 2, "--format", "peft")
    refused(call("eval", quick_run / ADAPTER), 2, "--forget")
    refused(call("eval", "--forget", work / "bad.jsonl"), 2, "--model")
    refused(call("demo", "lies"), 2, "hallucination")


def test_errors_are_json_where_json_was_asked_for(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["qunlearn", "forget", "--json"])
    (work / "bad.jsonl").write_text("{")
    ran = forget(work, "--json")
    assert ran.code == 3
    assert json.loads(ran.stdout)["exit_code"] == 3


def test_names_of_a_run_folder_are_as_documented(quick_run: Path) -> None:
    assert {p.name for p in quick_run.iterdir()} == {ADAPTER, CONFIG, RECORD, METRICS, NORMAL}
