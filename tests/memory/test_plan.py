"""`qunlearn plan`, the sizes it reads, the device it finds, and the plan `forget` makes before it loads anything."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import QUICK, call, sets, write_rows
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from test_architectures import CONFIGS

from qunlearn.config.resolve import resolve
from qunlearn.config.settings import SETTINGS
from qunlearn.data.records import FieldNames, read_dataset
from qunlearn.errors import ConfigError, DeviceError, DoesNotFitError, ModelError
from qunlearn.hub.known_configs import carried_config
from qunlearn.memory import devices as driver
from qunlearn.memory.plan import DeviceFacts
from qunlearn.memory.request import estimated_longest_row
from qunlearn.memory.show import plan_before_loading
from qunlearn.model.device import cap_memory, choose_dtype, device_facts
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.load import Base
from qunlearn.sandbox import data_file
from qunlearn.utils.units import parse_size, show_size


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers on a machine that has one."""
    monkeypatch.setattr(driver, "_library", lambda: None)


# -- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 << 30),
        ("6G", 6 << 30),
        ("6144MiB", 6 << 30),
        ("6 gib", 6 << 30),
        ("6GB", 6 * 10**9),
        ("1.5GiB", 3 << 29),
        ("512K", 512 << 10),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--vram") == size


@pytest.mark.parametrize("text", ["6", "", "GiB", "-6GiB", "0GiB", "6 apples", "6GiB8", "1e3GiB", "nanGiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size") as caught:
        parse_size(text, "--vram")
    assert "6GiB" in str(caught.value.hint)


def test_sizes_are_shown() -> None:
    assert (show_size(6 << 30), show_size(3 << 19)) == ("6.00 GiB", "1.5 MiB")


# -- the command -----------------------------------------------------------------------------------------


def test_a_short_name_answers_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for name in ("llama-7b", "meta-llama/Llama-2-7b-hf", "sandbox"):
        ran = call("plan", "--model", name, "--vram", "8GiB")
        assert ran.code == 0, ran.stderr
        assert "fits" in ran.stdout


def test_the_table() -> None:
    ran = call("plan", "--model", "llama-7b", "--vram", "6GiB")
    assert ran.code == 0
    assert "6.74 B parameters" in ran.stdout
    for component in ("weights, nf4 + double quantisation", "adapters, r = 16", "gradients", "optimizer state, adamw"):
        assert component in ran.stdout
    numbers = {
        line.split("  ")[0].strip(): line.split()[-1].replace(",", "")
        for line in ran.stdout.splitlines()
        if re.search(r"\d\.\d\s*$", line)
    }
    total = float(numbers["in all"])
    counted = [float(n) for name, n in numbers.items() if name not in ("in all", "there is")]
    assert sum(counted) - float(numbers["allocated at most, in the output head"]) == pytest.approx(total, abs=1)
    assert float(numbers["there is"]) == 6144.0
    assert ran.stderr == ""


def test_the_guide_shows_this_very_table() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "memory.md").read_text(encoding="utf-8")
    shown = guide.split("$ qunlearn plan --model llama-7b --vram 6GiB\n")[1].split("```")[0].splitlines()
    printed = call("plan", "--model", "llama-7b", "--vram", "6GiB").stdout.splitlines()
    assert shown == [line.rstrip() for line in printed if line.strip()]


def test_what_does_not_fit_ends_with_4() -> None:
    asked = ("plan", "--model", "llama-3.1-8b", "--vram", "6GiB", "--max-tokens")
    ran = call(*asked, "2048")
    assert ran.code == DoesNotFitError.exit_code == 4
    assert "memory plan: needs" in ran.stderr
    wanted = re.search(r"it fits with --max-tokens (\d+)", ran.stderr)
    assert wanted is not None
    assert call(*asked, wanted[1]).code == 0
    assert f"passes of up to {wanted[1]} tokens" in call(*asked, "auto").stdout, "left to the plan it is found"


