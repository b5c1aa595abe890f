"""Serve a guarded model by transformers' own OpenAI-compatible server, `transformers serve`: it loads, we guard.

The server is pinned to one model, answers one request at a time, and no other model can be asked for. Continuous
batching, which packs prompts, stays off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.import_utils import is_serve_available

from qunlearn.errors import ConfigError, ModelError
from qunlearn.guard.guard import Guard
from qunlearn.hub.checked import check_model
from qunlearn.hub.download import resolve_model
from qunlearn.model.load import load_tokenizer
from qunlearn.utils.console import say

QUANTS = {"nf4": "bnb-4bit", "int8": "bnb-8bit", "none": None}  # ours, and the server's names for them


@dataclass(frozen=True)
class ServeWish:
    """Where to listen, and how the model is loaded."""

    host: str = "localhost"
    port: int = 8000
    quant: str = "nf4"
    device: str = "auto"


def serve(folder: Path, model: str, wish: ServeWish) -> None:
    """Answer requests for a guarded model until the process is ended.

    Raises ConfigError, GuardError, and ModelError where the server's packages are not installed.
    """
    if wish.quant not in QUANTS:
        hint = f"one of {', '.join(QUANTS)}"
        raise ConfigError(f"the server has no {wish.quant[:20]!r}", where="--quant", hint=hint)
    guard = Guard.open(folder)
    checked = check_model(resolve_model(model))
    with guarded_loading(guard, checked.folder):
        from transformers.cli.serve import Serve

        say(f"http://{wish.host}:{wish.port}/v1 answers for {checked.folder}, guarded; Ctrl-C ends it")
        options = {"quantization": QUANTS[wish.quant], "device": wish.device, "host": wish.host, "port": wish.port}
        Serve(force_model=str(checked.folder), **options)


@contextlib.contextmanager
def guarded_loading(guard: Guard, folder: Path) -> Iterator[None]:
    """Put the guard on whatever transformers' server loads while the block runs. Raises ModelError."""
    if not is_serve_available():
        hint = "pip install 'qunlearn[serve]'"
        raise ModelError("the packages of `transformers serve` are not installed", where="serve", hint=hint)
    from transformers.cli.serving.model_manager import ModelManager

    load = getattr(ModelManager, "_load_model", None)
    if load is None:
        hint = "pip install 'transformers>=5.17,<6'"
        raise ModelError("the server of this version of transformers loads in another way", where="serve", hint=hint)

    def loaded(manager: Any, *args: Any, **options: Any) -> Any:
        return guard.wrap(load(manager, *args, **options), load_tokenizer(folder))

    ModelManager._load_model = loaded
    try:
        yield
    finally:
        ModelManager._load_model = load
