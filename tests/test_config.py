"""Defaults, overlays, and what is said about a wrong value."""

from __future__ import annotations

from pathlib import Path

import pytest

from qunlearn.config import SETTINGS, Config
from qunlearn.errors import ConfigError
from qunlearn.overlay import parse_set, read_config_file, resolve, to_yaml


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
        ("train: 3", "section 'train' does not hold settings"),
    ],
)
def test_a_broken_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_config_file(path)


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