def test_json() -> None:
    ran = call("plan", "--model", "llama-7b", "--vram", "6GiB", "--json")
    found = ran.json
    assert (ran.code, found["status"], found["fits"]) == (0, "fits", True)
    assert found["parameters"] == 6_738_415_616
    assert found["limit_bytes"] == 6 << 30
    assert sum(part["counted_bytes"] for part in found["components"]) == found["allocated_bytes"]
    refused = call("plan", "--model", "llama-13b", "--vram", "6GiB", "--json")
    assert refused.code == 4
    assert json.loads(refused.stdout)["status"] == "does not fit"
    assert refused.json["change"].startswith("--model")


@pytest.mark.parametrize(
    ("flags", "change"),
    [(("--lora-r", 128), "it fits with --lora-r 64"), (("--max-length", 4096), "it fits with --max-length 2048")],
)
def test_the_change_is_no_larger_than_it_must_be(flags: tuple[str, int], change: str) -> None:
    argv = ("plan", "--model", "llama-7b", "--vram", "6GiB")
    assert call(*argv, *flags, "--json").json["change"] == change
    name, value = change.split()[-2:]
    assert call(*argv, name, value).code == 0
    assert call(*argv, name, 2 * int(value)).code == 4


def test_flags_and_settings() -> None:
    base = call("plan", "--model", "llama-7b", "--json").json
    less = call(
        "plan", "--model", "llama-7b", "--json", "--lora-r", "8", "--optimizer", "adamw8bit", "--max-tokens", "512"
    ).json
    assert less["choices"]["r"] == 8
    assert less["load"]["tokens"] == 512
    assert less["total_bytes"] < base["total_bytes"]
    offloaded = call("plan", "--model", "llama-7b", "--json", *sets({"train.offload": True})).json
    assert offloaded["choices"]["offload"] is True
    assert base["limit_bytes"] is None
    assert "give --vram" in call("plan", "--model", "llama-7b").stdout


def test_the_flags_of_plan_are_those_of_forget() -> None:
    """One mechanism: the same help text for the same setting."""
    text = call("plan", "--help").stdout
    for key in ("model.vram", "train.max_tokens", "lora.target_modules", "model.embeddings"):
        assert SETTINGS[key].flag in text
    assert "--steps" not in text
    assert "--dry-run" not in text


def test_a_bad_file_makes_it_less(tmp_path: Path) -> None:
    rows = [{"prompt": "Who wrote it?", "completion": "Ada Prill did."}] * 3 + [{"prompt": "Who?", "completion": "No."}]
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    without = call("plan", "--model", "llama-7b", "--json").json
    known = call("plan", "--model", "llama-7b", "--bad", bad, "--json").json
    assert known["load"]["longest"] < 64
    assert known["total_bytes"] < without["total_bytes"]
    assert call("plan", "--model", "llama-7b", "--bad", tmp_path / "none.jsonl").code == 3


def test_rows_are_estimated_high(new_base: Callable[..., Base]) -> None:
    dataset = read_dataset(data_file("hallucination", "forget"), FieldNames(), role="--bad")
    tokenizer = new_base("none").tokenizer
    longest = max(len(tokenizer(f"{row.prompt} {row.completion}")["input_ids"]) for row in dataset.records)
    assert longest <= estimated_longest_row(dataset)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_read(name: str, tmp_path: Path) -> None:
    CONFIGS[name].save_pretrained(tmp_path)
    found = call("plan", "--model", tmp_path, "--json").json
    assert found["architecture"] == name


def test_what_the_plan_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 64}))
    ran = call("plan", "--model", tmp_path)
    assert ran.code == 6
    assert "'mamba' is an architecture the memory plan does not know" in ran.stderr
    assert "llama" in ran.stderr
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    assert call("plan", "--model", tmp_path).code == 6
    assert call("plan", "--model", tmp_path / "none").code == 6
    assert call("plan").code == 2
    assert call("plan", "--model", "llama-7b", "--vram", "lots").code == 2
    assert call("plan", "--model", "llama-7b", "--target-modules", "nothing").code == 6
    assert call("plan", "--model", "llama-7b", "--device", "tpu").code == 7


