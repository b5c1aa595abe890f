"""A decoder's architecture in numbers: sizes, linear layers, and how a block computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A linear layer: `name` is the last part of its path, what `--target-modules` goes by."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weights + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Traits:
    """How a block computes, as far as it decides what is kept for the backward pass.

    `norm`: rms (cast down before its weight), rms32 (after), layer, layer32 (in fp32, without weights); `order`: pre,
    sandwich (before and after each half) or post; `parallel`: both halves read the block's input, `norms` of it;
    `qk_norm`: none, head or full; `rotary`: share of a head that is turned; `eager`: no fused attention;
    `dropout`: on the way back into the residual stream; `score_dropout`: on attention's weights;
    `windowed`: a sliding window, so that there is always a mask.
    """

    norm: str = "rms"
    order: str = "pre"
    parallel: bool = False
    norms: int = 2
    qk_norm: str = "none"
    fused_qkv: bool = False
    fused_gate: bool = False
    gated: bool = True
    activation: str = "silu"
    rotary: float = 1.0
    scaled_queries: bool = False
    eager: bool = False
    dropout: float = 0.0
    score_dropout: float = 0.0
    windowed: bool = False


@dataclass(frozen=True)
class Shape:
    """A decoder of `layers` equal blocks. `block` and `outside` are its linear layers but for the head.

    `extra` counts the parameters that are in no linear layer and no embedding: norms and the head's bias.
    """

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    block: tuple[Linear, ...]
    extra: int
    traits: Traits
    embedding_width: int
    outside: tuple[Linear, ...] = ()
    positions: int = 0  # rows of learned position embeddings
    unquantised: tuple[str, ...] = ()  # linear layers of the last block that bitsandbytes leaves alone
    soft_cap: bool = False

    def linears(self) -> list[tuple[Linear, int]]:
        """Every linear layer below the head, and how many there are of it."""
        return [(linear, self.layers) for linear in self.block] + [(linear, 1) for linear in self.outside]

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.embedding_width + self.positions * self.hidden

    @property
    def head_parameters(self) -> int:
        """Return of the head's own matrix: none where it is the embeddings' table."""
        return 0 if self.tied else self.vocabulary * self.embedding_width

    @property
    def parameters(self) -> int:
        linear = sum(n * layer.parameters for layer, n in self.linears())
        return linear + self.embedding_parameters + self.head_parameters + self.extra
