"""Map a checkpoint's tensors to the model's parameters, by what transformers says of the class.

A checkpoint need not use the names of the model's modules: transformers 5 renames and fuses tensors while it loads.
The same rules are applied here to names alone, over a model that has shapes but no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from qunlearn.errors import ModelError
from qunlearn.model.quiet import quiet_transformers


@dataclass(frozen=True)
class Anatomy:
    """`stored`: parameter -> the checkpoint's tensor that it is; `fused`: parameters that loading makes of others;
    `shapes`: such a tensor -> the parameter's shape, whatever form it is stored in; `transposed`: linear module ->
    whether its weight is (in, out) rather than (out, in); `tied`: parameters that share their numbers with others."""

    stored: Mapping[str, str]
    fused: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    transposed: Mapping[str, bool]
    modules: frozenset[str]
    tied: frozenset[str]

    def tensor_of(self, module: str) -> str:
        """The checkpoint's tensor that is the weight of a linear module and of nothing else.

        Raises ModelError by name where there is no such module or tensor.
        """
        weight = f"{module}.weight"
        if module not in self.modules:
            raise ModelError(f"the model has no module {module!r}", where=weight, hint="is it another model's adapter?")
        if module not in self.transposed:
            raise ModelError("is not a linear layer", where=weight, hint="only linear layers can be merged")
        if weight in self.tied:
            hint = "untie the embeddings of the base, or train without this module"
            message = "shares its weight with another layer, which a merge would change too"
            raise ModelError(message, where=weight, hint=hint)
        if weight in self.fused:
            message = "is not stored as it is used: transformers makes it from other tensors when it loads"
            raise ModelError(message, where=weight, hint="such weights cannot be merged; serve base and adapter apart")
        if weight not in self.stored:
            raise ModelError("is not in the base's weights", where=weight, hint="is a shard missing?")
        return self.stored[weight]


def skeleton(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model of a folder without its weights, on the meta device. Raises ModelError."""
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            if hasattr(config, "quantization_config"):
                del config.quantization_config  # the plain model: what its modules are before they are replaced
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a config it does not know
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        hint = "is transformers recent enough for this architecture?"
        raise ModelError(first, where=str(folder / "config.json"), hint=hint) from error


def anatomy(model: Any, names: Iterable[str]) -> Anatomy:
    """Resolve the names of a checkpoint's tensors over a skeleton, by transformers' own rules."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    stored: dict[str, str] = {}
    fused: set[str] = set()
    for name in sorted(names, key=dot_natural_key):  # the order in which transformers reads them: some rules have state
        parameter, converted = rename_source_key(name, renamings, converters, prefix, parameters)
        if parameter not in parameters and name in parameters:
            parameter, converted = rename_source_key(name, [], [], prefix, parameters)
        if converted is not None:
            rule = next(rule for rule in converters if converted in rule.source_patterns)
            fused |= {parameter.replace(rule.target_patterns[0], target) for target in rule.target_patterns}
        elif parameter in stored:
            fused.add(parameter)  # two tensors claim it: which one is loaded is not for us to guess
        elif parameter in parameters:
            stored[parameter] = name
    kinds = {name: module for name, module in model.named_modules() if name}
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    return Anatomy(
        stored,
        frozenset(fused),
        {name: tuple(parameters[parameter].shape) for parameter, name in stored.items()},
        {
            name: isinstance(module, Conv1D)
            for name, module in kinds.items()
            if isinstance(module, (torch.nn.Linear, Conv1D))
        },
        frozenset(kinds),
        frozenset(tied),
    )
