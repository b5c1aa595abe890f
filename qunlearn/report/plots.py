"""Draw the report's plots: small enough for a phone, and without text of a row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qunlearn.evaluation.conclusion import KEEP_NAMES
from qunlearn.report.read import Story
from qunlearn.report.svg import COLOUR, to_svg

_SIZE = (4.4, 2.9)
_SHAPES = {"retain": "s", "holdout": "D", "general": "o"}
_WATCHED = {"forget": "bad", "holdout": "good", "normal, held back": "good"}  # of the last two one is there


@dataclass(frozen=True)
class Picture:
    title: str
    svg: str
    caption: str
    tall: bool = False


def pictures(story: Story) -> list[Picture]:
    """Every picture the folder has the numbers for."""
    with _style():
        made = [*_training(story), *_evaluation(story)]
    return [picture for picture in made if picture is not None]


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    settings: dict[Any, Any] = {
        "font.size": 10,
        "text.parse_math": False,  # a name with dollars in it is a name
        "axes.edgecolor": COLOUR["muted"],
        "axes.labelcolor": COLOUR["ink"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": COLOUR["grid"],
        "grid.linewidth": 0.8,
        "text.color": COLOUR["ink"],
        "xtick.color": COLOUR["muted"],
        "ytick.color": COLOUR["muted"],
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.6,
    }
    with matplotlib.rc_context(settings):
        yield


def _axes(name: str, height: float = _SIZE[1]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    figure.set_label(name)
    return figure, figure.subplots()


# -- training --------------------------------------------------------------------------------------------


def _training(story: Story) -> list[Picture | None]:
    looks = [e for e in story.events if _is_number(e.get("forget")) and _is_number(e.get("drift"))]
    steps = [e for e in story.events if e["step"] > 0]
    if not steps or not looks:
        return []
    best = story.record.get("training", {}).get("best", {}).get("step")
    return [
        _losses(steps),
        _forget_over_steps(story, looks, best),
        _drift_over_steps(story, looks, best),
        _path(looks),
        _kept_over_steps(story, best),
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")


def _losses(steps: Sequence[Mapping[str, Any]]) -> Picture | None:
    known = ("step", "grad_norm", "tokens", "tokens_per_s", "seconds", "forget", "drift", "lr")
    names = [name for name in steps[0] if name not in known and _is_number(steps[0][name])][:3]
    if not names:
        return None
    figure, axes = _axes("losses")
    for name, role in zip(names, ("one", "two", "three"), strict=False):
        points = [(e["step"], e[name]) for e in steps if _is_number(e.get(name))]
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=COLOUR[role], alpha=0.25, linewidth=0.9)
        axes.plot(x, _smooth(y), color=COLOUR[role], label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    caption = (
        "Each term of the objective per step, thin as it was, bold smoothed. "
        "KL is meant to stay low; a forget side that ends by itself, such as wga's, falls and comes back to 0."
    )
    return Picture("Loss over steps", to_svg(figure, "losses", "Losses over steps"), caption)


def _smooth(values: Sequence[float], share: float = 0.12) -> list[float]:
    """A running mean that weighs the newest most."""
    out, last = [], values[0]
    for value in values:
        last = (1 - share) * last + share * value
        out.append(last)
    return out


def _forget_over_steps(story: Story, looks: Sequence[Mapping[str, Any]], best: Any) -> Picture:
    figure, axes = _axes("probability")
    axes.plot([e["step"] for e in looks], [e["forget"] for e in looks], "o-", color=COLOUR["adapter"], markersize=4)
    _line(axes, story.config.get("stop.target"), "target")
    _best(axes, best)
    axes.set_xlabel("step")
    axes.set_ylabel("probability of the bad answers")
    caption = "How probable, per token, the bad answers still are; training aims below the target."
    return Picture(
        "Forgetting over steps", to_svg(figure, "probability", "Probability of bad answers over steps"), caption
    )


def _drift_over_steps(story: Story, looks: Sequence[Mapping[str, Any]], best: Any) -> Picture:
    figure, axes = _axes("drift")
    axes.plot([e["step"] for e in looks], [e["drift"] for e in looks], "o-", color=COLOUR["three"], markersize=4)
    _line(axes, story.config.get("stop.max_drift"), "budget")
    _best(axes, best)
    axes.set_xlabel("step")
    axes.set_ylabel("drift, nats per token")
    caption = "How far the model has moved on normal data it was not trained on: KL from the untouched model."
    return Picture("Drift over steps", to_svg(figure, "drift", "Drift over steps"), caption)


def _kept_over_steps(story: Story, best: Any) -> Picture | None:
    """Return what comes back of the bad answers and what stays of the rest, where `--eval-every` measured it."""
    seen = [(e["step"], e["measured"]) for e in story.events if isinstance(e.get("measured"), dict)]
    if len(seen) < 2:
        return None
    figure, axes = _axes("kept")
    for name, colour in _WATCHED.items():
        for measure, line in (("exact_match", "o-"), ("probability", ":")):
            points = [(step, of[name].get(measure)) for step, of in seen if isinstance(of.get(name), dict)]
            if known := [point for point in points if _is_number(point[1])]:
                x, y = zip(*known, strict=True)
                axes.plot(x, y, line, color=COLOUR[colour], markersize=4, label=name if line == "o-" else None)
    _best(axes, best, height=0.6)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("step")
    axes.set_ylabel("share of the rows; probability")
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    caption = (
        "Rows answered word for word (line), and how probable their answers are (dots), while training. "
        "The rows to forget are meant to fall, the others, never trained on, to stay."
    )
    svg = to_svg(figure, "kept", "What comes back and what stays, over steps")
    return Picture("Forgotten and kept by step", svg, caption)


def _line(axes: Any, value: Any, name: str) -> None:
    """A limit as a dashed line; one far above everything is named only, not to squeeze the curve."""
    top = axes.get_ylim()[1]
    axes.set_ylim(bottom=0)
    if not _is_number(value):
        return
    within, colour = value <= 3 * top, COLOUR["bad"]
    if not within:
        axes.set_ylim(top=1.15 * top)  # room for the name above the curve
    else:
        axes.axhline(value, color=colour, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.set_ylim(top=max(top, 1.1 * value))
    at = (1, value) if within else (0.9, 1)
    text = name if within else f"{name} {value:g}, far above"
    where = ("axes fraction", "data" if within else "axes fraction")
    axes.annotate(text, at, xycoords=where, ha="right", va="bottom" if within else "top", color=colour)


def _best(axes: Any, step: object, height: float = 1.0) -> None:
    if _is_number(step):
        axes.axvline(step, color=COLOUR["muted"], linewidth=0.9, linestyle=":")
        axes.annotate(
            "kept",
            (step, height),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
            rotation=90,
            color=COLOUR["muted"],
        )


def _path(looks: Sequence[Mapping[str, Any]]) -> Picture:
    figure, axes = _axes("path")
    x, y = [e["forget"] for e in looks], [e["drift"] for e in looks]
    axes.plot(x, y, "-", color=COLOUR["muted"], linewidth=0.9)
    axes.scatter(x, y, s=18, color=COLOUR["adapter"], zorder=3)
    for place in sorted({0, len(looks) // 4, len(looks) - 1}):
        axes.annotate(
            f"step {looks[place]['step']}",
            (x[place], y[place]),
            xytext=(4, 5),
            textcoords="offset points",
            color=COLOUR["muted"],
            fontsize=9,
            ha="right" if x[place] > 0.7 * max(x) else "left",
        )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("probability of the bad answers")
    axes.set_ylabel("drift, nats per token")
    caption = "The way the run took. The lower left corner is the aim: forgotten, and nothing else moved."
    return Picture("Forgetting against drift", to_svg(figure, "path", "Path of forgetting against drift"), caption)


# -- evaluation ------------------------------------------------------------------------------------------


def _evaluation(story: Story) -> list[Picture | None]:
    if story.main is None:
        return []
    return [_balance(story.main), _rows(story), _truth(story)]


def _balance(result: Mapping[str, Any]) -> Picture | None:
    """Leaks on the forget rows against what each kept split keeps, with both intervals."""
    measures = result["measures"]
    leaks = measures.get("forget", {}).get("leaks")
    kept = {s: _kept_measure(m) for s, m in measures.items() if s in _SHAPES and _kept_measure(m) is not None}
    if not leaks or not kept:
        return None
    figure, axes = _axes("balance")
    subjects = [s for s in result["scores"] if s in leaks]
    for offset, (split, found) in zip((-0.012, 0.0, 0.012), kept.items(), strict=False):
        for subject in subjects:
            if found is None or subject not in found:
                continue
            x, y = leaks[subject], found[subject]
            axes.errorbar(
                x["mean"] + offset, y["mean"], xerr=_error(x), yerr=_error(y), fmt=_SHAPES[split], markersize=5,
                color=COLOUR[subject], elinewidth=1, alpha=0.9,
            )  # fmt: skip
    for subject in subjects:
        axes.plot([], [], "o", color=COLOUR[subject], label=subject)
    for split in kept:
        axes.plot([], [], _SHAPES[split], color=COLOUR["muted"], label=split, markerfacecolor="none")
    axes.set_xlim(-0.05, 1.05)
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("share of the forget rows that still leak")
    axes.set_ylabel("kept elsewhere")
    axes.legend(loc="lower center", ncols=2, fontsize=8)
    caption = "Upper left is the aim: nothing leaks, everything else stays. Bars are 95 % intervals."
    return Picture("Forgetting against retention", to_svg(figure, "balance", "Leaks against retention"), caption)


def _kept_measure(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((found[name] for name in KEEP_NAMES if name in found), None)


def _error(found: Mapping[str, Any]) -> list[list[float]] | None:
    if found["low"] is None:
        return None
    return [[max(0.0, found["mean"] - found["low"])], [max(0.0, found["high"] - found["mean"])]]


def _rows(story: Story) -> Picture | None:
    """Every row's probability, split by split and model by model."""
    found = _values(story, "probability")
    if found is None:
        return None
    splits, values = found
    subjects = list(values)
    figure, axes = _axes("rows", 0.75 + 0.28 * len(splits) * len(subjects) + 0.12 * len(splits))
    ticks, labels, y = [], [], 0.0
    for split in reversed(splits):
        for subject in reversed(subjects):
            xs = values[subject].get(split, [])
            wiggle = [0.26 * (((i * 7919) % 101) / 100 - 0.5) for i in range(len(xs))]
            axes.scatter(xs, [y + w for w in wiggle], s=7, color=COLOUR[subject], alpha=0.55, linewidths=0)
            y += 0.42
        ticks.append(y - 0.42 * (len(subjects) + 1) / 2)
        labels.append(split)
        y += 0.2
    axes.set_yticks(ticks, labels)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("probability of the row's answer, per token")
    _key(axes, subjects)
    caption = "One dot a row. What should be gone belongs to the left; what should stay, where the base's dots are."
    return Picture("Row by row", to_svg(figure, "rows", "Probability of every row"), caption, tall=True)


