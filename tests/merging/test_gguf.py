"""GGUF exports: llama.cpp's tools found and called, what they refuse told, and what they wrote loaded by llama.cpp.

The last part needs llama.cpp: `LLAMA_CPP=FOLDER pytest tests/merging/test_gguf.py`, with gguf and
llama-cpp-python installed.
The source archive of llama-cpp-python has such a folder (vendor/llama.cpp).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, call, sets
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qunlearn.errors import AdapterError
from qunlearn.merging.export_adapter import vllm_rank
from qunlearn.merging.gguf import can_read_back, drop_code, one_alpha
from qunlearn.merging.lora_tensors import read_adapter
from qunlearn.sandbox import data_file
from qunlearn.utils.file_names import ADAPTER, CONFIG
from qunlearn.utils.output import MARK

# Stands for a converter: writes down how it was called, and then does as it is told.
FAKE = """
import json, os, pathlib, sys
given = sys.argv[1:]
seen = {"given": given, "offline": os.environ.get("HF_HUB_OFFLINE")}
for path in map(pathlib.Path, given):
    if path.is_dir():
        seen[path.name] = sorted(p.name for p in path.iterdir())
        config = path / "adapter_config.json"
        if config.is_file():
            seen["config"] = json.loads(config.read_text())
(pathlib.Path(__file__).parent / "called.json").write_text(json.dumps(seen))
"""
WRITES = 'pathlib.Path(given[given.index("--outfile") + 1]).write_bytes(b"GGUF")\n'
CONVERTS = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
from gguf_files import llama_gguf
llama_gguf(pathlib.Path(given[0]), pathlib.Path(given[given.index("--outfile") + 1]), "q8_0")
"""
REFUSES = 'print("loading"); print("NotImplementedError: BPE pre-tokenizer", file=sys.stderr); sys.exit(3)\n'


def llama_cpp(folder: Path, does: str, name: str = "convert_hf_to_gguf.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(FAKE + does)
    return folder


def called(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "called.json").read_text())
    return found


def test_the_converter_gets_a_merged_model_and_no_network(quick_run: Path, tmp_path: Path) -> None:
    tools = llama_cpp(tmp_path / "llama.cpp", WRITES)
    args = ["-o", tmp_path / "out", "--format", "gguf", "--quant", "q8_0", "--llama-cpp", tools, "--no-measure"]
    ran = call("export", quick_run, *args, "--json")
    assert ran.code == 0, ran.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.gguf", MARK]
    assert (tmp_path / "out" / "model.gguf").stat().st_mode & 0o777 == 0o600
    seen = called(tools)
    assert seen["offline"] == "1" and {"config.json", "model.safetensors", "tokenizer.json"} <= set(seen["16-bit"])
    assert seen["given"][seen["given"].index("--outtype") + 1] == "q8_0"
    assert "llama-cli -m" in ran.stderr and "--no-measure" in ran.stderr
    again = call("export", quick_run, *args)
    assert again.code == 9 and call("export", quick_run, *args, "--overwrite").code == 0


