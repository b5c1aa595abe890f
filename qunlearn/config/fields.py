"""A field of the settings: its help text, flag, choices and bounds."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# What a number may be where a setting says nothing else: counts fit in 32 bits, and nothing is infinite.
_MOST_WHOLE, _MOST = 2**31 - 1, 1e9

MOST_SEED = 2**63 - 1  # seeds are added to, and PyTorch takes 64 bits


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A field with its help text, its command-line flag and what values it may have (bounds are inclusive)."""
    meta = {"help": help, "flag": flag, "choices": tuple(choices), "low": low, "high": high}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Setting:
    """One leaf of the configuration: `key` is "section.field"."""

    key: str
    type: Any
    default: Any
    help: str
    flag: str | None
    choices: tuple[str, ...]
    low: float | None
    high: float | None

    @property
    def optional(self) -> bool:
        return isinstance(self.type, types.UnionType)

    @property
    def base_type(self) -> type:
        kinds = [t for t in typing.get_args(self.type) if t is not types.NoneType] or [self.type]
        return typing.cast(type, kinds[0])

    @property
    def least(self) -> float:
        """Return the least number that is taken."""
        return -self._bound if self.low is None else self.low

    @property
    def most(self) -> float:
        """Return the largest number that is taken."""
        return self._bound if self.high is None else self.high

    @property
    def _bound(self) -> float:
        return _MOST_WHOLE if self.base_type is int else _MOST
