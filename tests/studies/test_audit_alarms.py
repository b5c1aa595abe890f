"""The study of the audit's false alarms: what its models are, and what its results are called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import audit_alarms as study
from qunlearn.hub.adapter_files import check_adapter


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({}, "standard"),
        ({"only": "E", "smoothing": 0.1}, "standard, E alone, smoothed"),
        ({"only": "weights", "adapter": True}, "standard, weights alone, adapter"),
    ],
)
def test_what_is_not_as_usual_is_in_the_name(how: dict[str, Any], name: str) -> None:
    """Results of one name are counted together, and are not run again."""
    asked = {"budget": "standard", "only": None, "smoothing": 0.0, "adapter": False}
    assert study.label(argparse.Namespace(**asked | how)) == name


def test_an_adapter_of_the_retrained_model_has_learnt_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "STEPS", 2)
    study.make_adapter(tmp_path / "adapter", 3)
    check_adapter(tmp_path / "adapter")
    learnt = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in learnt.items() if "lora_B" in name)