def test_what_was_written_is_read_back_and_measured(quick_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    tools, run = llama_cpp(tmp_path / "llama.cpp", CONVERTS), Path(shutil.copytree(quick_run, tmp_path / "run"))
    config = run / CONFIG
    config.write_text(config.read_text().replace("table_rows: 40", "table_rows: 4"))
    args = ["--format", "gguf", "--quant", "q8_0", "--llama-cpp", tools, "--device", "cpu", "--json"]
    ran = call("export", run, "-o", tmp_path / "out", *args)
    assert ran.code in (0, 5), ran.stderr
    assert list(ran.json["scores"]) == ["base", "adapter", "q8_0"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.gguf", MARK]


def test_a_converter_sees_no_code_to_trust(tmp_path: Path) -> None:
    """llama.cpp's converter loads tokenizers with trust_remote_code."""
    named = {"auto_map": {"AutoTokenizer": ["someone/model--tok.Tokenizer", None]}, "model_max_length": 8}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "config.json").write_text('{"model_type":  "llama"}')
    drop_code(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"model_max_length": 8}
    assert (tmp_path / "config.json").read_text() == '{"model_type":  "llama"}'


def test_what_a_converter_refuses_is_told(quick_run: Path, tmp_path: Path) -> None:
    tools = llama_cpp(tmp_path / "llama.cpp", REFUSES)
    args = ["-o", tmp_path / "out", "--format", "gguf", "--llama-cpp", tools, "--no-measure"]
    ran = call("export", quick_run, *args)
    assert ran.code == 6
    assert "convert_hf_to_gguf.py" in ran.stderr and "BPE pre-tokenizer" in ran.stderr
    llama_cpp(tools, "")  # says that all is well, and has written nothing
    ran = call("export", quick_run, *args)
    assert ran.code == 6 and "ended with 0" in ran.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["llama.cpp"]


def test_tools_that_are_not_there(quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    tools = llama_cpp(tmp_path / "llama.cpp", WRITES)
    for args, name in (
        (["--format", "gguf"], "convert_hf_to_gguf.py"),
        (["--format", "gguf-lora"], "convert_lora_to_gguf.py"),
        (["--format", "gguf-lora", "--llama-cpp", tools], "convert_lora_to_gguf.py"),
        (["--format", "gguf", "--quant", "q4_k_m", "--llama-cpp", tools], "llama-quantize"),
    ):
        ran = call("export", quick_run, "-o", tmp_path / "out", *args)
        said = " ".join(ran.stderr.split())
        assert ran.code == 2 and name in said and "by hand" in said, ran.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["llama.cpp"]


def test_a_tool_on_the_path_is_found(quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = llama_cpp(tmp_path / "bin", WRITES)
    script = tools / "convert_hf_to_gguf.py"
    script.write_text("#!/usr/bin/env python3\n" + script.read_text())
    script.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    ran = call("export", quick_run, "-o", tmp_path / "out", "--format", "gguf", "--no-measure")
    assert ran.code == 0, ran.stderr
    assert called(tools)["given"][-4:-2] == ["--outtype", "auto"]


def adapter_like(quick_run: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(quick_run / ADAPTER, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_an_adapter_says_the_alpha_that_llama_cpp_divides_by_the_rank(quick_run: Path, tmp_path: Path) -> None:
    tools = llama_cpp(tmp_path / "llama.cpp", WRITES, "convert_lora_to_gguf.py")
    adapter = adapter_like(quick_run, tmp_path / "a", use_rslora=True)
    ran = call("export", adapter, "-o", tmp_path / "out", "--format", "gguf-lora", "--llama-cpp", tools, "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["files"] == ["adapter.gguf"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter.gguf", MARK]
    seen = called(tools)
    rank, alpha = seen["config"]["r"], seen["config"]["lora_alpha"]
    assert alpha / rank == pytest.approx(32 / rank**0.5) and seen["config"]["use_rslora"] is False
    assert seen["adapter"] == ["adapter_config.json", "adapter_model.safetensors"] and seen["offline"] == "1"
    assert seen["given"][-2:] == ["--outtype", "f32"]


def test_alphas_that_one_number_cannot_say(quick_run: Path, tmp_path: Path) -> None:
    adapter = adapter_like(quick_run, tmp_path / "a", alpha_pattern={"q_proj": 8})
    with pytest.raises(AdapterError, match="2 different alphas"):
        one_alpha(read_adapter(adapter), adapter)


def test_ranks_that_vllm_takes() -> None:
    assert [vllm_rank(r) for r in (1, 4, 16, 17, 300, 512, 600)] == [1, 8, 16, 32, 320, 512, 600]


# -- with llama.cpp ------------------------------------------------------------------------------------------

CONVERTER = ("conversion", "gguf-py", "gguf")
QUANTIZES = """
import sys, llama_cpp as l
given, made, form = sys.argv[1:]
wanted = l.llama_model_quantize_default_params()
wanted.ftype = getattr(l, "LLAMA_FTYPE_MOSTLY_" + form)
sys.exit(l.llama_model_quantize(given.encode(), made.encode(), wanted))
"""
FOLDER = os.environ.get("LLAMA_CPP", "")
needs_llama_cpp = pytest.mark.skipif(not FOLDER, reason="LLAMA_CPP does not name llama.cpp's folder")


@pytest.fixture(scope="module")
def known_tokenizer(sandbox_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sandbox with a tokenizer that llama.cpp's converter takes for Llama's: it knows others by their hash."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    shutil.copytree(sandbox_folder, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["byte_fallback"] = True
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"]]}
    path.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def forgotten(known_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("gguf") / "run"
    bad = data_file("hallucination", "forget")
    ran = call("forget", "--model", known_tokenizer, "--bad", bad, "-o", run, "--device", "cpu", *sets(QUICK))
    assert ran.code == 0, ran.stderr
    return run


def llama_logits(model: Path, ids: list[int], lora: Path | None = None) -> torch.Tensor:
    """(T, V)"""
    library = pytest.importorskip("llama_cpp")
    loaded = library.Llama(str(model), lora_path=lora and str(lora), n_ctx=128, logits_all=True, verbose=False)
    loaded.eval(ids)
    return torch.tensor(loaded.scores[: len(ids)])


def library_quantizer(folder: Path) -> list[str]:
    """A --llama-cpp with the real converter and a llama-quantize that calls llama.cpp's library for it."""
    shutil.copytree(FOLDER, folder, ignore=lambda _, names: [n for n in names if n not in CONVERTER and "." not in n])
    script = folder / "build" / "bin" / "llama-quantize"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!{sys.executable}\n{QUANTIZES}")
    script.chmod(0o700)
    return ["--llama-cpp", str(folder)]


def worst(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two models' log-probabilities of tokens that either thinks likelier than 1 in 1000."""
    a, b = one.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((a - b)[torch.maximum(a, b) > -6.9].abs().max())


@pytest.mark.slow
@needs_llama_cpp
def test_llama_cpp_says_what_the_adapter_says(forgotten: Path, known_tokenizer: Path, tmp_path: Path) -> None:
    ids = list(range(20, 60))
    plain = AutoModelForCausalLM.from_pretrained(known_tokenizer, dtype=torch.float32)
    with torch.no_grad():
        untouched = plain(torch.tensor([ids])).logits[0]
        adapted = PeftModel.from_pretrained(plain, forgotten / ADAPTER)(torch.tensor([ids])).logits[0]
    assert worst(untouched, adapted) > 0.5  # what a converter that drops the adapter would be told by
    args = ["--llama-cpp", FOLDER, "--device", "cpu", "--json"]
    for form, most in (("f32", 0.05), ("q8_0", 0.3)):
        made = call("export", forgotten, "-o", tmp_path / form, "--format", "gguf", "--quant", form, *args)
        assert made.code in (0, 5), made.stderr  # so short a run is not forgotten on the unquantised base
        assert list(made.json["scores"]) == ["base", "adapter", form]  # what was written was measured
        assert worst(adapted, llama_logits(tmp_path / form / "model.gguf", ids)) < most
    quantizes = library_quantizer(tmp_path / "tools")
    made = call(
        "export", forgotten, "-o", tmp_path / "q4", "--format", "gguf", "--quant", "q4_0", *quantizes, *args[2:]
    )
    assert made.code in (0, 5), made.stderr
    assert list(made.json["scores"]) == ["base", "adapter", "q4_0"]
    sizes = [(tmp_path / form / "model.gguf").stat().st_size for form in ("q4", "q8_0", "f32")]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2] / 4
    assert worst(adapted, llama_logits(tmp_path / "q4" / "model.gguf", ids)) < 5
    # The base as GGUF, by way of an adapter of zeros, and the real one beside it.
    from safetensors.torch import load_file, save_file

    zero = tmp_path / "zero"
    shutil.copytree(forgotten / ADAPTER, zero)
    tensors = load_file(zero / "adapter_model.safetensors")
    save_file({n: t * 0 if "lora_B" in n else t for n, t in tensors.items()}, zero / "adapter_model.safetensors")
    base = call(
        "export", zero, "-o", tmp_path / "base", "--model", known_tokenizer, "--format", "gguf", "--quant", "f32", *args
    )
    assert base.code in (0, 5), base.stderr
    ran = call("export", forgotten, "-o", tmp_path / "lora", "--format", "gguf-lora", *args[:2])
    assert ran.code == 0, ran.stderr
    gguf = tmp_path / "base" / "model.gguf"
    assert worst(untouched, llama_logits(gguf, ids)) < 0.02
    assert worst(adapted, llama_logits(gguf, ids, tmp_path / "lora" / "adapter.gguf")) < 0.02


def test_what_transformers_does_not_read_back_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """The file is good all the same: it is kept, and it is said beforehand."""
    pytest.importorskip("gguf")
    assert can_read_back("llama") and can_read_back("gemma3_text")
    assert not can_read_back("gpt_neox")
    assert "transformers does not read gpt_neox from GGUF" in capsys.readouterr().err
