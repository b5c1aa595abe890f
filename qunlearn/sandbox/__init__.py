"""The embedded sandbox: a small invented world, and a small model that has memorised it."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"
KINDS = ("hallucination", "copyright", "harm", "code")


def data_file(kind: str, split: str) -> Path:
    """The JSONL file of a split; the general set belongs to no kind."""
    return ASSETS / "data" / f"{split}.jsonl" if split == "general" else ASSETS / "data" / kind / f"{split}.jsonl"
