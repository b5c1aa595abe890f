"""What a folder knows about itself, as the report needs it."""

from __future__ import annotations

import datetime
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError
from qunlearn.evaluate.results import read_suites
from qunlearn.jsonfile import EDITED, LARGE_BYTES, read_text
from qunlearn.run import CONFIG, EVAL, METRICS, RECORD, read_object


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
    record = read_object(folder / RECORD) if (folder / RECORD).is_file() else {}
    suites = read_suites(folder / EVAL) if (folder / EVAL).is_file() else {}
    if not record and not suites:
        hint = "give a folder of `qunlearn forget`, or of `qunlearn eval -o`"
        what = "no run and no evaluation in the folder" if folder.is_dir() else "no such folder"
        raise AdapterError(what, where=str(folder), hint=hint)
    newest = max((folder / name).stat().st_mtime for name in (RECORD, EVAL) if (folder / name).is_file())
    date = datetime.datetime.fromtimestamp(newest, datetime.timezone.utc).date().isoformat()
    return Story(folder, record, _config(folder / CONFIG), _events(folder / METRICS), suites, date)


def _config(path: Path) -> dict[str, Any]:
    """Settings by "section.name"."""
    from qunlearn.overlay import read_config_file

    return read_config_file(path) if path.is_file() else {}


def _events(path: Path) -> list[dict[str, Any]]:
    """Steps of the loop; an interrupted run may end in half a line."""
    if not path.is_file():
        return []
    events = []
    try:
        text = read_text(path, LARGE_BYTES // 2, errors="replace")
    except OSError as error:
        raise AdapterError(f"cannot be read: {error.strerror}", where=str(path), hint=EDITED) from error
    for line in io.StringIO(text):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            events.append(event)
    return events
