"""Settings for which a model has no parts are refused from its files, before it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import call

from qunlearn.errors import ConfigError, ModelError
from qunlearn.model.folder import FolderFacts, preflight_folder
from qunlearn.model_settings import check_model_settings, linear_names
from qunlearn.overlay import resolve
from qunlearn.sandbox import data_file

PROJECTIONS = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.fixture(scope="module")
def facts(sandbox_folder: Path) -> FolderFacts:
    return preflight_folder(sandbox_folder)


def test_the_linear_layers_are_told_from_the_tensors_names(facts: FolderFacts) -> None:
    assert linear_names(facts.tensor_names) == PROJECTIONS


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora.target_modules": "nonexistent"}, "no linear layers named 'nonexistent'"),
        ({"lora.target_modules": "q_proj,v_prj"}, "no linear layers named 'v_prj'"),
        ({"lora.target_modules": ".*"}, "no linear layers named"),
        ({"lora.target_modules": "input_layernorm"}, "no linear layers named"),
        ({"lora.target_modules": "embed_tokens"}, "no linear layers named"),
        ({"lora.target_modules": ""}, "names no module"),
        ({"lora.target_modules": ",, "}, "names no module"),
        ({"lora.target_modules": "q_proj,lm_head"}, "output head"),
        ({"objective.name": "rmu", "objective.layer": 3}, "no block above block 3"),
        ({"objective.name": "rmu", "objective.layer": 999}, "no block above block 999"),
    ],
)
def test_what_the_model_has_not_is_refused(settings: dict[str, object], says: str, facts: FolderFacts) -> None:
    with pytest.raises((ConfigError, ModelError)) as caught:
        check_model_settings(resolve(("x", settings)), facts)
    assert says in str(caught.value) and caught.value.hint


@pytest.mark.parametrize(
    "targets", ["all-linear", "q_proj", " q_proj , self_attn.v_proj", "model.layers.0.mlp.up_proj"]
)
def test_what_it_has_is_taken(targets: str, facts: FolderFacts) -> None:
    config = resolve(("x", {"lora.target_modules": targets, "objective.name": "rmu", "objective.layer": 2}))
    check_model_settings(config, facts)
    check_model_settings(resolve(("x", {"lora.target_modules": "any"})), replace(facts, tensor_names=frozenset()))


def test_a_dry_run_says_so(tmp_path: Path) -> None:
    """It ended with 0 where the run itself was refused after loading."""
    argv = ("forget", "--model", "sandbox", "--bad", data_file("harm", "forget"), "-o", tmp_path / "run")
    ran = call(*argv, "--target-modules", "nonexistent", "--dry-run")
    assert ran.code == 6 and "q_proj" in ran.stderr
