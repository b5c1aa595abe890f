"""What a GPU computes in fewer kernels than transformers launches: norms and rotary embeddings."""

from __future__ import annotations

from torch import nn

from qunlearn.model.kernels.norm import fuse_norms
from qunlearn.model.kernels.rotary import fuse_rotary


def fuse(model: nn.Module) -> None:
    """Let a model's norms and rotary embeddings compute fused, where that gives the same numbers but for rounding."""
    fuse_norms(model.modules())
    fuse_rotary(model)
