"""The optimizer of the adapter, and the length of its gradient: of each parameter the part that this process trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from qunlearn.config.training import TrainConfig
from qunlearn.model.policy import Policy
from qunlearn.parallel.parts import any_in_shards, cut, in_shards
from qunlearn.parallel.ranks import current

_BLOCK = 256  # numbers that share a scale in 8-bit state
_BY_NAME = {"exp_avg", "exp_avg_sq", "state1", "state2"}  # torch's and bitsandbytes' numbers for each of a parameter's


def make_optimizer(parameters: Sequence[Tensor], c: TrainConfig, lr: float) -> Any:
    """AdamW as `c.optimizer` says: 32-bit state in one fused kernel, or 8-bit state, paged or not.

    `auto` is the first: where the memory plan chose another it has been put in its place.
    """
    if c.optimizer in ("auto", "adamw"):
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=c.weight_decay, fused=True)
    paged = c.optimizer == "paged_adamw8bit" and parameters[0].is_cuda  # on a CPU there is nothing to page from
    kind = bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit
    return kind(parameters, lr=lr, weight_decay=c.weight_decay)


def clip(policy: Policy, mine: Sequence[Tensor], most: float) -> float:
    """Scale the gradient, of all processes' parts, to this length where it is longer; returns how long it was.

    `mine` are the policy's parameters, or this process's part of each.
    """
    if not policy.in_shards:
        return float(torch.nn.utils.clip_grad_norm_(mine, most))
    there = [i for i, t in enumerate(mine) if t.grad is not None]
    squares = [0.0] * len(mine)
    if there:
        lengths = torch.stack(torch._foreach_norm([g for t in mine if (g := t.grad) is not None]))
        for i, square in zip(there, lengths.double().square().tolist(), strict=True):
            squares[i] = square
    norm = math.sqrt(sum(current().over_parts(squares, [*policy.trainable().values()])))
    torch.nn.utils.clip_grads_with_norm_(mine, most, torch.tensor(norm, device=policy.device))
    return norm


def optimizer_state(optimizer: Any, likes: Sequence[Any] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as CPU tensors by "parameter.name", and its other values likewise.

    `likes` are the parameters where they are in shards. Of one in shards the numbers of all processes are put
    together, those in 8 bits as fp32, which depends on no number of processes; the main process keeps them.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # paged state may still be moving
    parameters = _parameters(optimizer)
    shards = any_in_shards(likes) and current().any(bool(optimizer.state))
    for i, (p, like) in enumerate(zip(parameters, likes or parameters, strict=True)):
        state = optimizer.state.get(p, {})
        if in_shards(like):
            state = _whole_state(state, p, like, own=_is_8bit(optimizer)) if shards else {}
            state = state if current().main else {}
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{i}.{name}"] = value.detach().to("cpu", copy=True)
            else:
                scalars[f"{i}.{name}"] = value
    return tensors, scalars


def load_optimizer_state(
    optimizer: Any, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], likes: Sequence[Any] = ()
) -> None:
    """Put back what `optimizer_state` took from an optimizer of the same kind over the same parameters.

    bitsandbytes makes its own buffers first, paged ones where it pages: its `load_state_dict` would put plain tensors
    in their place.
    """
    own = _is_8bit(optimizer)
    stored: dict[int, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *scalars.items()):
        number, _, key = name.partition(".")
        stored.setdefault(int(number), {})[key] = value
    parameters = _parameters(optimizer)
    for i, (p, like) in enumerate(zip(parameters, likes or parameters, strict=True)):
        if i not in stored or not p.numel():  # no step has been taken, or none is
            continue
        if own:
            optimizer.init_state(optimizer.param_groups[0], p, 0, i)
        state = optimizer.state[p]
        for key, value in stored[i].items():
            if in_shards(like) and key in _BY_NAME:
                value = cut(value, like).contiguous()
            if own and in_shards(like) and isinstance(value, Tensor):
                _fill(state, key, value)
            elif own and isinstance(value, Tensor):
                state[key].copy_(value)
            else:  # torch's fused kernel wants its step counter where the parameter is
                state[key] = value.to(p.device, copy=True) if isinstance(value, Tensor) else value


# -- state in shards -------------------------------------------------------------------------------------


def _whole_state(state: Mapping[str, Any], p: Tensor, like: Any, *, own: bool) -> dict[str, Any]:
    """Put a parameter's state together, from all processes; what it has once is the same in each that has any."""
    names = ("state1", "state2") if own else ("exp_avg", "exp_avg_sq")
    parts = [_as_fp32(state, name) if state else torch.zeros_like(p) for name in names]
    wholes = dict(zip(names, current().whole(parts, [like, like]), strict=True))
    return wholes | {"step": state["step"]} if state else {}


def _as_fp32(state: Mapping[str, Any], name: str) -> Tensor:
    """The numbers of a state, of 8 bits each the value that its code stands for times its block's scale."""
    numbers: Tensor = state[name]
    if numbers.dtype != torch.uint8:
        return numbers
    number = name.removeprefix("state")
    scales = state[f"absmax{number}"].repeat_interleave(_BLOCK)[: numbers.numel()]
    found: Tensor = state[f"qmap{number}"][numbers.flatten().long()] * scales
    return found.view_as(numbers)


def _fill(state: dict[str, Any], name: str, numbers: Tensor) -> None:
    """Let a state of bitsandbytes hold these numbers, in 8 bits where it has them so: the codes that they came from,
    where the blocks are the same ones.

    A block's largest number in size has the highest code, or where it is negative the lowest, which is not -1: so the
    scale follows.
    """
    held: Tensor = state[name]
    if held.dtype != torch.uint8:
        held.copy_(numbers)
        return
    number = name.removeprefix("state")
    values, scales = state[f"qmap{number}"], state[f"absmax{number}"]
    flat = numbers.to(held.device).float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, scales.numel() * _BLOCK - flat.numel())).view(-1, _BLOCK)
    low, high = blocks.amin(1), blocks.amax(1)
    scales.copy_(torch.where(-low >= high, low / values[0].clamp(max=-1e-3), high / values[-1]))
    near = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(near, (values[1:] + values[:-1]) / 2)
    held.copy_(codes.flatten()[: flat.numel()].view_as(held))


def _is_8bit(optimizer: Any) -> bool:
    return isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit)


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
