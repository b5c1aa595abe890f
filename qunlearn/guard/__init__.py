"""Forget at inference time: a gate judges each prompt, and the embeddings of those to forget are corrupted (ECO)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import qunlearn.model  # noqa: F401 - sets what libraries read on their first import

if TYPE_CHECKING:
    from qunlearn.guard.guard import Guard

__all__ = ["Guard"]


def __getattr__(name: str) -> Any:
    """Import the class when it is first asked for: requests are checked without torch."""
    if name in __all__:
        from qunlearn.guard import guard

        return getattr(guard, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
