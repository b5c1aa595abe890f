"""`qunlearn report`: make one self-contained HTML file of a run's records."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn import __version__
from qunlearn.data.words import words
from qunlearn.errors import OutputError
from qunlearn.evaluation.catalog import MEASURES, SUITES
from qunlearn.evaluation.conclusion import PLACES, conclude, kept_share
from qunlearn.evaluation.levels import FORGOTTEN_SHARE, KEPT_SHARE, Level
from qunlearn.evaluation.results import BASE, after, is_forget
from qunlearn.evaluation.table import cell, format_of, paper_table, split_label
from qunlearn.report.audit import audit_section
from qunlearn.report.limits import limits
from qunlearn.report.plots import pictures
from qunlearn.report.read import Story, read_story
from qunlearn.report.target import check_target
from qunlearn.utils.files import write_whole

_HERE = Path(__file__).parent
_MOST_PAIRS = 300  # a split's answers in full; a page of thousands is read by nobody
_INVISIBLE = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127, *range(128, 160)), "�")
# Marks that turn the reading direction would let a text reorder what stands beside it.
_INVISIBLE |= {ord(c): "\N{REPLACEMENT CHARACTER}" for c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}


def write_report(folder: Path, output: Path, *, include_samples: bool, overwrite: bool = False) -> int:
    """Write the page for its owner's eyes only; returns its size in bytes. Raises AdapterError, OutputError.

    A page of ours is replaced; `overwrite`: any other file too.
    """
    story = read_story(folder)
    check_target(folder, output, overwrite=overwrite)
    page = render(story, include_samples=include_samples)
    page = page.encode("utf-8", "backslashreplace").decode()  # names of files may hold what is no Unicode
    try:
        write_whole(output, page)
    except OSError as error:
        hint = "choose another --output"
        raise OutputError(f"cannot be written: {error.strerror}", where=str(output), hint=hint) from error
    return len(page.encode())


def render(story: Story, *, include_samples: bool) -> str:
    """The page. Texts of rows are in it only with `include_samples`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    answers = _answers(story, include_samples) if story.main else []
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    fingerprint = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        style=Markup(style),
        style_hash=fingerprint,
        title=_title(story),
        story=story,
        verdict=_verdict(story),
        tiles=_tiles(story),
        pictures=[(p.title, Markup(p.svg), p.caption, p.tall) for p in pictures(story)],
        suites=[_suite(result) for result in _in_order(story)],
        subjects=list(dict.fromkeys(s for result in story.suites.values() for s in result["scores"])),
        before_after=_before_after(story.record),
        audit=audit_section(story.audit, plain) if story.audit else None,
        answers=answers,
        marks=[mark for mark in _MARKS if any(mark == m for split in answers for m, _ in split["counts"])],
        samples=include_samples,
        limits=limits(story),
        provenance=_provenance(story),
        settings=_settings(story),
        version=__version__,
    )


def _title(story: Story) -> str:
    model = story.record.get("model", {}).get("asked") or (story.main or {}).get("model", "a model")
    return f"What {Path(str(model)).name} still says"


def _in_order(story: Story) -> list[Mapping[str, Any]]:
    """The suite of the verdict first."""
    others = [result for result in story.suites.values() if result is not story.main]
    return [*([story.main] if story.main else []), *others]


# -- the top ---------------------------------------------------------------------------------------------

_LEVELS: Mapping[str, tuple[str, str]] = {
    Level.FORGOTTEN: ("good", "Suppressed, and the rest is kept"),
    Level.COSTLY: ("warn", "Suppressed, at a cost elsewhere"),
    Level.COST_UNKNOWN: ("warn", "Suppressed; what it cost was not measured"),
    Level.NEVER_KNOWN: ("plain", "Nothing to suppress: the base does not say it"),
    Level.PARTLY: ("warn", "Only partly suppressed"),
    Level.REMEMBERED: ("bad", "Not suppressed"),
    Level.MEASURED: ("plain", "Measured, nothing to judge"),
}


def _verdict(story: Story) -> dict[str, Any]:
    if story.main is not None:
        conclusion = conclude(story.main)  # not what is stored: an earlier version may have concluded more
        colour, headline = _LEVELS.get(conclusion["level"], _LEVELS["measured"])
        return {
            "colour": colour,
            "headline": headline,
            "sentences": [s[:1].upper() + s[1:] for s in conclusion["sentences"][1:]],
        }
    record = story.record
    sentences = [f"Training ended: {record.get('stop_reason', 'unknown')}."]
    return {"colour": "plain", "headline": "Trained, not yet evaluated", "sentences": sentences}


