"""What a folder knows about itself, as the report needs it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError
from qunlearn.evaluate.view import ADAPTER, BASE, KEPT, REFERENCE
from qunlearn.run import CONFIG, EVAL, METRICS, RECORD
from qunlearn.shape import EVALUATION, RUN_RECORD, check_shape, parse, read_json_file


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
    check_shape(record, RUN_RECORD, folder / RECORD)
    stored = _object(folder / EVAL)
    suites = stored.get("suites")
    suites = {name: s for name, s in suites.items() if _is_result(s)} if isinstance(suites, dict) else {}
    for name, suite in suites.items():
        _check_suite(suite, folder / EVAL, name)
    if isinstance(stored.get("latest"), str) and stored["latest"] in suites:  # last, for `main`
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


def _check_suite(suite: Mapping[str, Any], path: Path, name: str) -> None:
    """What the page and its pictures rely on. Raises AdapterError."""
    hint = "evaluate it again"
    check_shape(suite, EVALUATION, path, f"suites.{name}", hint)
    measured = {subject for of in suite["measures"].values() for found in of.values() for subject in found}
    unknown = sorted({*suite["scores"], *measured} - {BASE, ADAPTER, REFERENCE})
    unknown += sorted(set(suite["measures"]) - {*suite["files"], KEPT})
    if unknown:
        message = f"suites.{name}: {unknown[0][:80]!r} was not measured"
        raise AdapterError(message, where=str(path), hint=hint)


def _object(path: Path) -> dict[str, Any]:
    return read_json_file(path) if path.is_file() else {}


def _config(path: Path) -> dict[str, Any]:
    """Settings by "section.name"."""
    from qunlearn.overlay import read_config_file

    return read_config_file(path) if path.is_file() else {}


def _events(path: Path) -> list[dict[str, Any]]:
    """Steps of the loop; an interrupted run may end in half a line."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = parse(line)
        except (ValueError, RecursionError):
            continue
        step = event.get("step") if isinstance(event, dict) else None
        if isinstance(step, int) and not isinstance(step, bool) and step >= 0:
            events.append(event)
    return events
