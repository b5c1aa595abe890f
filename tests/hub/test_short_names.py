"""Short names and how what the user typed is resolved."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qunlearn.errors import ConfigError, ModelError
from qunlearn.hub.short_names import SHORT_NAMES, ModelSource, close_names, known_model, resolve_model


@pytest.fixture(autouse=True)
def empty_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(name: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        resolve_model(name)
    error = caught.value
    assert error.exit_code == 6 and error.where and error.hint
    return error


def test_table_is_well_formed() -> None:
    for name, model in SHORT_NAMES.items():
        assert name == model.name == name.lower() and model.params_b > 0
        assert name == "sandbox" or re.fullmatch(r"[\w.-]+/[\w.-]+", model.hub_id)
    ids = [model.hub_id.lower() for model in SHORT_NAMES.values()]
    assert len(set(ids)) == len(ids)


def test_the_size_in_a_name_is_the_size_in_the_table() -> None:
    for name, model in SHORT_NAMES.items():
        size = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b\b", name)
        if size:  # "2b" of Gemma counts no embeddings, hence the wide margin
            assert model.params_b == pytest.approx(float(size[1]), rel=0.31), name


@pytest.mark.parametrize("name", list(SHORT_NAMES))
def test_every_short_name_resolves_in_any_case(name: str) -> None:
    source = resolve_model(name.upper())
    assert source.short_name == name
    if name != "sandbox":
        assert (source.kind, source.location) == ("hub", SHORT_NAMES[name].hub_id)


def test_sandbox_is_a_folder_of_the_package() -> None:
    source = resolve_model("sandbox")
    assert source.kind == "sandbox" and Path(source.location).is_absolute()
    assert Path(source.location).parts[-4:] == ("qunlearn", "sandbox", "assets", "model")
    gold = resolve_model("sandbox-gold")
    assert gold.kind == "sandbox" and Path(gold.location) == Path(source.location).parent / "gold"


def test_existing_folder_wins_over_short_name_and_hub_id(tmp_path: Path) -> None:
    for name in ("gpt2", "org/model"):
        (tmp_path / name).mkdir(parents=True)
        source = resolve_model(name)
        assert (source.kind, source.location) == ("folder", str((tmp_path / name).resolve()))
        assert source.base_id == source.location and source.short_name is None


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert resolve_model("~/m").location == str((tmp_path / "m").resolve())


def test_hub_id_keeps_its_revision() -> None:
    source = resolve_model(" someorg/Some-Model_1.5 ", "refs/pr/3")
    assert source == ModelSource("someorg/Some-Model_1.5", "hub", "someorg/Some-Model_1.5", "refs/pr/3")
    assert source.base_id == "someorg/Some-Model_1.5"


def test_known_hub_id_has_its_short_name_and_spelling() -> None:
    source = resolve_model("meta-llama/llama-2-7b-HF")
    assert (source.location, source.short_name) == ("meta-llama/Llama-2-7b-hf", "llama-2-7b")
    assert known_model("nobody/nothing") is None


@pytest.mark.parametrize(
    ("location", "base"),
    [
        ("unsloth/Qwen2.5-7B-bnb-4bit", "unsloth/Qwen2.5-7B"),
        ("unsloth/Qwen2.5-7B-unsloth-bnb-4bit", "unsloth/Qwen2.5-7B"),
        ("someone/Qwen2.5-7B-bnb-4bit", "someone/Qwen2.5-7B-bnb-4bit"),
    ],
)
def test_base_id_is_the_16_bit_model(location: str, base: str) -> None:
    assert resolve_model(location).base_id == base


@pytest.mark.parametrize(
    "name", ["./gone", "/gone", "../gone", "~/gone", "~nobody-of-that-name/x", "models/gone/", "a/b/c", "C:\\a\\b"]
)
def test_missing_folder(name: str) -> None:
    assert "no such folder" in refused(name).message


def test_one_slash_behind_a_folder_of_here_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "models" / "llama-mine").mkdir(parents=True)
    (tmp_path / "models" / "llama.txt").touch()
    error = refused("models/llama-min")
    assert "no such folder in the folder models" in error.message
    assert f"did you mean {Path('models/llama-mine')}?" in str(error.hint) and "--revision main" in str(error.hint)
    assert "check the path" in str(refused("models/xyz").hint)


def test_the_hub_is_meant_where_it_is_said_or_known(tmp_path: Path) -> None:
    (tmp_path / "Qwen").mkdir()
    assert resolve_model("Qwen/Qwen3-0.6B").kind == "hub"
    assert resolve_model("Qwen/Other", "main").kind == "hub"
    assert resolve_model("Qwen/Other", typed=False).kind == "hub"


def test_a_path_is_answered_with_the_closest_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / "Llama-mine").mkdir(parents=True)
    assert "Llama-mine?" in str(refused("./models/llama-min").hint)
    assert "models?" in str(refused("model").hint)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "m.safetensors").write_bytes(b"")
    assert "GGUF" in str(refused("m.gguf").hint)
    assert "a file" in refused("m.safetensors").message


def test_an_address_is_answered_with_its_hub_id() -> None:
    assert "org/name" in str(refused("https://huggingface.co/org/name/tree/main").hint)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("llama2-7b", "llama-2-7b"), ("mistral7b", "mistral-7b"), ("Qwen2.5_7B", "qwen2.5-7b"), ("phi2", "phi-2")],
)
def test_unknown_name_is_answered_with_close_ones(name: str, meant: str) -> None:
    error = refused(name)
    assert meant in close_names(name) and meant in str(error.hint) and "qunlearn models" in str(error.hint)


@pytest.mark.parametrize(
    "name", ["", "  ", "no spaces allowed", "bert-base", "a--b/c", "org/", "x" * 5000, "o/" + "x" * 99]
)
def test_unknown_name(name: str) -> None:
    assert "qunlearn models" in str(refused(name).hint)


@pytest.mark.parametrize("name", [".", "sandbox"])
def test_a_revision_needs_the_hub(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(name, "main")
    assert caught.value.where == "--revision" and caught.value.hint