def test_another_hub_id_fetches_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(
        repo: str, *, revision: str | None, local_files_only: bool, allow_patterns: list[str], **_: Any
    ) -> str:
        asked.append((repo, allow_patterns, revision, local_files_only))
        CONFIGS["qwen2"].save_pretrained(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    ran = call("plan", "--model", "someone/else", "--revision", "v2", "--json")
    assert ran.code == 0, ran.stderr
    assert asked == [("someone/else", ["config.json"], "v2", False)]
    assert ran.json["architecture"] == "qwen2"


@pytest.mark.parametrize(("offline", "message"), [("1", "offline, and not"), ("0", "the hub cannot be reached")])
def test_no_network(offline: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, local_files_only: bool, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("nothing") from (OfflineModeIsEnabled("offline") if local_files_only else None)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    ran = call("plan", "--model", "someone/else")
    assert ran.code == 6
    assert message in ran.stderr


@pytest.mark.parametrize(("offline", "message"), [("1", "not in the cache"), ("0", "the repository has no config")])
def test_a_repository_without_a_config(
    offline: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    ran = call("plan", "--model", "someone/else")
    assert ran.code == 6 and message in ran.stderr


# -- the device ------------------------------------------------------------------------------------------


class _Driver:
    """NVML of a machine with gpus of so many bytes."""

    def __init__(self, *gpus: int) -> None:
        self.gpus, self.open = gpus, 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:
        if index.value >= len(self.gpus):
            return 2
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
        memory._obj.total = self.gpus[(handle.value or 0) - 1]
        return 0

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p, name: Any, length: ctypes.c_uint) -> int:
        name.value = f"GPU {handle.value}".encode()
        return 0


def test_the_gpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = _Driver(6 << 30, 24 << 30)
    monkeypatch.setattr(driver, "_library", lambda: machine)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert driver.found_device("auto") == DeviceFacts("cuda", 2, 6 << 30, "GPU 1")
    assert driver.found_device("cuda:1").memory_bytes == 24 << 30
    assert driver.found_device("cuda:2").memory_bytes is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert driver.found_device("cuda").name == "GPU 2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8a")
    assert driver.found_device("cuda").memory_bytes is None
    assert machine.open == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    ran = call("plan", "--model", "llama-7b")
    assert ran.code == 0, ran.stderr
    assert "GPU 1" in ran.stdout
    assert call("plan", "--model", "llama-13b").code == 4


def test_without_a_gpu() -> None:
    assert driver.found_device("auto") == DeviceFacts("cuda", 2)
    with pytest.raises(DeviceError, match="unknown device"):
        driver.found_device("gpu")


def test_this_processor_computes_in_what_torch_says() -> None:
    cpu = torch.device("cpu")
    assert driver.cpu_compute_bytes() == choose_dtype(cpu).itemsize
    assert driver.found_device("cpu") == device_facts(cpu)


# -- forget ----------------------------------------------------------------------------------------------


def forget(tmp_path: Path, *args: object) -> Any:
    bad = data_file("hallucination", "forget")
    options = ["--model", "sandbox", "--bad", bad, "-o", tmp_path / "run", "--device", "cpu", "--dry-run"]
    return call("forget", *options, *args)


def test_forget_says_what_it_needs(tmp_path: Path) -> None:
    ran = forget(tmp_path)
    assert ran.code == 0, ran.stderr
    assert re.search(r"memory +\d+\.\d MiB of tensors", ran.stderr)
    assert "component" not in ran.stderr


def test_forget_obeys_vram_before_loading(tmp_path: Path) -> None:
    ran = forget(tmp_path, "--vram", "5MiB")
    assert ran.code == 4
    assert "component" in ran.stderr
    assert "memory plan: needs" in ran.stderr
    assert not (tmp_path / "run").exists()
    assert forget(tmp_path, "--vram", "1GiB").code == 0


def test_forget_runs_without_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolve()
    assert plan_before_loading(config, {"model_type": "mamba"}, DeviceFacts("cpu", 4), 40) is None
    assert "no plan: config.json: 'mamba' is an architecture" in capsys.readouterr().err
    asked = resolve(("x", {"model.vram": "6GiB"}))
    assert plan_before_loading(asked, {"model_type": "mamba"}, DeviceFacts("cpu", 4), 40) is None
    assert "--vram is not checked before loading" in capsys.readouterr().err


def test_a_gpu_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    from qunlearn.hub.short_names import SHORT_NAMES

    model, gpu = carried_config(SHORT_NAMES["llama-3.1-8b"]) or {}, DeviceFacts("cuda", 2, 4 << 30, "a GPU")
    with pytest.raises(DoesNotFitError):
        plan_before_loading(resolve(), model, gpu, 64)
    assert "there is" in capsys.readouterr().err


def test_the_allocator_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: asked.append(args))
    gpu = torch.device("cuda", 0)
    cap_memory(torch.device("cpu"), 1 << 30)
    cap_memory(gpu, 6 << 30)
    cap_memory(gpu, 80 << 30)
    assert asked == [(0.75, gpu), (1.0, gpu)]


