"""Find the files that a run was made from, with the bytes they had then, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.data.records import content_sha256
from qunlearn.errors import DataError
from qunlearn.runs.folder import Run


@dataclass(frozen=True)
class Recorded:
    """A file that a run's record names. `why`: what keeps it from being used; empty where it is as it was."""

    path: Path | None
    why: str = ""

    @property
    def usable(self) -> Path | None:
        return None if self.why else self.path


def recorded(run: Run, name: str) -> Recorded:
    """Find a run's file again: `name` is what record.json calls it, bad, normal or holdout.

    What lies at its path now may be the next batch: other rows than the run's would be measured in its name.
    """
    said: Mapping[str, Any] = run.record.get("data", {}).get(name) or {}
    path = Path(str(said.get("path") or ""))
    if not said.get("path"):
        return Recorded(None, "is not known")
    if not path.is_file():
        return Recorded(path, "is not where the run found it")
    try:
        same = said.get("sha256") in (None, content_sha256(path))
    except DataError as error:
        return Recorded(path, f"cannot be read: {error.message}")
    return Recorded(path, "" if same else "has changed since the run")
