"""Find how many positions a model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def positions_of(config: Any) -> int:
    """Return the most tokens that a model has positions for, from its configuration or config.json.

    Learned ones end where they end: one token more is an IndexError, and a device assert on a GPU.
    """
    if isinstance(config, Mapping):
        text = config.get("text_config")
        look = (text if isinstance(text, Mapping) else config).get
        found = look("max_position_embeddings") or look("n_positions")
    else:
        text = config.get_text_config()
        found = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return found if isinstance(found, int) and found > 0 else 1 << 30
