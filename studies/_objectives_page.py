"""What `make bench-objectives` writes: the tables in docs/objectives.md and the picture beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _objectives_chart import Point, draw
from _report import table, write_section
from _trials import Trial
from qunlearn.config.objective import OBJECTIVE_NAMES
from qunlearn.sandbox import KINDS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, PICTURE = DOCS / "objectives.md", "objectives.svg"
Result = Mapping[str, Any]
Results = Sequence[Result]

# name in a result -> title, digits, whether more is worse
FIGURES: dict[str, tuple[str, int, bool]] = {
    "forget": ("forget", 1, True),
    "paraphrase": ("paraphrase", 1, True),
    "tells_forget": ("tells", 1, True),
    "tells_paraphrase": ("tells, paraphrase", 1, True),
    "retain": ("retain", 1, False),
    "holdout": ("holdout", 1, False),
    "perplexity": ("perplexity", 3, True),
    "ks_p": ("KS p", 3, False),
    "p_bad": ("p(bad)", 3, True),
    "drift": ("drift", 3, True),
}
TELLS = 10.0  # %: what a model that never saw the rows says by guessing is of this size
# What is asked of a run: forgotten, the rest kept, and no normal file given.
GOALS: dict[str, Callable[[float], bool]] = {
    "forget": lambda x: x <= 1,
    "paraphrase": lambda x: x <= 3,
    "tells_forget": lambda x: x <= TELLS,
    "tells_paraphrase": lambda x: x <= TELLS,
    "retain": lambda x: x >= 98,
    "holdout": lambda x: x >= 95,
    "perplexity": lambda x: x <= 1.03,
    "ks_p": lambda x: x > 0.05,
}


def render(results: Results, is_of: Callable[[Trial, Result], bool]) -> None:
    """Write the section of docs/objectives.md and its picture from the finished runs."""
    own = [r for r in results if is_of(_plain(r), r)]
    other = [r for r in results if not is_of(_plain(r), r) and "failed" not in r]
    parts = [_where(results), _summary(own), f"![Forgetting against retention, by kind]({PICTURE})", _details(own)]
    if other:
        parts += ["Runs with other settings than the row's, seed by seed:", _others(other)]
    write_section("bench", "\n\n".join(parts), PAGE)
    (DOCS / PICTURE).write_text(draw(_points(own, other)), encoding="utf-8")


def _plain(result: Result) -> Trial:
    return Trial(result["objective"], result["kind"], result["seed"], {})


def _where(results: Results) -> str:
    dates = sorted({r["machine"]["date"] for r in results})
    m = results[-1]["machine"]
    libraries = ", ".join(f"{name} {m[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {m['device']}, {libraries}; `make bench-objectives`"


def _summary(own: Results) -> str:
    """One line an objective: how many of its runs meet every goal, and the worst of them all."""
    header = ["objective", "runs", "meet all", "but KS p"]
    header += [f"{title}, worst" for title, *_ in list(FIGURES.values())[:8]]
    header += ["KS p > 0.05", "seconds a run", "peak MiB"]
    rows = []
    for name in OBJECTIVE_NAMES:
        mine = [r for r in own if r["objective"] == name]
        done = [r for r in mine if "failed" not in r]
        if not mine:
            continue
        failed = f" ({len(mine) - len(done)} failed)" if len(done) < len(mine) else ""
        cells = [f"`{name}`", f"{len(mine)}{failed}", str(sum(map(_meets, done)))]
        cells.append(str(sum(_meets(r, without="ks_p") for r in done)))
        cells += [_worst(done, key) for key in list(FIGURES)[:8]]
        cells += [f"{sum(GOALS['ks_p'](r['ks_p']) for r in done)} of {len(done)}"]
        if done:
            seconds, peak = (statistics.median(r[name] for r in done) for name in ("train_seconds", "peak_bytes"))
            cells += [f"{seconds:.0f}", f"{peak / 2**20:.0f}"]
        else:
            cells += ["", ""]
        rows.append(cells)
    return table(header, rows)


def _details(own: Results) -> str:
    """One line an objective and kind: mean over seeds, and the worst where it is another."""
    header = ["objective", "kind", "seeds", *(title for title, *_ in FIGURES.values()), "step kept"]
    rows = []
    for name in OBJECTIVE_NAMES:
        for kind in KINDS:
            mine = [r for r in own if (r["objective"], r["kind"]) == (name, kind) and "failed" not in r]
            if mine:
                seeds = ", ".join(str(s) for s in sorted(r["seed"] for r in mine))
                figures = [_mean_and_worst(mine, key) for key in FIGURES]
                steps = ", ".join(str(r["step"]) for r in sorted(mine, key=lambda r: r["seed"]))
                rows.append([f"`{name}`", kind, seeds, *figures, steps])
    return table(header, rows)


def _others(other: Results) -> str:
    header = ["objective", "kind", "seed", "set otherwise", *(title for title, *_ in FIGURES.values()), "step kept"]
    order = {name: i for i, name in enumerate(OBJECTIVE_NAMES)}
    rows = []
    for r in sorted(other, key=lambda r: (order[r["objective"]], KINDS.index(r["kind"]), r["seed"], _changed(r))):
        figures = [f"{r[key]:.{digits}f}" for key, (_, digits, _) in FIGURES.items()]
        rows.append([f"`{r['objective']}`", r["kind"], str(r["seed"]), _changed(r), *figures, str(r["step"])])
    return table(header, rows)


def _changed(result: Result) -> str:
    """What a run set otherwise than its row has it now."""
    now = _plain(result).settings()
    return ", ".join(
        f"{key.split('.')[1]} {value}" for key, value in result["settings"].items() if now.get(key, value) != value
    )


def _meets(result: Result, without: str = "") -> bool:
    return all(good(result[name]) for name, good in GOALS.items() if name != without)


def _worst_value(results: Results, key: str) -> float:
    return float((max if FIGURES[key][2] else min)(r[key] for r in results))


def _worst(results: Results, key: str) -> str:
    return f"{_worst_value(results, key):.{FIGURES[key][1]}f}" if results else ""


def _mean_and_worst(results: Results, key: str) -> str:
    mean, worst = f"{statistics.fmean(r[key] for r in results):.{FIGURES[key][1]}f}", _worst(results, key)
    return mean if mean == worst else f"{mean} ({worst})"


def _points(own: Results, other: Results) -> list[Point]:
    """Every method at its own settings, means over seeds; and each other setting of the forget or retain side."""
    made: dict[tuple[str, str, str], list[Result]] = {}
    for r in own:
        if "failed" not in r:
            made.setdefault((r["kind"], r["objective"], ""), []).append(r)
    for r in other:
        made.setdefault((r["kind"], r["objective"], _changed(r)), []).append(r)
    return [
        Point(
            kind, name, changed == "", 100 - statistics.fmean(r["paraphrase"] for r in rs),
            statistics.fmean(r["holdout"] for r in rs),
        )
        for (kind, name, changed), rs in made.items()
    ]  # fmt: skip
