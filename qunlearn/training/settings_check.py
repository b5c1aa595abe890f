"""Check settings that name parts of a model against its config and tensors, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.errors import ConfigError, ModelError
from qunlearn.hub.preflight import FolderFacts
from qunlearn.hub.safetensors_file import read_tensors
from qunlearn.memory.families import read_shape

ALL_LINEAR = "all-linear"
_LAYERED = "rmu"  # the objective that looks at one block
# A matrix inside a block, quantised or not: `model.layers.3.self_attn.q_proj.weight`.
_IN_A_BLOCK = re.compile(r".*\.\d+\.(?P<path>.+)\.(weight|qweight|weight_packed|blocks|weight_scale)")


def check_settings(config: Config, facts: FolderFacts) -> None:
    """Raise ModelError for --target-modules that the model lacks, ConfigError for a block that it lacks."""
    if config.objective.name == _LAYERED and config.objective.layer is not None:
        _check_layer(config.objective.layer, facts.config)
    if config.lora.target_modules != ALL_LINEAR:
        _check_targets(config.lora.target_modules, facts)


def _check_layer(layer: int, config: Mapping[str, Any]) -> None:
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    blocks = next(
        (text[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(text.get(k), int)), None
    )
    if blocks is not None and layer > blocks - 2:
        hint = f"the model has {blocks} blocks; at most {blocks - 2} can be steered"
        raise ConfigError(f"no block above block {layer}", where="objective.layer", hint=hint)


def _check_targets(asked: str, facts: FolderFacts) -> None:
    names = [name.strip() for name in asked.split(",") if name.strip()]
    paths = _linear_paths(facts)
    missing = [name for name in names if not any(path == name or path.endswith(f".{name}") for path in paths)]
    if names and not missing:
        return
    there = sorted({path.rsplit(".", 1)[-1] for path in paths})
    hint = f"{ALL_LINEAR}, or some of {', '.join(there)}, with commas; the output head is never trained"
    what = f"linear layers named {', '.join(missing)[:60]!r} in its blocks" if names else f"layers named {asked[:60]!r}"
    raise ModelError(f"the model has no {what}", where="--target-modules", hint=hint)


def _linear_paths(facts: FolderFacts) -> set[str]:
    """The linear layers of the blocks by their path there: as the files name them, and as the architecture does."""
    found = set()
    for file in facts.weight_files:
        for tensor in read_tensors(file):
            match = _IN_A_BLOCK.fullmatch(tensor.name)
            if match and len(tensor.shape) >= 2:
                found.add(match["path"])
    try:
        shape = read_shape(facts.config)
    except ModelError:  # an architecture that is not known: the files alone tell
        return found
    return found | {linear.name for linear, _ in shape.linears()}
