"""An adapter's two files, looked at before peft reads them: peft imports and builds what they name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError, ModelError
from qunlearn.model.tensorfile import read_tensors
from qunlearn.run import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAX_RANK = 1 << 16
# A pattern with a quantified group, or with many quantifiers, may take for ever to match: it is not used.
_PLAIN_PATTERN = re.compile(r"[\w.^$\\|()\[\]*+?:-]*", re.ASCII)
_MAX_PATTERN, _MAX_QUANTIFIERS, _MAX_MODULES = 4000, 16, 20_000
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
    _check_modules(config, where)
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


def _check_modules(config: Mapping[str, Any], where: str) -> None:
    """Names and patterns of modules must be texts that are matched in no time."""
    found: list[object] = []
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = config.get(key)
        found += value if isinstance(value, list) else value.keys() if isinstance(value, dict) else [value]
    for text in found:
        if text is None:
            continue
        if not isinstance(text, str) or len(text) > _MAX_PATTERN or not _matches_quickly(text):
            raise AdapterError(f"a pattern that is not understood: {str(text)[:60]!r}", where=where)
    if len(found) > _MAX_MODULES:
        raise AdapterError(f"{len(found)} names of modules", where=where)


def _matches_quickly(text: str) -> bool:
    if not _PLAIN_PATTERN.fullmatch(text) or re.search(r"\)[*+]", text):
        return False
    return len(re.findall(r"[*+]", text)) <= _MAX_QUANTIFIERS
