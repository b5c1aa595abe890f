"""qunlearn: make a language model forget, on one small GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qunlearn.api import evaluate, forget, merge, open_run

__version__ = "0.1.0"
__all__ = ["evaluate", "forget", "merge", "open_run"]


def __getattr__(name: str) -> Any:
    """Import the public functions when they are first asked for."""
    if name in __all__:
        from qunlearn import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
