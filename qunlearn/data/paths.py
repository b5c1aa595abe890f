"""Find a run's data files, and how their fields are named."""

from __future__ import annotations

from pathlib import Path

from qunlearn.config.settings import DataConfig
from qunlearn.data.local_path import local_path
from qunlearn.data.records import FieldNames
from qunlearn.errors import ConfigError
from qunlearn.sandbox import KINDS, data_file


def fields_of(data: DataConfig) -> FieldNames:
    """Return how a run's files name their fields, and which answers of a dialogue are rows."""
    return FieldNames(data.prompt_field, data.completion_field, data.turns)


def data_path(text: str, *, stdin: bool = False) -> Path:
    """Return a path, `sandbox:KIND/SPLIT` for an embedded file, and where `stdin` is allowed - for it.

    Raises ConfigError for what is no file here.
    """
    scheme, _, name = text.partition(":")
    if text == "-":
        if stdin:
            return Path("/dev/stdin")
        raise ConfigError("a run reads its files again later, which a pipe cannot be", where="-", hint="save it first")
    if scheme != "sandbox":
        return local_path(text)
    kind, _, split = name.partition("/")
    path = data_file(kind, split)
    if kind not in KINDS or not path.is_file():
        hint = f"sandbox:KIND/SPLIT, with KIND one of {', '.join(KINDS)}"
        raise ConfigError(f"no embedded file {name!r}", where=text, hint=hint)
    return path
