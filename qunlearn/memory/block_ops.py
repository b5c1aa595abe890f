"""The operations of one decoder block with LoRA on frozen, quantised layers, and what each saves for backward.

As transformers 5 runs it, with adapters as model/kernels/lora.py computes them: rotary embeddings and norms make
their own copies, grouped keys and values are repeated where there is a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qunlearn.memory.architecture import Linear, Shape
from qunlearn.memory.tape import Tape, Value

_FP32 = 4
# absmax of a 4-bit matrix, widened and shifted: two fp32 numbers for 64 weights (bitsandbytes 0.50).
_ABSMAX_ASIDE = 2 * _FP32 / 64


@dataclass(frozen=True)
class BlockPass:
    """How a block is run: `tokens` of rows of `row_tokens`, `compute_bytes` a number, adapters of rank `r` in fp32.

    `adapted` are the names of the layers that have one. `quant`: nf4, fp4, int8 or none. `masked`: a 4-D mask goes
    along. `on_gpu`: CUDA's kernels rather than the CPU's. `dequantise`: count the buffers that takes. `places`: those
    of the rows with their padding, where the tokens lie end to end and attention alone has it.
    """

    tokens: int
    row_tokens: int
    compute_bytes: int
    r: int
    adapted: frozenset[str]
    quant: str
    masked: bool = True
    on_gpu: bool = True
    dequantise: bool = True
    places: int | None = None


def block_tape(shape: Shape, run: BlockPass) -> Tape:
    """A block of this shape as a tape; what is given is its input."""
    return _Block(shape, run).write()


class _Block:
    def __init__(self, shape: Shape, run: BlockPass) -> None:
        self.shape, self.run, self.traits = shape, run, shape.traits
        self.tape = Tape()
        self.c = run.tokens * run.compute_bytes  # bytes of one number of each token, as computed
        self.f = run.tokens * _FP32
        self.spread = (run.places or run.tokens) / run.tokens  # in attention
        self.cast = run.compute_bytes != _FP32
        self.linears = list(shape.block)

    def write(self) -> Tape:
        tape, traits, x = self.tape, self.traits, self.tape.given(self.c * self.shape.hidden)
        if traits.parallel:
            n = self._norm(x)
            a = self._dropout(self._attention(n))
            m = self._dropout(self._mlp(n if traits.norms == 1 else self._norm(x)))
            tape.hold(n, a)
            self._add(self._add(a, m), x)
            return tape
        h = self._half(x, self._attention)
        self._half(h, self._mlp)
        return tape

    def _half(self, x: Value, compute: Callable[[Value], Value]) -> Value:
        """One half of a block, its norms and its residual connection."""
        order = self.traits.order
        inner = self._norm(x) if order in ("pre", "sandwich") else x
        y = self._dropout(compute(inner))
        if order == "sandwich" or (order == "post" and self.traits.norm != "layer"):
            y = self._norm(y)
        h = self._add(x, y)
        return self._norm(h) if order == "post" and self.traits.norm == "layer" else h

    # -- small operations ----------------------------------------------------------------------------

    def _add(self, a: Value, b: Value) -> Value:
        return self.tape.op([a, b], self.tape.sizes[a], passes=True)

    def _dropout(self, x: Value) -> Value:
        if not self.traits.dropout:
            return x
        size = self.tape.sizes[x]
        mask = self.run.tokens if self.run.on_gpu else self.c  # the CPU's mask has the input's type
        return self.tape.op([x], size, aside=mask * size // self.c)

    def _norm(self, x: Value, width: int | None = None, kind: str | None = None) -> Value:
        tape, kind = self.tape, kind or self.traits.norm
        numbers = tape.sizes[x] // self.run.compute_bytes
        full = numbers * _FP32
        rows = numbers // (width or self.shape.hidden) * _FP32
        if kind == "layer":
            return tape.op([x], tape.sizes[x], keeps=[x], aside=2 * rows)
        h = tape.op([x], full) if self.cast else x
        if kind == "layer32":
            y = tape.op([h], full, keeps=[h], aside=2 * rows)
            return tape.op([y], tape.sizes[x]) if self.cast else y
        y = tape.op([h], full, keeps=[h], aside=2 * rows, backward=3 * full)
        if self.cast and kind == "rms":
            y = tape.op([y], tape.sizes[x])
        y = tape.op([y], tape.sizes[y])  # times the norm's weight
        return tape.op([y], tape.sizes[x]) if self.cast and kind == "rms32" else y

    # -- linear layers -------------------------------------------------------------------------------

    def _linear(self, x: Value) -> Value:
        """The next linear layer of the block, with its adapter (model/kernels/lora.py)."""
        layer = self.linears.pop(0)
        tape, c, r = self.tape, self.c, self.run.r
        y = self._base(layer, x)
        if layer.name in self.run.adapted:
            number = self.run.compute_bytes
            cast = r * (layer.inputs + layer.outputs) * (number + _FP32) if self.cast else 0
            gradients = r * (layer.inputs + layer.outputs) * _FP32
            down = tape.op([x], c * r, keeps=[x], keeps_output=True, backward=c * r + gradients + cast)
            # With a bias the result is a view, which cannot be added to in place.
            y = tape.op([y, down], c * layer.outputs, passes=True, in_place=not layer.bias)
        tape.hold(x)
        return y

    def _base(self, layer: Linear, x: Value) -> Value:
        matrix, run = layer.weights * self.run.compute_bytes, self.run
        forward = backward = 0.0
        if not run.dequantise:
            pass
        elif run.quant in ("nf4", "fp4"):
            forward = backward = matrix + layer.weights * _ABSMAX_ASIDE
        elif run.quant == "int8":
            # Dequantised for the gradient, on a CPU for the result as well, there through fp32.
            backward = matrix if run.on_gpu or not self.cast else matrix + 2 * layer.weights * _FP32
            forward = run.tokens * (3 * layer.inputs + 4 * layer.outputs) if run.on_gpu else backward
        keeps = [x] if run.quant == "int8" else []
        return self.tape.op([x], self.c * layer.outputs, keeps=keeps, forward=forward, backward=backward, solid=False)

    # -- attention -----------------------------------------------------------------------------------

    def _attention(self, x: Value) -> Value:
        shape, tape, traits = self.shape, self.tape, self.traits
        query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        if traits.fused_qkv:
            fused = self._linear(x)
            q, k, v = (tape.view(fused, self.c * width) for width in (query, keys, keys))
        else:
            q, k, v = self._linear(x), self._linear(x), self._linear(x)
        if traits.scaled_queries:
            q = tape.op([q], self.c * query)
        if traits.qk_norm != "none":
            head = shape.head_dim if traits.qk_norm == "head" else None
            q, k = self._norm(q, head or query), self._norm(k, head or keys)
        if traits.rotary:
            turned = self._rotate(q, query), self._rotate(k, keys)
            tape.hold(q, k)
            q, k = turned
        flat = q, k, v
        if self.spread > 1:
            q, k, v = (tape.op([x], tape.sizes[x] * self.spread) for x in flat)
        y = self._eager(q, k, v) if traits.eager else self._fused(q, k, v)
        if self.spread > 1:
            y = tape.op([y], tape.sizes[y] / self.spread)
            tape.hold(*flat)
        if not self.run.on_gpu and traits.rotary and (traits.fused_qkv or traits.rotary < 1):
            y = tape.op([y], tape.sizes[y])  # the CPU's kernel lays its output out as the queries are
        y = self._linear(y)
        tape.hold(x)
        return y

    def _rotate(self, x: Value, width: int) -> Value:
        """x cos + rotate_half(x) sin, on the share of each head that is turned."""
        tape, part = self.tape, self.c * width * self.traits.rotary
        cos = tape.op([x], part)
        half = tape.op([x], part, forward=part / 2, backward=part)
        turned = self._add(cos, tape.op([half], part))
        return turned if self.traits.rotary == 1.0 else tape.op([turned], self.c * width)

    def _repeated(self, k: Value) -> Value:
        """Keys or values, one for each query head."""
        shape = self.shape
        size = self.c * self.spread * shape.heads * shape.head_dim
        return k if shape.kv_heads == shape.heads else self.tape.op([k], size)

    def _fused(self, q: Value, k: Value, v: Value) -> Value:
        """scaled_dot_product_attention by one of its fused kernels: the scores are never there."""
        shape, run, width = self.shape, self.run, self.shape.heads * self.shape.head_dim
        c, f = self.c * self.spread, self.f * self.spread
        aside = f * shape.heads  # the log-sum-exp of each row
        if run.masked:
            k, v = self._repeated(k), self._repeated(v)
            aside += c * run.row_tokens  # the mask as numbers to be added
        # The memory-efficient kernel adds up the three gradients in fp32.
        backward = 3 * f * width if run.on_gpu and self.cast else 0
        keeps = [q, k, v]
        if self.traits.score_dropout and not run.on_gpu:
            # The CPU's kernel has no dropout: weights, mask and product are kept, and fp32 copies of the factors.
            aside += f * (3 * shape.heads * run.row_tokens + (6 if self.cast else 3) * width)
            keeps = []
        return self.tape.op([q, k, v], c * width, keeps=keeps, keeps_output=True, aside=aside, backward=backward)

    def _eager(self, q: Value, k: Value, v: Value) -> Value:
        """softmax(soft_cap(q k^T)) v, every step of it a matrix of tokens by tokens for each head."""
        tape, shape, row = self.tape, self.shape, self.shape.heads * self.run.row_tokens
        k, v = self._repeated(k), self._repeated(v)
        scores = tape.op([q, k], self.c * row, keeps=[q, k])
        scores = tape.op([tape.op([scores], self.c * row)], self.c * row)  # scaled, and divided by the cap
        scores = tape.op([scores], self.c * row, keeps_output=True)  # tanh
        scores = tape.op([scores], self.c * row)
        scores = tape.op([scores], self.c * row, passes=True)  # masked
        p = tape.op([scores], self.f * row, keeps_output=True, forward=self.f * row if self.cast else 0)
        if self.cast:
            p = tape.op([p], self.c * row)
        y = tape.op([p, v], self.c * shape.heads * shape.head_dim, keeps=[p, v], solid=False)
        return tape.op([y], tape.sizes[y])  # the heads side by side again

    # -- feed-forward --------------------------------------------------------------------------------

    def _mlp(self, x: Value) -> Value:
        tape, inner = self.tape, self.c * self.shape.intermediate
        if not self.traits.gated:
            y = self._linear(self._activation(self._linear(x), inner))
            tape.hold(x)
            return y
        if self.traits.fused_gate:
            both = self._linear(x)
            gate, up = tape.view(both, inner), tape.view(both, inner)
            active = self._activation(gate, inner)
        else:
            active = self._activation(self._linear(x), inner)
            up = self._linear(x)
        y = self._linear(tape.op([active, up], inner, keeps=[active, up]))
        tape.hold(x)
        return y

    def _activation(self, x: Value, size: int) -> Value:
        tape, name = self.tape, self.traits.activation
        if name == "relu":
            return tape.op([x], size, keeps_output=True)
        if name != "gelu_new":
            return tape.op([x], size, keeps=[x])
        # 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), written out in Python
        half = tape.op([x], size)
        cube = tape.op([tape.op([x], size, keeps=[x], backward=2 * size)], size)
        inside = tape.op([self._add(x, cube)], size)
        one_plus = tape.op([tape.op([inside], size, keeps_output=True)], size, passes=True)
        return tape.op([half, one_plus], size, keeps=[half, one_plus])
