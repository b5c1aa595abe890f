"""Settings that a model may not have the parts for, checked from its files before it is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qunlearn.config import Config
from qunlearn.errors import ConfigError, ModelError
from qunlearn.model.folder import FolderFacts

_ALL = "all-linear"
_HEADS = ("lm_head", "embed_out")
_MATRICES, _NORM = ("weight", "qweight", "weight_packed"), re.compile("norm|^ln_|_ln$", re.IGNORECASE)
_BLOCKS = ("num_hidden_layers", "n_layer", "num_layers")


def check_model_settings(config: Config, facts: FolderFacts) -> None:
    """Refuse target modules and layers that the model has not. Raises ConfigError, ModelError.

    Told from the names of the checkpoint's tensors and from config.json: minutes of loading would end the same.
    """
    _check_targets(config.lora.target_modules, linear_names(facts.tensor_names))
    blocks, layer = _block_count(facts.config), config.objective.layer
    if layer is not None and blocks is not None and layer > blocks - 2:
        hint = f"the model has {blocks} blocks; at most {blocks - 2} can be steered"
        raise ConfigError(f"no block above block {layer}", where="objective.layer", hint=hint)


def _check_targets(text: str, there: frozenset[str]) -> None:
    if text == _ALL:
        return
    asked = [name for part in text.split(",") if (name := part.strip())]
    some = ", ".join(sorted(there)[:12])
    hint = f"{_ALL}, or some of {some}" if some else f"{_ALL}, or names such as q_proj,v_proj"
    if not asked:
        raise ConfigError("names no module", where="--target-modules", hint=hint)
    leaves = [name.rsplit(".", 1)[-1] for name in asked]
    if head := next((name for name in leaves if name in _HEADS), None):
        message = f"{head} is the output head, which stays as it is: the reference shares it"
        raise ConfigError(message, where="--target-modules", hint=hint)
    strange = [name for name, leaf in zip(asked, leaves, strict=True) if there and leaf not in there]
    if strange:
        message = f"the model has no linear layers named {', '.join(map(repr, strange))[:120]}"
        raise ModelError(message, where="--target-modules", hint=hint)


def _block_count(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        found = next((part[key] for key in _BLOCKS if isinstance(part.get(key), int)), None)
        if found is not None:
            return int(found)
    return None


def linear_names(tensors: Iterable[str]) -> frozenset[str]:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`, however quantised; no norms, nothing outside blocks."""
    found = set()
    for tensor in tensors:
        parts = tensor.split(".")
        at = next((i for i, part in enumerate(parts) if part in _MATRICES), 0)
        if at and any(part.isdigit() for part in parts[:at]) and not _NORM.search(parts[at - 1]):
            found.add(parts[at - 1])
    return frozenset(name for name in found if not name.isdigit())
