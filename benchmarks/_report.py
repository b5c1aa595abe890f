"""What every benchmark does with its figures: a table, where it was measured, and the section of RESULTS.md it owns."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from qunlearn.model.device import describe_device

RESULTS = Path(__file__).with_name("RESULTS.md")
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def say(text: str) -> None:
    """Talk, on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - a benchmark talks


def out(text: str) -> None:
    """Data, on stdout."""
    print(text, flush=True)  # noqa: T201 - a benchmark's data


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def machine(device: torch.device) -> dict[str, str]:
    """Date, machine and versions: what a figure needs beside it."""
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {
        "date": str(datetime.date.today()),
        "device": describe_device(device),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **versions,
    }


def where_line(device: torch.device, command: str) -> str:
    m = machine(device)
    versions = ", ".join(f"{name} {m[name]}" for name in ("python", *_LIBRARIES))
    return f"{m['date']}, {m['device']}, {m['machine']}, {versions}; `{command}`"


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Replace what stands between the markers of `name`; everything else in the file is kept.

    Raises ValueError when the file does not have both markers, in order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = path.read_text(encoding="utf-8")
    head, found, rest = old.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path.name} has no section between {begin} and {end}")
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
