"""The shape of a JSON file of ours that is read again: it may have been edited, cut off, or made by someone else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError

NUMBER, TEXT, OBJECT = "a number", "a text", "an object"
_KINDS: Mapping[str, Any] = {NUMBER: (int, float), TEXT: str, OBJECT: dict}
_LONGEST = 18  # digits of a whole number: no count of ours has more, and no float holds 400

ESTIMATE = {"n": NUMBER, "mean": NUMBER, "low": (NUMBER, None), "high": (NUMBER, None)}
_ROW = {
    "key?": TEXT,
    "prompt?": TEXT,
    "answer?": TEXT,
    "outputs?": {"*": TEXT},
    "verdicts?": {"*": TEXT},
    "values": {"*": {"*": (NUMBER, None)}},
}
EVALUATION = {
    "suite": TEXT,
    "scores": OBJECT,
    "measures": {"*": {"*": {"*": ESTIMATE}}},
    "items": {"*": [_ROW]},
    "files?": {"*": {"path": TEXT, "rows": NUMBER, "sha256": TEXT}},
    "conclusion?": {"level": TEXT, "sentences": [TEXT]},
    "not_measured?": {"*": TEXT},
}
_OWN_TABLE = {"*": {"n": NUMBER, "exact_match": NUMBER, "probability": NUMBER, "perplexity": NUMBER}}
RUN_RECORD = {
    "model?": OBJECT,
    "data?": {"bad?": OBJECT, "normal?": OBJECT, "template?": OBJECT},
    "training?": {"best?": {"step": NUMBER, "drift": NUMBER}, "seconds?": NUMBER},
    "before?": (_OWN_TABLE, None),
    "after?": (_OWN_TABLE, None),
    "not_reached?": ([TEXT], None),
    "versions?": OBJECT,
}


def parse(text: str) -> Any:
    """Parse JSON, with whole numbers that are too long to be measures as infinity. Raises ValueError."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= _LONGEST else math.inf)


def read_json_file(path: Path, hint: str = "was it edited or cut off?") -> dict[str, Any]:
    """Read a JSON object. Raises AdapterError."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot be read: {error}", where=str(path), hint=hint) from error
    if not isinstance(value, dict):
        raise AdapterError("is not a JSON object", where=str(path), hint=hint)
    return value


def check_shape(value: Any, shape: Any, path: Path, at: str = "", hint: str = "was it edited?") -> None:
    """Compare a value with a shape, and name the first place that differs. Raises AdapterError.

    A shape is a kind, an object by names ("name?" may be absent, "*" stands for any), a list of one shape, or a
    tuple of shapes of which one must fit.
    """
    if wrong := _differs(value, shape, at):
        raise AdapterError(wrong, where=str(path), hint=hint)


def _differs(value: Any, shape: Any, at: str) -> str | None:
    here = at or "it"
    if isinstance(shape, tuple):
        found = [_differs(value, each, at) for each in shape]
        return found[0] if all(found) else None
    if shape is None or isinstance(shape, str):
        fits = value is None if shape is None else isinstance(value, _KINDS[shape]) and not isinstance(value, bool)
        return None if fits else f"{here} is not {shape or 'null'}"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{here} is not a list"
        inner = [(f"{at}[{i}]", each, shape[0]) for i, each in enumerate(value)]
    else:
        if not isinstance(value, dict):
            return f"{here} is not an object"
        inner = []
        for name, each in shape.items():
            if name == "*":
                inner += [(_join(at, key), value[key], each) for key in value]
            elif (key := name.removesuffix("?")) in value:
                inner.append((_join(at, key), value[key], each))
            elif not name.endswith("?"):
                return f"{_join(at, key)} is missing"
    return next((wrong for place, each, wanted in inner if (wrong := _differs(each, wanted, place))), None)


def _join(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key[:80]
