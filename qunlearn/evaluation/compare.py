"""`qunlearn compare`: set evaluations side by side, and tell differences from noise. Reads records, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qunlearn.errors import AdapterError, ConfigError
from qunlearn.evaluation.catalog import MEASURES
from qunlearn.evaluation.eval_file import read_suites
from qunlearn.evaluation.metrics.stats import LEVEL, Estimate, paired_difference, paired_test, unpaired_difference
from qunlearn.evaluation.results import after
from qunlearn.evaluation.table import cell, format_of
from qunlearn.runs.folder import is_adapter_folder, what_is_there
from qunlearn.utils.console import Column, say, table
from qunlearn.utils.file_names import EVAL

_LEAST_PAIRS = 2  # and half of the rows of whom has fewer
_LEAST_TOLD = 6  # rows of which a difference is told from noise: the signs of five agree by chance in 1 of 16 cases


def compare(folders: Sequence[Path], suite: str | None, *, to_stdout: bool) -> dict[str, Any]:
    """The measures that all of them have, and each one's difference to the first. Raises QunlearnErrors."""
    if len(folders) < 2:
        raise ConfigError("two at least are needed to compare", where="compare", hint="qunlearn compare A B")
    loaded = [_load(folder) for folder in folders]
    name = suite or _common_suite(folders, loaded)
    results = [_suite_of(folder, suites, name) for folder, suites in zip(folders, loaded, strict=True)]
    names = names_of(folders)
    rows = _rows(results)
    if not rows:
        raise ConfigError(
            "no split was measured in all of them", where="compare", hint="evaluate them on the same files"
        )
    compared = {"suite": name, "first": names[0], "runs": names, "rows": rows}
    _show(compared, to_stdout=to_stdout)
    return compared


# -- reading ---------------------------------------------------------------------------------------------


def _load(folder: Path) -> dict[str, Any]:
    path = folder / EVAL
    if not path.is_file():
        what, meant = ("", "") if is_adapter_folder(folder) else what_is_there(folder)
        hint = meant or "run `qunlearn eval` on it first, a bare model with -o FOLDER"
        message = "has not been evaluated" if folder.is_dir() else f"has not been evaluated: {what}"
        raise AdapterError(message, where=str(folder), hint=hint)
    return read_suites(path)


def _common_suite(folders: Sequence[Path], loaded: Sequence[Mapping[str, Any]]) -> str:
    common = [name for name in loaded[0] if all(name in suites for suites in loaded)]
    if not common:
        each = "; ".join(f"{folder}: {', '.join(suites)}" for folder, suites in zip(folders, loaded, strict=True))
        raise ConfigError(
            f"no suite was run on all of them ({each})", where="compare", hint="evaluate with one --suite"
        )
    return "basic" if "basic" in common else common[0]


def _suite_of(folder: Path, suites: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if name not in suites:
        hint = f"it has {', '.join(suites) or 'none'}"
        raise ConfigError(f"suite {name!r} was not run on {folder}", where="--suite", hint=hint)
    result: Mapping[str, Any] = suites[name]
    return result


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or their whole paths where those are the same."""
    short = [folder.absolute().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


# -- differences -----------------------------------------------------------------------------------------


def _subject(result: Mapping[str, Any]) -> str:
    return after(result["scores"])


def _rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for split, of_split in results[0]["measures"].items():
        for name in of_split:
            values = [r["measures"].get(split, {}).get(name, {}).get(_subject(r)) for r in results]
            if name not in MEASURES or any(value is None for value in values):
                continue
            differences = [difference(split, name, results[0], other) for other in results[1:]]
            rows.append({"split": split, "measure": name, "values": values, "differences": differences})
    return rows


def difference(split: str, name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """`mean`, interval, `how` it was had, and `beyond_noise`: whether the 95 % interval leaves out 0, of six rows at
    least, and where they are paired a two-sided test (flipped signs) has p < 0.05: of few rows the interval is narrow.

    Paired over the rows both have; over all rows apart where they share less than half of the fewer; without an
    interval where a measure has no value of each row, as perplexity and AUC: then it is beyond noise when the two
    intervals do not meet.
    """
    a, b = _values(first, split, name), _values(second, split, name)
    both = [key for key in a if key in b]
    if len(both) >= max(_LEAST_PAIRS, min(len(a), len(b)) / 2):
        ours, theirs = [a[k] for k in both], [b[k] for k in both]
        found, how = paired_difference(ours, theirs), "paired"
    elif a and b:
        found, how = unpaired_difference(list(a.values()), list(b.values())), "unpaired"
    else:
        return _of_estimates(first, second, split, name)
    apart = found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
    apart = apart and found.n >= _LEAST_TOLD
    if apart and how == "paired":
        apart = 2 * paired_test(*((theirs, ours) if found.mean > 0 else (ours, theirs))) < 1 - LEVEL
    return {**asdict(found), "how": how, "beyond_noise": apart, "all_rows": len(both) == len(a) == len(b)}


def _values(result: Mapping[str, Any], split: str, name: str) -> dict[str, float]:
    subject = _subject(result)
    items = result.get("items", {}).get(split, [])
    found = {item["key"]: item["values"].get(subject, {}).get(name) for item in items}
    return {key: value for key, value in found.items() if value is not None}


def _of_estimates(first: Mapping[str, Any], second: Mapping[str, Any], split: str, name: str) -> dict[str, Any]:
    a, b = (r["measures"][split][name][_subject(r)] for r in (first, second))
    known = None not in (a["low"], a["high"], b["low"], b["high"])
    apart = known and (a["high"] < b["low"] or b["high"] < a["low"])
    found = Estimate(min(a["n"], b["n"]), b["mean"] - a["mean"])
    return {**asdict(found), "how": "intervals" if known else "none", "beyond_noise": apart, "all_rows": True}


# -- showing ---------------------------------------------------------------------------------------------


def _show(compared: Mapping[str, Any], *, to_stdout: bool) -> None:
    runs = compared["runs"]
    columns = [Column("", False), Column("", False), *(Column(name) for name in runs)]
    columns += [Column(f"{name} - {runs[0]}") for name in runs[1:]]
    lines, last = [], None
    for row in compared["rows"]:
        name = row["measure"]
        cells = [row["split"] if row["split"] != last else "", MEASURES[name].title]
        cells += [cell(name, value).partition(" [")[0] for value in row["values"]]
        lines.append([*cells, *(_difference_cell(name, d) for d in row["differences"])])
        last = row["split"]
    table(f"suite {compared['suite']}: difference [95 % interval], * beyond noise", columns, lines, to_stdout=to_stdout)
    counted = [d["beyond_noise"] for row in compared["rows"] for d in row["differences"]]
    expected = 0.05 * len(counted)
    say(
        f"{sum(counted)} of {len(counted)} differences are beyond noise; by chance alone about {expected:.0f} would be."
    )
    found = [d for row in compared["rows"] for d in row["differences"]]
    if any(d["how"] == "unpaired" for d in found):
        say("Some rows are not in all of them: those differences compare different rows.")
    if few := [d["n"] for d in found if d["how"] == "paired" and not d["all_rows"]]:
        say(f"Values are of all rows, some differences of those that all of them have: {min(few)} at least.")


def _difference_cell(name: str, found: Mapping[str, Any]) -> str:
    def signed(value: float) -> str:
        text = format_of(name)(abs(value))
        return f"{'-' if value < 0 else '+'}{text}"

    text = signed(found["mean"])
    if found["low"] is not None:
        text += f" [{signed(found['low'])}, {signed(found['high'])}]"
    return f"{text} {'*' if found['beyond_noise'] else ' '}"