@dataclass(frozen=True)
class Tile:
    number: str
    label: str
    note: str
    colour: str = "plain"


def _tiles(story: Story) -> list[Tile]:
    """The few numbers that matter, each with its uncertainty."""
    tiles: list[Tile] = []
    for split, found in (story.main or {"measures": {}})["measures"].items():
        if is_forget(split) and (judged := after(found.get("leaks", {}))) != BASE:
            e = found["leaks"][judged]
            label = f"still leak, {PLACES.get(split, split)}"
            colour = "bad" if e["mean"] > FORGOTTEN_SHARE else "good" if _said_before(found["leaks"]) else "plain"
            tiles.append(Tile(f"{round(e['mean'] * e['n'])} of {e['n']}", label, _range(e), colour))
        elif (judged := after(found.get("exact_match", {}))) != BASE:
            e, share = found["exact_match"][judged], kept_share(found)
            colour = "plain" if share is None else "good" if share >= KEPT_SHARE else "warn"
            tiles.append(Tile(f"{100 * e['mean']:.0f} %", f"{split}: answered word for word", _range(e), colour))
    training = story.record.get("training", {})
    if "best" in training:
        budget = story.config.get("stop.max_drift")
        note = f"nats per token, budget {budget:g}" if isinstance(budget, (int, float)) else "nats per token"
        tiles.append(Tile(f"{training['best']['drift']:.3f}", "drift on other data", note))
    return tiles


def _said_before(leaks: Mapping[str, Any]) -> bool:
    """Return whether the base gave these answers at all: where it did not, none that comes back is no success."""
    return bool(leaks.get(BASE, {"mean": 1.0})["mean"] > FORGOTTEN_SHARE)


def _range(e: Mapping[str, Any]) -> str:
    return "" if e["low"] is None else f"95 %: {100 * e['low']:.0f} to {100 * e['high']:.0f} %"


# -- tables ----------------------------------------------------------------------------------------------


def _suite(result: Mapping[str, Any]) -> dict[str, Any]:
    subjects = list(result["scores"])
    groups = []
    for split, of_split in result["measures"].items():
        rows = [
            {
                "title": MEASURES[name].title,
                "cells": [_parts(name, found.get(subject)) for subject in subjects],
                "bars": [_bar(name, found.get(subject), subject) for subject in subjects],
            }
            for name, found in of_split.items()
            if name in MEASURES
        ]
        groups.append({"label": split_label(split, result), "rows": rows})
    missing = [
        f"{MEASURES[n].title} (needs {what})" for n, what in result.get("not_measured", {}).items() if n in MEASURES
    ]
    about = SUITES[result["suite"]].about if result["suite"] in SUITES else ""
    return {
        "name": result["suite"],
        "about": about,
        "subjects": subjects,
        "groups": groups,
        "missing": missing,
        "paper": paper_table(result) if result["suite"] == "llmu" else None,
    }


def _parts(name: str, found: Mapping[str, Any] | None) -> tuple[str, str]:
    """(value, interval) apart, so that the page can set the interval small."""
    value, _, interval = cell(name, found).partition(" [")
    return value, interval.removesuffix("]").replace(", ", " – ")


def _bar(name: str, found: Mapping[str, Any] | None, subject: str) -> dict[str, Any] | None:
    """Return where a share or probability and its interval stand between 0 and 100."""
    if found is None or MEASURES[name].unit not in ("%", "p"):
        return None
    low, high = found["low"], found["high"]
    low, high = (found["mean"], found["mean"]) if low is None else (low, high)
    return {
        "subject": subject,
        "low": round(100 * low, 1),
        "width": round(max(100 * (high - low), 0.8), 1),
        "at": round(min(max(100 * found["mean"] - 0.8, 0.0), 98.4), 1),
    }


