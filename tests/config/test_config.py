"""Defaults, overlays, and what is said about a wrong value."""

from __future__ import annotations

from pathlib import Path

import pytest

from qunlearn.config.resolve import parse_set, read_config_file, resolve, to_yaml
from qunlearn.config.settings import SETTINGS, Config
from qunlearn.errors import ConfigError


def test_defaults_are_the_dataclasses() -> None:
    assert resolve() == Config()


def test_later_overlays_win() -> None:
    config = resolve(("recipe", {"train.lr": 1e-4, "train.steps": 7}), ("command line", {"train.lr": "2e-4"}))
    assert (config.train.lr, config.train.steps) == (2e-4, 7)


@pytest.mark.parametrize(
    ("key", "near"), [("train.lrr", "train.lr"), ("lr", "train.lr"), ("model.quants", "model.quant")]
)
def test_unknown_key_has_a_suggestion(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        resolve(("--set", {key: 1}))


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("train.steps", 0, "at least 1"),
        ("train.steps", 1.5, "whole number"),
        ("train.lr", "fast", "a number"),
        ("train.lr", "nan", "at least"),
        ("stop.target", 2, "at most 1"),
        ("model.quant", "nf5", "one of nf4"),
        ("train.pack", "perhaps", "true or false"),
        ("train.steps", True, "a number"),
        ("train.seed", None, "needs a value"),
        ("train.steps", "inf", "whole number"),
    ],
)
def test_wrong_values(key: str, value: object, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        resolve(("--set", {key: value}))


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(("a.yaml", {"train.step": 1}), ("--set", {"lora.r": 0}))
    assert "train.step" in str(caught.value)
    assert "lora.r" in str(caught.value)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = resolve(("x", {"train.lr": 1e-4, "data.bad": "bäd.jsonl", "objective.floor_nll": 3.0}))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert resolve((str(path), read_config_file(path))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", ":1: is not YAML"),
        ("train:\n  steps: 3\n bad", ":3: is not YAML"),
        ("trian:\n  steps: 3", "did you mean 'train'"),
        ("- 1", "unknown section"),
        ("train: 3", "section 'train' holds settings, one a line, not 3"),
        (
            "train: {steps: 3}\nlora: {r: 4}\ntrain: {clip: 2}",
            ":3: is not YAML: the key 'train' is there twice, first in line 1",
        ),
        (
            "train:\n  steps: 3\n  clip: 1\n  steps: 4",
            ":4: is not YAML: the key 'steps' is there twice, first in line 2",
        ),
    ],
)
def test_a_broken_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_config_file(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("0x10", 16), ("0o10", 8), ("1e3", 1000), ("1_000", "1_000"), ("1:30", "1:30"), ("on", "on")],
)
def test_numbers_and_words_of_yaml_are_what_they_look_like(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"train:\n  seed: {text}\n", encoding="utf-8")
    assert read_config_file(path) == {"train.seed": value}


@pytest.mark.parametrize("text", ["on", "1e5", "0o17", "1:30", "2024-01-01", "null", "~x", "010", "", ".inf", "a: b"])
def test_every_text_comes_back_from_yaml(tmp_path: Path, text: str) -> None:
    config = resolve(("x", {"data.template": text, "objective.floor_nll": "inf"}))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert resolve((str(path), read_config_file(path))) == config


@pytest.mark.parametrize("seed", [2**53 + 1, 2**63 - 1])
def test_large_seeds_are_exact(seed: int) -> None:
    assert resolve(("--set", {"train.seed": str(seed)})).train.seed == seed
    assert resolve(("x.yaml", {"train.seed": seed})).train.seed == seed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.seed", 2**63),
        ("train.seed", "9" * 400),
        ("train.seed", 1e300),
        ("train.steps", "\u0661\u0662"),
        ("train.steps", 10**400),
        ("train.warmup", "1e300"),
        ("stop.probe_rows", 1e300),
        ("lora.alpha", "1e300"),
        ("lora.alpha", 1e300),
        ("train.weight_decay", "inf"),
        ("stop.max_drift", float("inf")),
        ("objective.delta", "nan"),
        ("objective.beta2", 10**400),
        ("objective.direction_seed", "-1"),
        ("model.vram", "9" * 400 + "GiB"),
        ("model.vram", "\u0669GiB"),
        ("model.vram", "6"),
    ],
)
def test_numbers_have_bounds(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        resolve(("--set", {key: value}))


@pytest.mark.parametrize("leaf", ["eps1", "eps2", "eps3", "eps5", "retain_budget"])
def test_weights_that_an_objective_does_not_look_at_are_refused(leaf: str) -> None:
    with pytest.raises(ConfigError, match=f"objective.{leaf} has no effect: mollm"):
        resolve(("--set", {"objective.name": "mollm", f"objective.{leaf}": 0.7}))
    assert resolve(("--set", {"objective.name": "wga", f"objective.{leaf}": 0.7}))


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_steps_for_a_late_target_are_refused_where_nothing_waits_for_it(schedule: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.more_steps has no effect"):
        resolve(("--set", {"train.schedule": schedule, "train.more_steps": 5}))
    assert resolve(("--set", {"train.schedule": schedule, "train.more_steps": 0})).train.for_rows(1).most_steps == 220
    assert resolve(("--set", {"train.steps": 7, "train.more_steps": 5})).train.for_rows(1).most_steps == 12


def test_a_stored_mollm_run_is_read_again(tmp_path: Path) -> None:
    config = resolve(("--set", {"objective.name": "mollm", "objective.eps3": 0}))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert resolve((str(path), read_config_file(path))) == config


def test_every_number_has_bounds() -> None:
    for setting in SETTINGS.values():
        if setting.base_type in (int, float):
            assert setting.least > -float("inf"), setting.key
            assert setting.most < float("inf") or setting.key == "objective.floor_nll"


def test_a_home_folder_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(("x.yaml", {"data.bad": "~/bad.jsonl"})).data.bad == str(tmp_path / "bad.jsonl")


def test_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config_file(tmp_path / "none.yaml")


def test_no_weights_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        resolve(("--set", {"objective.eps1": 0, "objective.eps2": 0, "objective.eps3": 0}))


def test_set_needs_an_equals_sign() -> None:
    assert parse_set(["a.b = 1"]) == {"a.b": "1"}
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        parse_set(["a.b"])


def test_flags_are_unique_and_every_setting_has_help() -> None:
    flags = [s.flag for s in SETTINGS.values() if s.flag]
    assert len(flags) == len(set(flags))
    assert all(s.help for s in SETTINGS.values())
