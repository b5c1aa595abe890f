"""Read and check eval.json, for `compare`, the report, and the next evaluation, which adds to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError
from qunlearn.utils.json_files import EDITED, LARGE_BYTES, read_object

_NUMBER, _TEXT = (int, float), (str, type(None))
_ESTIMATE = {"n": int, "mean": _NUMBER, "low": (int, float, type(None)), "high": (int, float, type(None))}
_ITEM = {
    "key": str,
    "prompt": str,
    "answer": str,
    "truth?": str,
    "outputs": {"*": str},
    "verdicts": {"*": str},
    "values": {"*": {"*": (int, float, type(None))}},
}
_SUITE = {
    "suite": str,
    "model?": _TEXT,
    "quantization?": str,
    "scores": {"*": dict},
    "files": {"*": {"path": str, "sha256": str, "rows": int}},
    "measures": {"*": {"*": {"*": _ESTIMATE}}},
    "not_measured?": {"*": str},
    "conclusion": {"level": str, "sentences": [str]},
    "items": {"*": [_ITEM]},
}
_SHAPE = {"suites": {"*": _SUITE}, "latest?": _TEXT}


def read_suites(path: Path) -> dict[str, dict[str, Any]]:
    """Return the latest result of each suite, by its name, as written. Raises AdapterError for what is not that."""
    hint = f"{EDITED} evaluate it again"
    found = read_object(path, AdapterError, hint=hint, most_bytes=LARGE_BYTES, shape=_SHAPE)
    suites: dict[str, dict[str, Any]] = found["suites"]
    if found.get("latest") in suites:  # last, for whoever asks for the latest
        suites[found["latest"]] = suites.pop(found["latest"])
    return suites
