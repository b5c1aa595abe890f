"""The parts of which shapes are made: fields of config.json, attention, feed-forward layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qunlearn.errors import ModelError
from qunlearn.memory.architecture import Linear, Shape, Traits


class Fields:
    """A config.json with an architecture's defaults under it. Raises ModelError for what is not a size."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self.values = {**defaults, **{key: value for key, value in config.items() if value is not None}}
        self.where = where

    def size(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 32:
            raise ModelError(f"{name} is not a size: {value!r}", where=self.where, hint="is config.json damaged?")
        return value

    def number(self, *names: str, default: float = 0.0) -> float:
        value = next((self.values[name] for name in names if name in self.values), default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelError(f"{names[0]} is not a number: {value!r}", where=self.where, hint="is config.json damaged?")
        return float(value)

    def flag(self, name: str) -> bool:
        return bool(self.values.get(name, False))

    def text(self, *names: str) -> str:
        return str(next((self.values[name] for name in names if name in self.values), ""))

    def rotary(self, default: float) -> float:
        """The share of each head that rotary embeddings turn."""
        inner = self.values.get("rope_parameters")
        if isinstance(inner, Mapping) and isinstance(inner.get("partial_rotary_factor"), (int, float)):
            return float(inner["partial_rotary_factor"])
        return self.number("partial_rotary_factor", "rotary_pct", default=default)


def is_many(value: object) -> bool:
    return isinstance(value, int) and value > 1


def decoder(
    c: Fields,
    model_type: str,
    traits: Traits,
    block: tuple[Linear, ...],
    *,
    block_extra: int,
    final_extra: int,
    **other: Any,
) -> Shape:
    """A shape from the fields most architectures share."""
    hidden, heads, layers = c.size("hidden_size"), c.size("num_attention_heads"), c.size("num_hidden_layers")
    return Shape(
        model_type=model_type,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads(c),
        head_dim=head_width(c),
        intermediate=c.size("intermediate_size"),
        vocabulary=c.size("vocab_size"),
        tied=c.flag("tie_word_embeddings"),
        block=block,
        extra=layers * block_extra + final_extra,
        traits=traits,
        **{"embedding_width": hidden, **other},
    )


def kv_heads(c: Fields) -> int:
    return c.size("num_key_value_heads", c.size("num_attention_heads"))


def head_width(c: Fields) -> int:
    return c.size("head_dim", max(1, c.size("hidden_size") // c.size("num_attention_heads")))


def attention(c: Fields, *, bias: bool = False, out_bias: bool = False, out: str = "o_proj") -> tuple[Linear, ...]:
    hidden, query, keys = (
        c.size("hidden_size"),
        c.size("num_attention_heads") * head_width(c),
        kv_heads(c) * head_width(c),
    )
    return (
        Linear("q_proj", hidden, query, bias),
        Linear("k_proj", hidden, keys, bias),
        Linear("v_proj", hidden, keys, bias),
        Linear(out, query, hidden, out_bias),
    )


def gated(c: Fields, bias: bool = False) -> tuple[Linear, ...]:
    hidden, inner = c.size("hidden_size"), c.size("intermediate_size")
    return (
        Linear("gate_proj", hidden, inner, bias),
        Linear("up_proj", hidden, inner, bias),
        Linear("down_proj", inner, hidden, bias),
    )


def plain(c: Fields, first: str, second: str, bias: bool = True) -> tuple[Linear, ...]:
    hidden, inner = c.size("hidden_size"), c.size("intermediate_size")
    return Linear(first, hidden, inner, bias), Linear(second, inner, hidden, bias)