def _truth(story: Story) -> Picture | None:
    """Cumulative distribution of the truth share on the forget rows."""
    found = _values(story, "truth_share")
    if found is None or "forget" not in found[0]:
        return None
    figure, axes = _axes("truth")
    for subject, of_split in found[1].items():
        xs = sorted(of_split.get("forget", []))
        if xs:
            axes.step(xs, [(i + 1) / len(xs) for i in range(len(xs))], where="post", color=COLOUR[subject])
    axes.axvline(0.5, color=COLOUR["muted"], linewidth=0.9, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("truth share: right / (right + wrong)")
    axes.set_ylabel("share of the rows up to here")
    _key(axes, list(found[1]))
    caption = (
        "Is the answer still told from wrong ones? At 0.5 it is not. Best is the retrained model's curve, not zero."
    )
    return Picture("Right against wrong", to_svg(figure, "truth", "Distribution of truth shares"), caption)


def _key(axes: Any, subjects: Sequence[str]) -> None:
    for subject in subjects:
        axes.plot([], [], "o", color=COLOUR[subject], label=subject)
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), handletextpad=0.2)


def _values(story: Story, name: str) -> tuple[list[str], dict[str, dict[str, list[float]]]] | None:
    """(splits, values by subject and split) of the first suite that has this measure by row; at most 2000 a split."""
    for result in [story.main, *story.suites.values()]:
        if result is None:
            continue
        values: dict[str, dict[str, list[float]]] = {subject: {} for subject in result["scores"]}
        for split, items in result["items"].items():
            for subject, of_split in values.items():
                rows = [i["values"].get(subject, {}).get(name) for i in items[:2000]]
                if known := [v for v in rows if v is not None]:
                    of_split[split] = known
        splits = [s for s in result["items"] if any(s in of_split for of_split in values.values())]
        if splits:
            return splits, {subject: found for subject, found in values.items() if found}
    return None
