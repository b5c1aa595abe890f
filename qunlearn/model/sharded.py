"""Keep a frozen base in shards over the processes of a run (FSDP): each holds its part of every block's weights.

The weights of a block are gathered when it computes, which takes all processes at once, and each has passes of its own:
other rows, other numbers of tokens to generate. So every pass is announced. The processes agree on what is next, a way
up through the blocks or one back down, and who has no such pass to make gathers with the others and computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from qunlearn.config.settings import Config
from qunlearn.errors import ConfigError
from qunlearn.model.cards import SHARDED
from qunlearn.model.head import Head
from qunlearn.model.load import backbone, decoder_blocks
from qunlearn.model.policy import Policy
from qunlearn.parallel.ranks import Ranks
from qunlearn.utils.launch import process_count

_WAITS, _UP, _DOWN = range(3)  # what a process is about to do; the highest that any wants is done by all


class Shards:
    """The blocks of a base, in shards, and what the processes do about them together. Raises ProcessLostError."""

    def __init__(self, blocks: Sequence[FSDPModule], ranks: Any) -> None:
        self.blocks, self.ranks = blocks, ranks

    def wait(self) -> None:
        """Gather for the others' passes until no process has one to make."""
        while (kind := self.ranks.highest(_WAITS)) != _WAITS:
            self._gather(kind)

    def announce(self, kind: int) -> None:
        """Return when all processes are ready for this pass; gathers for others that come first."""
        while (found := self.ranks.highest(kind)) != kind:
            self._gather(found)

    def _gather(self, kind: int) -> None:
        for block in self.blocks if kind == _UP else reversed(self.blocks):
            block.unshard()
            block.reshard()

    def before_pass(self, *_: Any) -> None:
        """Announce a pass up; a hook of the backbone."""
        self.announce(_UP)

    def after_pass(self, _: Any, __: Any, out: Any) -> None:
        """Let the pass back down be announced when a gradient comes in; likewise."""
        h: Tensor = out.last_hidden_state
        if h.requires_grad:
            h.register_hook(self._before_way_back)  # type: ignore[no-untyped-call]

    def _before_way_back(self, _: Tensor) -> None:
        self.announce(_DOWN)


def shard(policy: Policy, device: torch.device, ranks: Ranks) -> Policy:
    """Return the policy on its device, each block's base weights in shards over all processes.

    The adapter, the embeddings, the norm behind the blocks and the head are whole in each. The base lies in the host's
    memory before. Raises ConfigError where a block has no adapter.
    """
    base, blocks, mesh = policy.base, decoder_blocks(policy.base.model), init_device_mesh(device.type, (ranks.count,))
    parameters = base.parameters
    for module in base.model.modules():
        if isinstance(module, Linear4bit):
            module.weight.quant_state.to(device)
    for number, block in enumerate(blocks):
        adapter = {p for p in block.parameters() if p.requires_grad}
        if not adapter:  # no gradient would reach it, nor its weights be gathered on the way back
            hint = "names of layers that every block has, such as all-linear or q_proj,v_proj"
            raise ConfigError(
                f"of no use with --device-map {SHARDED}: block {number} has no adapter",
                where="--target-modules",
                hint=hint,
            )
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=adapter)
    base.model.to(device)
    shards = Shards([*blocks], ranks)
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
