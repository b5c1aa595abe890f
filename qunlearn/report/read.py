"""What a folder knows about itself, as the report needs it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError
from qunlearn.run import CONFIG, EVAL, METRICS, RECORD


@dataclass(frozen=True)
class Story:
    """A run, an evaluation, or both. `record`, `config` and `events` are empty for the evaluation of a bare model."""

    folder: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    suites: Mapping[str, Mapping[str, Any]]
    date: str

    @property
    def main(self) -> Mapping[str, Any] | None:
        """The evaluation the verdict is taken from: the basic one where there is one, else the latest."""
        return self.suites.get("basic") or next(reversed(list(self.suites.values())), None)


def read_story(folder: Path) -> Story:
    """Read a run folder, or a folder that `eval -o` wrote. Raises AdapterError."""
    record = _object(folder / RECORD)
    stored = _object(folder / EVAL)
    suites = stored.get("suites")
    suites = {name: s for name, s in suites.items() if _is_result(s)} if isinstance(suites, dict) else {}
    if stored.get("latest") in suites:  # last, for `main`
        latest = str(stored["latest"])
        suites[latest] = suites.pop(latest)
    if not record and not suites:
        hint = "give a folder of `qunlearn forget`, or of `qunlearn eval -o`"
        what = "no run and no evaluation in the folder" if folder.is_dir() else "no such folder"
        raise AdapterError(what, where=str(folder), hint=hint)
    newest = max((folder / name).stat().st_mtime for name in (RECORD, EVAL) if (folder / name).is_file())
    date = datetime.datetime.fromtimestamp(newest, datetime.timezone.utc).date().isoformat()
    return Story(folder, record, _config(folder / CONFIG), _events(folder / METRICS), suites, date)


def _is_result(suite: object) -> bool:
    needed = {"measures", "conclusion", "items", "scores", "files", "suite"}
    return isinstance(suite, dict) and needed <= suite.keys()


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot be read: {error}", where=str(path), hint="was it edited or cut off?") from error
    if not isinstance(value, dict):
        raise AdapterError("is not a JSON object", where=str(path), hint="was it edited?")
    return value


def _config(path: Path) -> dict[str, Any]:
    """Settings by "section.name"."""
    from qunlearn.overlay import read_config_file

    return read_config_file(path) if path.is_file() else {}


def _events(path: Path) -> list[dict[str, Any]]:
    """Steps of the loop; an interrupted run may end in half a line."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            events.append(event)
    return events
