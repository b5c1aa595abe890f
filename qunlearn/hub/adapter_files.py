"""Check an adapter's two files before peft reads them: peft imports and builds what they name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError, ModelError
from qunlearn.hub.module_patterns import MOST_STEPS, match_steps
from qunlearn.hub.safetensors_file import read_tensors
from qunlearn.utils.json_files import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_RANK = 1 << 16
_MAX_MODULES = 20_000
_LEAST_NAMES, _LEAST_LENGTH = (
    400,
    40,
)  # modules of a model, and characters of their names: those that are not adapted too
_KEPT_PATTERNS, _COMPILING = 500, 100  # how many the regular-expression library keeps compiled; in steps
# Options that hold names or patterns of modules, and whether anything may stand before what they match.
_PATTERNS = {
    "target_modules": False, "exclude_modules": False, "layers_pattern": True, "rank_pattern": True,
    "alpha_pattern": True, "modules_to_save": True,
}  # fmt: skip
_NAMES = ("target_modules", "exclude_modules")
_CODE = {  # options whose values peft imports as modules
    "auto_mapping": "names Python code to import",
    "megatron_config": "names Python code to import (megatron_core)",
    "layer_replication": "replicates the model's layers",
}


def check_adapter(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, once its configuration asks for nothing strange. Raises AdapterError."""
    config_path, weights = folder / CONFIG, folder / WEIGHTS
    if not config_path.is_file() or not weights.is_file():
        hint = "give a run folder, or a folder with adapter_config.json and adapter_model.safetensors"
        raise AdapterError("no adapter in the folder", where=str(folder), hint=hint)
    config = _config(config_path)
    try:
        tensors = {tensor.name: tensor.shape for tensor in read_tensors(weights)}
    except ModelError as error:
        raise AdapterError(error.message, where=error.where, hint="copy or make it again") from error
    where = str(config_path)
    for key, what in _CODE.items():
        if config.get(key):
            raise AdapterError(f"{key} {what}: not used", where=where, hint="save it again as plain LoRA")
    if config.get("peft_type") == "LORA":
        _check_ranks(config, tensors, where)
    _check_modules(config, tensors, where)
    return tensors


def _config(path: Path) -> dict[str, Any]:
    config = read_object(path, hint="copy or make it again")
    if not isinstance(config.get("peft_type"), str):
        raise AdapterError("does not say what kind of adapter it is (peft_type)", where=str(path))
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise AdapterError("base_model_name_or_path is not a text", where=str(path))
    return config


def _check_ranks(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], where: str) -> None:
    """No rank beyond what the tensors have: peft would allocate it first and compare afterwards."""
    largest = max((min(shape, default=0) for shape in tensors.values()), default=0)
    patterns = config.get("rank_pattern") or {}
    if not isinstance(patterns, dict):
        raise AdapterError("rank_pattern is not an object", where=where)
    for rank in (config.get("r"), *patterns.values()):
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= min(largest, _MAX_RANK):
            message = f"a rank of {str(rank)[:40]}, and the tensors have at most {largest}"
            raise AdapterError(message, where=where, hint="the two files are of different adapters")


def _check_modules(config: Mapping[str, Any], tensors: Mapping[str, object], where: str) -> None:
    """Names and patterns of modules must be texts that are matched in no time. Raises AdapterError."""
    frame = len("base_model.model.") + len(".lora_A.weight")
    length = max(_LEAST_LENGTH, max(map(len, tensors), default=0) - frame)
    names, steps, found = max(_LEAST_NAMES, len(tensors) // 2), 0.0, 0
    for key, inside in _PATTERNS.items():
        value = config.get(key)
        texts = value if isinstance(value, list) else list(value) if isinstance(value, dict) else [value]
        compiling = _COMPILING if len(texts) > _KEPT_PATTERNS else 0
        compared = isinstance(value, list) and key in _NAMES  # as they are, with the ends of names
        for text in filter(lambda text: text is not None, texts):
            cost = match_steps(text, length, inside=inside) if isinstance(text, str) else math.inf
            steps += cost if compared else names * (cost + compiling)
            if steps > MOST_STEPS:
                message = f"a pattern that is not understood, or takes too long to match: {str(text)[:60]!r}"
                raise AdapterError(message, where=where, hint="name the modules instead")
        found += len(texts)
    if found > _MAX_MODULES:
        raise AdapterError(f"{found} names of modules", where=where)
