"""Patterns of an adapter's configuration: what people write is taken, what never ends is not."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qunlearn.errors import AdapterError
from qunlearn.hub.adapter_files import check_adapter
from qunlearn.hub.module_patterns import MOST_STEPS, match_steps
from qunlearn.merging.lora_tensors import read_adapter

MODULES = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(8) for name in "qkvo"]
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
ENDLESS = {
    "stars": ".*" * 15 + "Z",
    "lazy-stars": ".*?" * 15 + "Z",
    "optional": ".?" * 30 + "Z",
    "alternatives": "(.|.)" * 30 + "Z",
    "optional-groups": "(.)?" * 30 + "Z",
    "behind-names": "(?:.|.|.)" * 20 + "Z",
    "quantified-group": "(a+)+Z",
    "counted": ".{1,30}" * 8 + "Z",
    "looking": "(?!a).*",
}


def adapter(folder: Path, **options: Any) -> Path:
    folder.mkdir()
    tensors = {}
    for module in MODULES:
        name = f"base_model.model.{module}.lora_"
        tensors |= {f"{name}A.weight": np.ones((2, 4), np.float32), f"{name}B.weight": np.ones((4, 2), np.float32)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(LORA | options), encoding="utf-8")
    return folder


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern", "exclude_modules", "modules_to_save"])
@pytest.mark.parametrize("pattern", ENDLESS.values(), ids=ENDLESS)
def test_what_would_match_for_ever_is_refused(tmp_path: Path, key: str, pattern: str) -> None:
    value = {pattern: 2} if key == "rank_pattern" else [pattern] if key == "modules_to_save" else pattern
    folder = adapter(tmp_path / "a", **{key: value})
    with pytest.raises(AdapterError, match="takes too long"):
        check_adapter(folder)
    if key == "rank_pattern":
        with pytest.raises(AdapterError, match="takes too long"):
            read_adapter(folder)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)",
        r".*self_attn.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$",
        r"model\.layers\.\d+\.(self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj",
        r"layers\.[0-7]\..*",
        "q_proj",
    ],
)
def test_what_people_write_is_taken(tmp_path: Path, pattern: str) -> None:
    check_adapter(adapter(tmp_path / "a", target_modules=pattern, rank_pattern={pattern: 2}))
    assert len(read_adapter(tmp_path / "a")) == len(MODULES)


def test_a_rank_for_each_module_is_taken(tmp_path: Path) -> None:
    """As methods that find ranks by themselves write them."""
    ranks = {re.escape(module): 2 for module in MODULES} | {f"model.layers.{i}.mlp.up_proj": 2 for i in range(90)}
    folder = adapter(tmp_path / "a", rank_pattern=ranks, r=1)
    check_adapter(folder)
    assert {update.a.shape[0] for update in read_adapter(folder)} == {2}


@pytest.mark.parametrize("pattern", [".*.*.*Z", "a?a?a?a?aaaaZ", "(a|a)(a|a)(a|a)aZ", r"\.*\..*Z"])
def test_no_match_takes_more_steps_than_are_counted(pattern: str) -> None:
    """Time on a name where everything is tried, against that of one step counted generously."""
    name, rounds = "a" * 40, 20
    started = time.process_time()
    for _ in range(rounds):
        assert re.fullmatch(pattern, name) is None
    assert time.process_time() - started < rounds * (1e-6 * match_steps(pattern, len(name)) + 1e-3) + 0.05


@pytest.mark.parametrize("kind", [np.float64, np.int32, np.uint8])
def test_factors_of_another_type_are_no_update(tmp_path: Path, kind: type) -> None:
    folder = adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.astype(kind) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match="is of type"):
        read_adapter(folder)


def test_a_pattern_of_the_merge_is_counted_with_the_star_it_gets(tmp_path: Path) -> None:
    """The name's beginning is matched by a star of ours, which takes as many tries as theirs."""
    longest = max(map(len, MODULES))
    pattern = next(
        made
        for made in (".*" * stars + ".?" * optional + "Z" for stars in range(1, 5) for optional in range(12))
        # Far from the limit, whatever is put before a module's name.
        if match_steps(made, 2 * longest) * len(MODULES) < MOST_STEPS
        and match_steps(made, longest, inside=True) * len(MODULES) > MOST_STEPS
    )
    with pytest.raises(AdapterError, match="takes too long"):
        read_adapter(adapter(tmp_path / "a", rank_pattern={pattern: 2}))
