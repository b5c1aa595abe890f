"""Read a LoRA adapter as data: which low-rank product goes to which module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError, ModelError
from qunlearn.hub.module_patterns import MOST_STEPS, match_steps
from qunlearn.hub.safetensors_file import Stored, read_tensors
from qunlearn.utils.json_files import read_object

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
_MAX_RANK, _MAX_NAME = 1 << 16, 200


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
    modules, where = list(pairs), str(folder / CONFIG)
    ranks = _table(config, "rank_pattern", "r", modules, where)
    alphas = _table(config, "alpha_pattern", "lora_alpha", modules, where)
    rslora = bool(config.get("use_rslora"))
    return tuple(_update(module, pair, ranks, alphas, rslora, folder) for module, pair in pairs.items())


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


def _update(
    module: str, pair: Mapping[str, Stored], ranks: _Table, alphas: _Table, rslora: bool, folder: Path
) -> Update:
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
    said = ranks.of(module)
    if said != rank:
        message = f"{module} has rank {rank}, {CONFIG} says {said}"
        raise AdapterError(message, where=where, hint="the two files are of different adapters")
    return Update(module, a, b, alphas.of(module) / (math.sqrt(rank) if rslora else rank))


@dataclass(frozen=True)
class _Table:
    """The general value of an option, and those of modules that a pattern matches."""

    option: str
    general: object
    patterns: tuple[tuple[re.Pattern[str], object], ...]
    where: str

    def of(self, module: str) -> float:
        """The rank or alpha of a module: of the first pattern that matches its name's end, else the general one."""
        value = next((own for pattern, own in self.patterns if pattern.match(module)), self.general)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            message = f"{self.option} of {module} is not a number: {str(value)[:40]!r}"
            raise AdapterError(message, where=self.where)
        return value


def _table(config: Mapping[str, Any], key: str, option: str, modules: Sequence[str], where: str) -> _Table:
    """Raises AdapterError for patterns that take too long to match all modules' names."""
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise AdapterError(f"{key} is not an object", where=where)
    made, steps, longest = [], 0.0, max(map(len, modules))
    for pattern, own in table.items():
        steps += match_steps(pattern, longest, inside=True) * len(modules)
        if steps > MOST_STEPS:
            message = f"a pattern that is not understood, or takes too long to match: {pattern[:60]!r}"
            raise AdapterError(message, where=f"{where}: {key}", hint="name the modules")
        try:
            made.append((re.compile(rf"(.*\.)?({pattern})$"), own))
        except re.error as error:
            message = f"not a pattern: {pattern[:60]!r} ({error})"
            raise AdapterError(message, where=f"{where}: {key}") from error
    return _Table(option, config.get(option), tuple(made), where)
