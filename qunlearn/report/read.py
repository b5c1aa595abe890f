"""Read what a run folder records, as the report needs it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError
from qunlearn.evaluation.eval_file import read_suites
from qunlearn.evaluation.results import ADAPTER, BASE, GUARDED, KEPT, RETRAINED
from qunlearn.report.audit import read_audit
from qunlearn.runs.folder import what_is_there
from qunlearn.utils.file_names import CONFIG, EVAL, METRICS, RECORD
from qunlearn.utils.json_files import EDITED, LARGE_BYTES, misfit, read_object, read_text
from qunlearn.utils.units import date_of

_NUMBER = (int, float)
_OWN_TABLE = {"*": {"n": _NUMBER, "exact_match": _NUMBER, "probability": _NUMBER, "perplexity": _NUMBER}}
_RECORD = {
    "model?": dict,
    "data?": {"bad?": dict, "normal?": dict, "template?": dict},
    "training?": {"best?": {"step": _NUMBER, "drift": _NUMBER}, "seconds?": _NUMBER},
    "before?": _OWN_TABLE,
    "after?": _OWN_TABLE,
    "not_reached?": [str],
    "ended?": str,
    "versions?": dict,
}
_LONGEST = 18  # digits of a whole number: no count of ours has more, and no float holds 400


@dataclass(frozen=True)
class Story:
    """A run, an evaluation, or both. `record`, `config` and `events` are empty for the evaluation of a bare model."""

    folder: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]
    suites: Mapping[str, Mapping[str, Any]]
    date: str
    audit: Mapping[str, Any] | None = None

    @property
    def main(self) -> Mapping[str, Any] | None:
        """The evaluation the verdict is taken from: the basic one where there is one, else the latest."""
        return self.suites.get("basic") or next(reversed(list(self.suites.values())), None)


def read_story(folder: Path) -> Story:
    """Read a run folder, or a folder that `eval -o` wrote. Raises AdapterError."""
    record = _read_record(folder / RECORD) if (folder / RECORD).is_file() else {}
    suites = read_suites(folder / EVAL) if (folder / EVAL).is_file() else {}
    for name, suite in suites.items():
        _check_suite(suite, folder / EVAL, name)
    if not record and not suites:
        what, meant = what_is_there(folder)
        what = "no run and no evaluation in the folder" if folder.is_dir() else what
        hint = meant or "give a folder of `qunlearn forget`, or of `qunlearn eval -o`"
        raise AdapterError(what, where=str(folder), hint=hint)
    dates = [date_of((folder / name).stat().st_mtime) for name in (RECORD, EVAL) if (folder / name).is_file()]
    if record.get("ended") and not suites:
        dates = [record["ended"]]  # a copy is younger than what it holds
    date = max(dates)[:10]
    return Story(folder, record, _config(folder / CONFIG), _events(folder / METRICS), suites, date, read_audit(folder))


def _read_record(path: Path) -> dict[str, Any]:
    """Return what the page and its pictures rely on. Raises AdapterError."""
    record = read_object(path)
    known = {name: value for name, value in record.items() if value is not None}
    if (wrong := misfit(known, _RECORD)) is not None:
        raise AdapterError(f"not what it should hold: {wrong}", where=str(path), hint=EDITED)
    return record


def _check_suite(suite: Mapping[str, Any], path: Path, name: str) -> None:
    """Every subject and split of the numbers must be one that was measured. Raises AdapterError."""
    measured = {subject for of in suite["measures"].values() for found in of.values() for subject in found}
    unknown = sorted({*suite["scores"], *measured} - {BASE, ADAPTER, GUARDED, RETRAINED})
    unknown += sorted(set(suite["measures"]) - {*suite["files"], KEPT})
    if unknown:
        message = f"suites.{name}: {unknown[0][:80]!r} was not measured"
        raise AdapterError(message, where=str(path), hint="evaluate it again")


def _config(path: Path) -> dict[str, Any]:
    """Settings by "section.name"."""
    from qunlearn.config.resolve import read_config_file

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
            event = json.loads(line, parse_int=lambda d: int(d) if len(d) <= _LONGEST else math.inf)
        except (ValueError, RecursionError):
            continue
        step = event.get("step") if isinstance(event, dict) else None
        if isinstance(step, int) and not isinstance(step, bool) and step >= 0:
            events.append(event)
    return events
