"""The optimizer of the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from qunlearn.config.training import TrainConfig


def make_optimizer(parameters: Sequence[Tensor], c: TrainConfig, lr: float) -> Any:
    """AdamW as `c.optimizer` says: 32-bit state in one fused kernel, or 8-bit state, paged or not.

    `auto` is the first: where the memory plan chose another it has been put in its place.
    """
    if c.optimizer in ("auto", "adamw"):
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=c.weight_decay, fused=True)
    paged = c.optimizer == "paged_adamw8bit" and parameters[0].is_cuda  # on a CPU there is nothing to page from
    kind = bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit
    return kind(parameters, lr=lr, weight_decay=c.weight_decay)


def optimizer_state(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as CPU tensors by "parameter.name", and its other values likewise."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # paged state may still be moving
    for i, p in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{i}.{name}"] = value.detach().to("cpu", copy=True)
            else:
                scalars[f"{i}.{name}"] = value
    return tensors, scalars


def load_optimizer_state(optimizer: Any, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state` took from an optimizer of the same kind over the same parameters.

    bitsandbytes makes its own buffers first, paged ones where it pages: its `load_state_dict` would put plain tensors
    in their place.
    """
    own = isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit)
    stored: dict[int, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *scalars.items()):
        number, _, key = name.partition(".")
        stored.setdefault(int(number), {})[key] = value
    for i, p in enumerate(_parameters(optimizer)):
        if i not in stored:  # no step has been taken
            continue
        if own:
            optimizer.init_state(optimizer.param_groups[0], p, 0, i)
        state = optimizer.state[p]
        for key, value in stored[i].items():
            if own and isinstance(value, Tensor):
                state[key].copy_(value)
            else:  # torch's fused kernel wants its step counter where the parameter is
                state[key] = value.to(p.device, copy=True) if isinstance(value, Tensor) else value


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
