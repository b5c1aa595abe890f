"""Cache measurements on disk: one file per model, adapter, data and probe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qunlearn.data.records import write_jsonl
from qunlearn.data.tokenize import Example
from qunlearn.utils.files import output_error
from qunlearn.utils.json_files import LARGE_BYTES, read_text

_VERSION = 3  # of what a probe computes: a change makes old files of no use


class Cache:
    """Probe results in a folder, for their owner's eyes only; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, *, fresh: bool = False) -> None:
        self.folder, self.fresh = folder, fresh
        self.known, self.measured = 0, 0  # probe results that were in the folder, and that had to be had

    def describe(self) -> str:
        """Say how much was known already: who was given the folder may want the model to be asked."""
        return f"known from before: {self.known} of {self.known + self.measured} measurements (--fresh measures again)"

    def path(self, probe: str, *parts: str) -> Path | None:
        """The file of a probe for exactly these inputs."""
        key = hashlib.sha256("\x1f".join((str(_VERSION), probe, *parts)).encode()).hexdigest()[:32]
        return None if self.folder is None else self.folder / f"{probe}-{key}.jsonl"

    def load(self, path: Path | None, make: Callable[..., Any], n: int) -> list[Any] | None:
        """The `n` values in a file, or None where there is none or it is damaged: then it is measured again."""
        if path is None or self.fresh:
            return None
        try:
            text = read_text(path, LARGE_BYTES)
            if text.count("\n") != n:
                return None
            rows = [json.loads(line) for line in text.split("\n") if line]
            values = made_again(rows, make)
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        if len(values) != n:
            return None
        self.known += 1
        return values

    def save(self, path: Path | None, values: Sequence[Any]) -> None:
        """Raises OutputError."""
        self.measured += 1
        if path is None:
            return
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise output_error(error, path.parent) from error
        write_jsonl(path, [{} if value is None else asdict(value) for value in values])


def made_again(rows: Sequence[dict[str, Any] | None], make: Callable[..., Any]) -> list[Any]:
    """Return values from what JSON makes of them."""
    return [make(**_tuples(row)) if row else None for row in rows]


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def digest(examples: Sequence[Example]) -> str:
    """Equal for the same tokens with the same answers marked: tokenizer, template and cuts are in it."""
    made = hashlib.sha256()
    for e in examples:
        made.update(f"{e.start} {e.end} {e.probe} {bool(e.record.turns)} ".encode())
        made.update(",".join(map(str, e.input_ids)).encode())
    return made.hexdigest()


def digest_texts(texts: Sequence[str]) -> str:
    made = hashlib.sha256()
    for text in texts:
        made.update(f"{len(text)} {text}\x1f".encode())
    return made.hexdigest()
