"""Print an evaluation: one block a split, one line a measure, one column a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qunlearn.evaluation.catalog import MEASURES
from qunlearn.evaluation.results import KEPT
from qunlearn.utils.console import Column, say, table


def show(result: Mapping[str, Any], *, to_stdout: bool) -> None:
    """The whole result: the measures with their intervals, the verdicts, what could not be measured, the conclusion."""
    subjects = list(result["scores"])
    columns = [Column("", right=False), Column("", right=False), *(Column(s) for s in subjects)]
    rows: list[list[str]] = []
    for split, of_split in result["measures"].items():
        label = split_label(split, result)
        for name, found in of_split.items():
            rows.append([label, MEASURES[name].title, *(cell(name, found.get(s)) for s in subjects)])
            label = ""
    table(f"{result['model']}, suite {result['suite']}: mean [95 % interval]", columns, rows, to_stdout=to_stdout)
    if result["suite"] == "llmu":
        header, lines = paper_table(result)
        shaped = [Column(title, right=i > 0) for i, title in enumerate(header)]
        table("In the shape of the paper's table", shaped, lines, to_stdout=to_stdout)
    for split in ("forget", "paraphrase"):
        found = result["verdicts" if split == "forget" else "verdicts_paraphrase"]
        for subject, counts in found.items():
            say(f"{split}, {subject}: " + ", ".join(f"{n} {word}" for word, n in counts.items() if n))
    for name, missing in result["not_measured"].items():
        say(f"not measured: {MEASURES[name].title} (needs {missing})", style="dim")
    for sentence in result["conclusion"]["sentences"]:
        say(sentence, style="bold" if sentence == result["conclusion"]["sentences"][0] else None)


def split_label(split: str, result: Mapping[str, Any]) -> str:
    """A split's name with its rows."""
    return "all to keep" if split == KEPT else f"{split} ({result['files'][split]['rows']})"


def cell(name: str, found: Mapping[str, Any] | None) -> str:
    """A value with its interval, in the measure's unit."""
    if found is None:
        return ""
    number = format_of(name)
    text = number(found["mean"]) + _SIGNS.get(MEASURES[name].unit, "")
    if found["low"] is None or found["high"] is None:
        return text
    return f"{text} [{number(found['low'])}, {number(found['high'])}]"


_SIGNS = {"%": " %", "%point": " %"}


def format_of(name: str) -> Callable[[float], str]:
    """Return how a measure's numbers are written, without their unit."""
    unit = MEASURES[name].unit
    if unit == "%":
        return lambda value: f"{100 * value:.1f}"
    if unit == "%point":
        return lambda value: f"{value:.1f}"
    if unit == "ppl":
        return lambda value: f"{value:.2f}" if value < 1e5 else f"{value:.1e}"
    if unit in ("nats", "bits", "score"):
        return lambda value: f"{value:.3f}"
    return lambda value: f"{value:.3f}" if value >= 0.01 or value == 0 else f"{value:.1e}"


_WHO = {"base": "original", "adapter": "unlearned", "guarded": "guarded", "retrained": "never saw it"}
_EFFICACY = ("harmful_rate", "hallucination_rate", "leak_rate")


def paper_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a llmu suite in the shape of the paper's tables (arXiv 2310.10683): one row a model; efficacy,
    diversity and fluency on unlearned and unseen prompts; utility on normal ones. "NM" where fluency is withheld.
    """
    measures = result["measures"]
    columns: list[tuple[str, str, str]] = []
    for split, place in (("forget", "unlearned"), ("paraphrase", "unseen")):
        names = [n for n in _EFFICACY if n in measures.get(split, {})] + ["diversity", "fluency"]
        columns += [(split, name, f"{place}: {_SHORT.get(name, MEASURES[name].title)}") for name in names]
    normal = next((s for s in ("holdout", "general", "retain") if s in measures), None)
    columns += [
        (normal, n, f"normal: {_SHORT[n]}") for n in ("reward", "similarity") if normal and n in measures[normal]
    ]
    columns = [column for column in columns if column[0] in measures]
    rows = []
    for subject in result["scores"]:
        values = []
        for split, name, _ in columns:
            found = measures[split].get(name, {}).get(subject)
            text = "NM" if name == "fluency" else "–"
            values.append(
                text if found is None else format_of(name)(found["mean"]) + _SIGNS.get(MEASURES[name].unit, "")
            )
        rows.append([_WHO.get(subject, subject), *values])
    return ["model", *(title for _, _, title in columns)], rows


_SHORT = {"fluency": "fluency", "reward": "reward", "similarity": "similarity"}