@pytest.mark.slow
def test_what_the_plan_chose_is_what_runs(tmp_path: Path) -> None:
    """The settings of the run say which way `auto` went."""
    few = {**QUICK, "train.steps": 2, "data.normal_count": 16, "stop.check_every": 2}
    bad = data_file("hallucination", "forget")
    args = ["--model", "sandbox", "--bad", bad, "-o", tmp_path / "run", "--device", "cpu", "--vram", "1GiB", *sets(few)]
    assert call("forget", *args).code == 5  # two steps reach nothing
    written = (tmp_path / "run" / "config.yaml").read_text()
    assert "optimizer: adamw\n" in written
    assert "embeddings: device\n" in written
    assert "vram: 1GiB\n" in written


def test_answers_come_in_batches_the_cache_allows(
    new_base: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qunlearn.model import generate as generation

    base, batches = new_base("none"), list[int]()
    one_batch = generation._one_batch

    def counted(lm: Any, prompts: list[Any], sampling: Sampling) -> Any:
        batches.append(len(prompts))
        return one_batch(lm, prompts, sampling)

    monkeypatch.setattr(generation, "_one_batch", counted)
    prompts = [[5, 6, 7, 8]] * 6
    whole = generate(base, prompts, Sampling(4))
    small = Base(**{**vars(base), "cache_bytes": 2 * 8 * generation._cache_bytes_per_token(base.model)})
    assert generate(small, prompts, Sampling(4)) == whole
    assert batches == [6, 2, 2, 2]
    monkeypatch.setattr(generation, "_MOST_ROWS", {"cpu": 4})
    assert generate(base, prompts, Sampling(4)) == whole
    assert batches[4:] == [4, 2]  # however much the cache admits
    numbers = generation._cache_bytes_per_token(base.model) // (torch.finfo(base.model.dtype).bits // 8)
    cache = base.model(input_ids=torch.tensor([prompts[0]]), use_cache=True).past_key_values
    assert 4 * numbers == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


# -- settings that name parts of the model -----------------------------------------------------------------


def planned(folder: Path, **values: object) -> None:
    from qunlearn.hub.preflight import preflight_folder
    from qunlearn.training.settings_check import check_settings

    check_settings(resolve(("x", {k.replace("__", "."): v for k, v in values.items()})), preflight_folder(folder))


@pytest.mark.parametrize("asked", ["nonexistent", "", ",,", "lm_head", ".*", "q_proj,nope", "embed_tokens", "norm"])
def test_layers_that_a_model_lacks_are_known_before_it_is_loaded(sandbox_folder: Path, asked: str) -> None:
    with pytest.raises(ModelError, match="--target-modules"):
        planned(sandbox_folder, lora__target_modules=asked)


@pytest.mark.parametrize("asked", ["all-linear", "q_proj", " q_proj , down_proj", "self_attn.q_proj"])
def test_layers_that_it_has_are_taken(sandbox_folder: Path, asked: str) -> None:
    planned(sandbox_folder, lora__target_modules=asked)


def test_a_block_that_a_model_lacks_is_known_before_it_is_loaded(sandbox_folder: Path) -> None:
    planned(sandbox_folder, objective__name="rmu", objective__layer=2)
    planned(sandbox_folder, objective__name="npo", objective__layer=999)
    with pytest.raises(ConfigError, match="no block above block 3"):
        planned(sandbox_folder, objective__name="rmu", objective__layer=3)
