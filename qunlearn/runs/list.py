"""`qunlearn runs`: list what was forgotten, from which model, when, with what result; no texts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError, ConfigError
from qunlearn.utils.console import Column, clean, out, table
from qunlearn.utils.file_names import ADAPTER, RECORD
from qunlearn.utils.json_files import read_object
from qunlearn.utils.output import INSIDE
from qunlearn.utils.staging import staging_folder
from qunlearn.utils.units import date_of

_DEPTH = 3  # folders below the one that was named
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")
_HASH, _NUMBERS = 12, 16  # characters of a hash that are shown, and of the columns with numbers


def find_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs at or below a folder, oldest first, an interrupted one once; links are not followed. Raises
    ConfigError."""
    if not folder.is_dir():
        raise ConfigError("no such folder", where=str(folder), hint="give the folder that holds the runs")
    rows = [_finished(path) for path in _records(folder)]
    listed = {row["run"] for row in rows if row["status"] == "interrupted"}  # which says that it can be resumed
    left = (_unfinished(path) for path in _walk(folder) if path.name.endswith(INSIDE))
    rows += [row for row in left if row and row["run"] not in listed]
    return sorted(rows, key=lambda row: (row["when"], row["run"]))


def _walk(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    yield folder
    if depth == 0:
        return
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:  # not ours to read
        return
    for path in below:
        yield from _walk(path, depth - 1)


def _records(folder: Path) -> Iterator[Path]:
    for path in _walk(folder):
        inside = any(part.endswith(INSIDE) for part in path.relative_to(folder).parts)
        if not inside and _is_file(path / RECORD):
            yield path


def _is_file(path: Path) -> bool:
    """Return whether a file is there that can be seen: one closed folder does not hide the others."""
    try:
        return path.is_file()
    except OSError:
        return False


def _finished(folder: Path) -> dict[str, Any]:
    when = date_of((folder / RECORD).stat().st_mtime)  # of a copy the copy's
    try:
        record = read_object(folder / RECORD)
    except AdapterError:
        return _row(folder, when, "unreadable record")
    data, model, training = _at(record, "data"), _at(record, "model"), _at(record, "training")
    bad, normal, best = _at(data, "bad"), _at(data, "normal"), _at(training, "best")
    ended = _text(record.get("ended")) or ""
    row = _row(folder, ended if _DATE.fullmatch(ended) else when, str(record.get("status", "?")))
    row["forgot"] = {"file": _name(bad.get("path")), "sha256": _text(bad.get("sha256")), "rows": bad.get("rows")}
    own = bool(normal.get("self_made"))
    row["normal"] = {"self_made": own, "file": None if own else _name(normal.get("path"))}
    row["model"] = {"name": _text(model.get("asked")), "fingerprint": _text(model.get("fingerprint"))}
    row["result"] = {
        "bad_probability": _number(best.get("forget")),
        "drift_nats_per_token": _number(best.get("drift")),
        "step": best.get("step"),
        "verdicts": record.get("verdicts") if isinstance(record.get("verdicts"), dict) else None,
    }
    row["adapter"] = _is_file(folder / ADAPTER / "adapter_model.safetensors")
    return row


def _unfinished(stage: Path) -> dict[str, Any] | None:
    """A run that was stopped and is not over; merges keep their work in such folders too and are not listed."""
    beside = stage.with_name(stage.name.removeprefix(".").removesuffix(INSIDE))
    output = stage.parent if stage.name == INSIDE else beside
    path = stage / "unfinished.json"
    if not _is_file(path) or staging_folder(output).name != stage.name:
        return None
    row = _row(output, date_of(path.stat().st_mtime), "unfinished")
    try:
        found = read_object(path)
    except AdapterError:
        return row
    row["forgot"] = {"file": None, "sha256": _text(found.get("bad")), "rows": None}
    row["model"] = {"name": None, "fingerprint": _text(found.get("model"))}
    return row


def _row(folder: Path, when: str, status: str) -> dict[str, Any]:
    row: dict[str, Any] = {"run": str(folder), "when": when, "status": status}
    return row | {"forgot": {}, "normal": {}, "model": {}, "result": {}, "adapter": False}


def _at(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _name(path: object) -> str | None:
    return os.path.basename(path.replace("\\", "/")) if isinstance(path, str) else None  # noqa: PTH119 - of any system


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def show_runs(rows: list[dict[str, Any]]) -> None:
    """The table, on stdout."""
    titles = ("run", "when", "status", "forgot", "sha256", "from", "fingerprint")
    columns = [*(Column(title, False) for title in titles), Column("p(bad)"), Column("drift")]
    cells = [
        [
            row["run"],
            row["when"][:16],
            row["status"],
            row["forgot"].get("file") or "?",
            (row["forgot"].get("sha256") or "?")[:_HASH],
            row["model"].get("name") or "?",
            (row["model"].get("fingerprint") or "?")[:_HASH],
            _shown(row["result"].get("bad_probability")),
            _shown(row["result"].get("drift_nats_per_token")),
        ]
        for row in rows
    ]
    console = out()
    needed = sum(
        max(map(len, column)) + 2 for column in zip(titles, *(row[: len(titles)] for row in cells), strict=True)
    )
    if not console.is_terminal or needed + _NUMBERS <= console.width:
        table(f"{len(rows)} runs", columns, cells, to_stdout=True)
        return
    # Folded over several lines a path can be neither read nor copied.
    console.print(f"{len(rows)} runs", style="bold", markup=False)
    for row in cells:
        told = (f"{column.title} {value}" for column, value in zip(columns[1:], row[1:], strict=True) if value)
        console.print(clean(row[0]), soft_wrap=True, markup=False)
        console.print(clean(f"  {'; '.join(told)}"), markup=False)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