def _before_after(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The run's own table, on its own rows."""
    before, after = record.get("before") or {}, record.get("after") or {}
    rows = []
    for split, old in before.items():
        for name in ("exact_match", "probability", "perplexity"):
            number = format_of(name)
            sign = " %" if name == "exact_match" else ""
            new = after.get(split)
            rows.append(
                {
                    "split": f"{split} ({old['n']})",
                    "title": MEASURES[name].title,
                    "before": number(old[name]) + sign,
                    "after": number(new[name]) + sign if new else "–",
                }
            )
    return rows


# -- answers ---------------------------------------------------------------------------------------------


def _answers(story: Story, include_samples: bool) -> list[dict[str, Any]]:
    """Each split's rows: marks always, texts only where they were asked for."""
    result = story.main or {}
    splits = []
    for split, items in result["items"].items():
        subject = after(result["scores"])
        rows = [_row(i, item, subject, split, include_samples) for i, item in enumerate(items, 1)]
        marks = sorted({row["mark"] for row in rows}, key=_MARKS.index)
        counts = [(mark, sum(row["mark"] == mark for row in rows)) for mark in marks]
        shown = rows[:_MOST_PAIRS] if include_samples else []
        splits.append({"name": split, "counts": counts, "rows": rows[:2000], "pairs": shown, "total": len(rows)})
    return splits


_MARKS = ["still leaks", "gibberish", "refused", "forgotten", "as before", "changed"]


def _row(number: int, item: Mapping[str, Any], subject: str, split: str, texts: bool) -> dict[str, Any]:
    outputs = item.get("outputs", {})
    mark = item.get("verdicts", {}).get(subject)
    if mark not in _MARKS:
        same = outputs.get(subject, "").strip() in (outputs.get(BASE, "").strip(), item.get("answer", "").strip())
        mark = "as before" if same else "changed"
    row: dict[str, Any] = {"number": number, "mark": mark, "class": mark.replace(" ", "-"), "split": split}
    if texts:
        row["prompt"] = plain(item.get("prompt", ""))
        row["answer"] = plain(item.get("answer", ""))
        row["outputs"] = [(who, marked(said, item.get("answer", ""))) for who, said in outputs.items()]
    return row


def plain(text: object) -> str:
    """Text as it is, but for characters that are not seen or that turn the direction of what stands beside them."""
    return str(text).translate(_INVISIBLE)


def marked(output: object, answer: object) -> list[tuple[str, bool]]:
    """The output in pieces, True for words of four letters and more that the row's answer has: what came back."""
    wanted = {word for word in words(str(answer)) if len(word) > 3}
    pieces: list[tuple[str, bool]] = []
    for part in _split_words(plain(output)):
        hit = bool(wanted & set(words(part)))
        if pieces and pieces[-1][1] == hit:
            pieces[-1] = (pieces[-1][0] + part, hit)
        else:
            pieces.append((part, hit))
    return pieces


def _split_words(text: str) -> Sequence[str]:
    return [part for part in re.split(r"(\w+)", text) if part]


# -- the end ---------------------------------------------------------------------------------------------


def _provenance(story: Story) -> list[tuple[str, str]]:
    record, result = story.record, story.main or {}
    model, data, training = (record.get(name, {}) for name in ("model", "data", "training"))
    bad = data.get("bad", {})
    rows = [
        ("folder", str(story.folder)),
        ("model", model.get("asked") or result.get("model")),
        ("revision", model.get("revision")),
        ("commit", model.get("commit")),
        ("model fingerprint", model.get("fingerprint")),
        ("loaded as", model.get("quantization") or result.get("quantization")),
        ("forget file", f"{bad.get('path')}, {bad.get('rows')} rows, sha256 {bad.get('sha256')}" if bad else None),
        ("template", data.get("template", {}).get("name")),
        ("steps", f"{training.get('steps')}, kept: {training.get('best', {}).get('step')}" if training else None),
        ("stopped because", record.get("stop_reason")),
        ("training time", f"{training['seconds']:.0f} s" if "seconds" in training else None),
        ("seed", training.get("seed")),
        ("device", record.get("device")),
        ("retrained model", result.get("retrained_model")),
    ]
    for name, facts in result.get("files", {}).items():
        rows.append((f"evaluated: {name}", f"{facts['path']}, {facts['rows']} rows, sha256 {facts['sha256']}"))
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    rows.append(("versions", versions))
    return [(name, plain(value)) for name, value in rows if value not in (None, "")]


def _settings(story: Story) -> list[tuple[str, str, bool]]:
    """(setting, value, whether it differs from the default) of the whole configuration."""
    from qunlearn.config.settings import SETTINGS

    return [
        (key, plain(value), key in SETTINGS and value != SETTINGS[key].default)
        for key, value in sorted(story.config.items())
    ]
