"""Keep a base and its adapter in shards over the processes of a run (FSDP): each holds its part of every block.

The weights of a block, and of the adapter in it, are gathered when it computes, and the adapter's gradients summed and
divided on the way back, which takes all processes at once; and each has passes of its own: other rows, other numbers of
tokens to generate. So every pass is announced. The processes agree on what is next, a way up through the blocks or one
back down, and who has no such pass to make gathers with the others, computes nothing, and adds zeros to the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from qunlearn.config.settings import Config
from qunlearn.errors import ConfigError
from qunlearn.model.gpus import SHARDED
from qunlearn.model.head import Head
from qunlearn.model.load import backbone, decoder_blocks
from qunlearn.model.policy import Policy
from qunlearn.parallel.ranks import Ranks
from qunlearn.utils.launch import process_count

# What a process is about to do; the highest that any wants is done by all. Where gradients are summed apart the ways
# back of each sum have a number of their own, from _DOWN on.
_WAITS, _UP, _DOWN = range(3)


def _gathered(block: FSDPModule) -> None:
    block.unshard()
    block.reshard()


class Shards:
    """The blocks of a model, in shards, and what the processes do about them together. Raises ProcessLostError.

    `back` goes back through a block for the others alone.
    """

    def __init__(
        self, blocks: Sequence[FSDPModule], ranks: Any, back: Callable[[FSDPModule], None] = _gathered
    ) -> None:
        self.blocks, self.ranks, self._back = blocks, ranks, back
        self.received: Callable[[int], None] = lambda place: None
        self._announced = False

    def wait(self) -> None:
        """Gather for the others' passes until no process has one to make."""
        while (kind := self.ranks.highest(_WAITS)) != _WAITS:
            self._gather(kind)

    def announce(self, kind: int) -> None:
        """Return when all processes are ready for this pass; gathers for others that come first."""
        while (found := self.ranks.highest(kind)) != kind:
            self._gather(found)

    def _gather(self, kind: int) -> None:
        if kind == _UP:
            for block in self.blocks:
                _gathered(block)
            return
        for block in reversed(self.blocks):
            self._back(block)
        self.received(kind - _DOWN)

    def ready(self, place: int) -> None:
        """Announce the next way back, of gradients that are summed apart, before it begins: inside of it there is no
        going back for the others first."""
        self.announce(_DOWN + place)
        self._announced = True

    def before_pass(self, *_: Any) -> None:
        """Announce a pass up; a hook of the backbone."""
        self.announce(_UP)

    def after_pass(self, _: Any, __: Any, out: Any) -> None:
        """Let the pass back down be announced when a gradient comes in; likewise."""
        h: Tensor = out.last_hidden_state
        if h.requires_grad:
            h.register_hook(self._before_way_back)  # type: ignore[no-untyped-call]

    def _before_way_back(self, _: Tensor) -> None:
        if not self._announced:
            self.announce(_DOWN)
        self._announced = False


def _nothing(block: Any) -> Tensor:
    """Zero, by way of each trained parameter of a block."""
    return torch.stack([p[:0].sum() for p in block.parameters() if p.requires_grad]).sum()


def _back_with_zeros(block: Any) -> None:
    """Go back through a block with gradients of zero: one gather and one sum, as in a pass, which leave this process's
    part of what the others found."""
    with torch.enable_grad():
        block.set_reshard_after_forward(False, recurse=False)  # else it would be gathered twice
        try:
            zero = block.nothing()
        finally:
            block.set_reshard_after_forward(True, recurse=False)
        zero.backward()


def _shard_block(block: Any, mesh: Any, count: int) -> None:
    """Shard a block and its adapter, whose gradients are summed: losses are divided by what is in the whole step."""

    def dimension(p: Tensor) -> Shard:
        uneven = p.requires_grad and p.shape[0] % count and not p.shape[-1] % count
        return Shard(p.ndim - 1 if uneven else 0)

    fully_shard(block, mesh=mesh, reshard_after_forward=True, shard_placement_fn=dimension)
    block.set_gradient_divide_factor(1.0)
    block.set_force_sum_reduction_for_comms(True)
    if hasattr(block, "set_reduce_scatter_unused_params"):  # from torch 2.13: a layer that a pass leaves out adds zeros
        block.set_reduce_scatter_unused_params(True)
    block.nothing = MethodType(_nothing, block)
    register_fsdp_forward_method(block, "nothing")


def shard(policy: Policy, device: torch.device, ranks: Ranks) -> Policy:
    """Return the policy on its device, each block's base weights and adapter in shards over all processes.

    The embeddings, the norm behind the blocks, the head, and adapters outside of blocks are whole in each. The base
    lies in the host's memory before. Raises ConfigError where a block has no adapter.
    """
    base, blocks, mesh = policy.base, decoder_blocks(policy.base.model), init_device_mesh(device.type, (ranks.count,))
    parameters = base.parameters
    for module in base.model.modules():
        if isinstance(module, Linear4bit):
            module.weight.quant_state.to(device)
    for number, block in enumerate(blocks):
        if not any(p.requires_grad for p in block.parameters()):  # nor would its weights be gathered on the way back
            hint = "names of layers that every block has, such as all-linear or q_proj,v_proj"
            raise ConfigError(
                f"of no use with --device-map {SHARDED}: block {number} has no adapter",
                where="--target-modules",
                hint=hint,
            )
        _shard_block(block, mesh, ranks.count)
    base.model.to(device)
    shards = Shards([*blocks], ranks, _back_with_zeros)
    backbone(base.model).register_forward_pre_hook(shards.before_pass)
    backbone(base.model).register_forward_hook(shards.after_pass)
    ranks.shards = shards
    base = replace(base, device=device, head=Head.of(base.model), counted=parameters)
    return Policy(base, policy.model)


def check_sharding(config: Config, *, layered: bool) -> None:
    """Refuse what a base in shards cannot do, before anything is loaded. `layered`: the objective looks at a block's
    output. Raises ConfigError."""
    model, where = config.model, f"--device-map {SHARDED}"
    if process_count() == 1:
        raise ConfigError(
            "it takes several processes", where=where, hint="torchrun or accelerate launch, see the guide"
        )
    wrong = {
        "--quant int8": model.quant == "int8",
        "--embeddings cpu": model.embeddings == "cpu",
        "--head 8bit": model.head == "8bit",
        "train.offload": config.train.offload,
        f"--objective {config.objective.name}": layered,
    }
    for what, asked in wrong.items():
        if asked:
            raise ConfigError(f"of no use with {where}", where=what, hint="leave one of them out")
