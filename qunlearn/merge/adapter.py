"""A LoRA adapter as data: which low-rank product goes to which module, from its two files alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError, ModelError
from qunlearn.model.tensorfile import Stored, read_tensors
from qunlearn.run import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# What plain LoRA's update B A depends on, and what says nothing about it. Any other option that is switched on means
# an update of another form: better refused than merged wrongly.
_UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "bias"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "eva_config"),
}
_EXPLAINED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules beside the adapter (modules_to_save)",
    "trainable_token_indices": "trained tokens",
    "lora_bias": "a bias of its own (lora_bias)",
    "layer_replication": "replicated layers",
    "target_parameters": "parameters that are not linear layers (target_parameters)",
}
# These begin at W + B A = W, or at another W; only in the first case is B A the whole update.
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")
_MAX_RANK, _MAX_NAME = 1 << 16, 500
# A pattern with a quantified group, or with many quantifiers, may take for ever to match: it is not used.
_PLAIN_PATTERN = re.compile(r"[\w.^$\\|()\[\]*+-]*", re.ASCII)
_MAX_QUANTIFIERS = 4


@dataclass(frozen=True)
class Update:
    """W <- W + scale * B A for one module, named as in the model. a: (r, in), b: (out, r)."""

    module: str
    a: Stored
    b: Stored
    scale: float


def read_adapter(folder: Path) -> tuple[Update, ...]:
    """The updates of a LoRA adapter folder, each of its tensors in exactly one.

    Raises AdapterError for anything that is not plain LoRA on linear layers, naming it.
    """
    config = _config(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        raise AdapterError(f"no {WEIGHTS} in the folder", where=str(folder), hint="pickled adapters are not opened")
    try:
        tensors = read_tensors(path)
    except ModelError as error:
        raise AdapterError(error.message, where=error.where, hint="copy or make it again") from error
    pairs: dict[str, dict[str, Stored]] = {}
    for tensor in tensors:
        match = _NAME.fullmatch(tensor.name)
        if match is None or len(tensor.name) > _MAX_NAME:
            raise _unlike(tensor, path)
        pairs.setdefault(match["module"], {})[match["factor"]] = tensor
    if not pairs:
        raise AdapterError("holds no tensors", where=str(path), hint="copy or make it again")
    return tuple(_update(module, pair, config, folder) for module, pair in pairs.items())


def _config(path: Path) -> Mapping[str, Any]:
    config = read_object(path, hint="copy or make it again")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"an adapter of kind {str(kind)[:40]!r}", where=str(path), hint="only LoRA can be merged")
    hint = "merge it with the library that made it"
    for key, value in config.items():
        if key not in _UNDERSTOOD and value not in (None, False, {}, []):
            raise AdapterError(f"not plain LoRA: {_EXPLAINED.get(key, key)}", where=str(path), hint=hint)
    if config.get("bias", "none") != "none":
        raise AdapterError("not plain LoRA: trained biases", where=str(path), hint=hint)
    start = config.get("init_lora_weights", True)
    if start not in _HARMLESS_INITS:
        message = f"not plain LoRA: {str(start)[:40]!r} begins with changed base weights"
        hint = "save it converted to plain LoRA (peft: path_initial_model_for_weight_conversion)"
        raise AdapterError(message, where=str(path), hint=hint)
    return config


def _unlike(tensor: Stored, path: Path) -> AdapterError:
    message = f"the tensor {tensor.name[:120]!r} is not a factor of a low-rank update of a linear layer"
    return AdapterError(message, where=str(path), hint="only plain LoRA can be merged")


def _update(module: str, pair: Mapping[str, Stored], config: Mapping[str, Any], folder: Path) -> Update:
    where = str(folder / WEIGHTS)
    if set(pair) != {"A", "B"}:
        missing = next(iter({"A", "B"} - set(pair)))
        raise AdapterError(f"{module} has no lora_{missing}", where=where, hint="copy or make it again")
    a, b = pair["A"], pair["B"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise _unlike(a if len(a.shape) != 2 else b, folder / WEIGHTS)
    rank = a.shape[0]
    if b.shape[1] != rank or not 0 < rank <= _MAX_RANK:
        message = f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit together"
        raise AdapterError(message, where=where, hint="copy or make it again")
    for tensor in pair.values():
        if tensor.dtype not in ("F32", "BF16", "F16"):
            raise AdapterError(f"{tensor.name} is of type {tensor.dtype}", where=where, hint="save it in 16 or 32 bits")
    said = _of_module(config, "rank_pattern", "r", module, folder)
    if said != rank:
        message = f"{module} has rank {rank}, {CONFIG} says {said}"
        raise AdapterError(message, where=where, hint="the two files are of different adapters")
    alpha = _of_module(config, "alpha_pattern", "lora_alpha", module, folder)
    return Update(module, a, b, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _of_module(config: Mapping[str, Any], patterns: str, plain: str, module: str, folder: Path) -> float:
    """The rank or alpha of a module: of the first pattern that matches its name's end, else the general one."""
    value = config.get(plain)
    table = config.get(patterns) or {}
    where = str(folder / CONFIG)
    if not isinstance(table, dict):
        raise AdapterError(f"{patterns} is not an object", where=where)
    for pattern, own in table.items():
        if _matches(pattern, module, f"{where}: {patterns}"):
            value = own
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AdapterError(f"{plain} of {module} is not a number: {str(value)[:40]!r}", where=where)
    return value


def _matches(pattern: str, module: str, where: str) -> bool:
    quantifiers = len(re.findall(r"[*+]", pattern))
    plain = _PLAIN_PATTERN.fullmatch(pattern) and not re.search(r"\)[*+]", pattern) and len(pattern) <= 200
    if not plain or quantifiers > _MAX_QUANTIFIERS:
        raise AdapterError(f"a pattern that is not understood: {pattern[:60]!r}", where=where, hint="name the modules")
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise AdapterError(f"not a pattern: {pattern[:60]!r} ({error})", where=where) from error
