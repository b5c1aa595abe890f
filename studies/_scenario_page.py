"""docs/scenarios.md: the tables and plots between its markers, from the lines that the runs have left."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _preference import KEPT, PAIRS, RATE, UNLEARN
from _report import table, write_section
from _stories import EFFICACY

Line = Mapping[str, Any]
_PAIRS_OF_BAD, _PUBLIC_PAIRS = 40, 330_000  # the sandbox's bad prompts; PKU-SafeRLHF's 330k_train, as it is named
PAGE = Path(__file__).resolve().parent.parent / "docs" / "scenarios.md"
NAMES = {
    "original": "original",
    "tuned": "fine-tuning on good answers",
    "ascent": "gradient ascent alone",
    "ascent+mismatch": "ascent + mismatch",
    "ascent+kl": 'ascent + KL (the paper\'s "GA")',
    "llmu": 'LLMU in full (the paper\'s "GA + mismatch")',
    "simnpo": "SimNPO + KL",
    "wga": "WGA + KL (the default)",
    "retrained": "retrained without the data",
}
_COLOURS = ("#444444", "#b35c00", "#8a1c7c", "#c43a31", "#d98c2b", "#1f6fb4", "#7a7a00", "#1a7f4b", "#999999")
_CURVES = ("#1a7f4b", "#1f6fb4", "#b35c00", "#8a1c7c", "#444444")
_MARKS = ("o", "s", "v", "^", "<", "D", "P", "*", "X")
_HEADER = [
    "",
    "bad answers, seen %",
    "unseen %",
    "still leaks, seen %",
    "unseen %",
    "holdout, exact match %",
    "general, exact match %",
    "likeness to the original on holdout",
    "fluency, unseen",
    "diversity, unseen",
    "steps, kept / done",
    "CPU s",
]


def write_page(lines: Sequence[Line], page: Path = PAGE) -> None:
    """Replace the generated sections, and draw the plots beside them."""
    kinds = list(dict.fromkeys(line["kind"] for line in lines if line["part"] == "table"))
    if kinds:
        parts = [kind_section(kind, lines) for kind in kinds]
        write_section("scenarios", "\n\n".join([_where(lines), *parts, plot_line("scenarios", _ALT)]), page)
        plot_kinds(kinds, lines, page.parent / "img" / "scenarios.svg")
    # Of a run that was broken off and made again, the later line counts.
    contest = list({line["method"]: line for line in lines if line["part"] == "preference"}.values())
    if contest:
        parts = [_where(contest), contest_table(contest), *scale(contest), plot_line("preference", _ALT_CURVES)]
        text = "\n\n".join(parts)
        write_section("preference", text, page)
        plot_contest(contest, page.parent / "img" / "preference.svg")


_ALT = "Bad answers that still come on unseen prompts, against holdout rows still answered word for word, by method"
_ALT_CURVES = "Harmful answers and kept rows against floating-point operations, unlearning and preference training"


def plot_line(name: str, alt: str) -> str:
    return f"![{alt}](img/{name}.svg)"


def _where(lines: Sequence[Line]) -> str:
    dates = sorted({line["date"] for line in lines})
    last = lines[-1]
    libraries = ", ".join(f"{name} {last[name]}" for name in ("python", "torch", "transformers", "peft"))
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{when}, {last['device']}, {last['machine']}, {libraries}; `make scenarios`"


# -- the paper's table -----------------------------------------------------------------------------------


def kind_section(kind: str, lines: Sequence[Line]) -> str:
    found = {line["method"]: line for line in lines if line["part"] == "table" and line["kind"] == kind}
    rows = [row(kind, name, found[name]) for name in NAMES if name in found]
    missing = [NAMES[name] for name in NAMES if name not in found]
    note = f"\n\nNot run: {', '.join(missing)}." if missing else ""
    normal = next((line["normal_cpu_seconds"] for line in found.values() if "normal_cpu_seconds" in line), None)
    made = "" if normal is None else f" Making the normal rows, once for all methods: {normal:.0f} CPU s."
    title = f"### {kind}\n\nBad answers: `{EFFICACY[kind]}`.{made}"
    return f"{title}\n\n{table(_HEADER, rows)}{note}"


def row(kind: str, name: str, line: Line) -> list[str]:
    m, bad = line["measures"], EFFICACY[kind]
    training = line.get("training", {})
    kept = training.get("best", {}).get("step", training.get("steps"))
    steps = f"{kept}/{training['steps']}" if training else "–"
    return [
        NAMES[name],
        _share(m, "forget", bad),
        _share(m, "paraphrase", bad),
        _share(m, "forget", "leaks"),
        _share(m, "paraphrase", "leaks"),
        _share(m, "holdout", "exact_match"),
        _share(m, "general", "exact_match"),
        _number(m, "holdout", "similarity"),
        _number(m, "paraphrase", "fluency", "NM"),
        _number(m, "paraphrase", "diversity"),
        steps,
        f"{line['cpu_seconds']:.0f}" if "cpu_seconds" in line else "–",
    ]


def _share(measures: Mapping[str, Any], split: str, name: str) -> str:
    value = measures.get(split, {}).get(name)
    return "–" if value is None else f"{100 * value:.1f}"


def _number(measures: Mapping[str, Any], split: str, name: str, absent: str = "–") -> str:
    value = measures.get(split, {}).get(name)
    return absent if value is None else f"{value:.3f}"


def plot_kinds(kinds: Sequence[str], lines: Sequence[Line], path: Path) -> None:
    figure, panels = _figure(len(kinds))
    for panel, kind in zip(panels, kinds, strict=True):
        found = {line["method"]: line["measures"] for line in lines if line["part"] == "table" and line["kind"] == kind}
        for (name, label), colour, mark in zip(NAMES.items(), _COLOURS, _MARKS, strict=True):
            if name in found:
                x = 100 * found[name]["holdout"]["exact_match"]
                y = 100 * found[name]["paraphrase"].get(EFFICACY[kind], 0.0)
                size = 90 if mark == "*" else 45
                panel.scatter(x, y, s=size, c=colour, marker=mark, label=label, alpha=0.85, clip_on=False, zorder=3)
        panel.set(title=kind, xlabel="holdout kept, %", xlim=(-3, 103), ylim=(-3, 103))
    panels[0].set_ylabel("bad answers, unseen, %")
    handles, labels = [], []
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(panels), frameon=False, fontsize=8)
    _save(figure, path)


# -- the paper's headline --------------------------------------------------------------------------------


def contest_table(contest: Sequence[Line]) -> str:
    """Compute to the rate, compute to the rate with the rest kept, and compute of the whole recipe."""
    header = [
        "",
        f"to {100 * RATE:.0f} % harmful, FLOP",
        "CPU s",
        f"and {100 * KEPT:.0f} % of holdout kept, FLOP",
        "CPU s",
        "the whole recipe, FLOP",
        "CPU s",
        "at its end: harmful seen / unseen %, kept %",
    ]
    rows = []
    for line in contest:
        curve = line["curve"]
        last = curve[-1]
        cells = [contestant(line)]
        for point in (first(curve, kept=0.0), first(curve, kept=KEPT), last):
            cells += ["not reached", "–"] if point is None else [f"{point['flops']:.2e}", f"{point['cpu_seconds']:.0f}"]
        cells.append(f"{100 * last['seen']:.0f} / {100 * last['unseen']:.0f}, {100 * last['kept']:.0f}")
        rows.append(cells)
    return table(header, rows)


def contestant(line: Line) -> str:
    name = str(line["method"]).removeprefix("preference: ")
    cut = f" ({line['cut']})" if "cut" in line else ""
    return (f"supervised + DPO, {name}" if name in PAIRS else f"unlearning, {name}") + cut


def scale(contest: Sequence[Line]) -> list[str]:
    """From what a pair costs to how many pairs make the paper's 2 % true, where both sides reach the rate."""
    lines = {line["method"].removeprefix("preference: "): line["curve"] for line in contest if "cut" not in line}
    ended = [name for name in UNLEARN if name in lines and first(lines[name], kept=0.0) is not None]
    if PAIRS[0] not in lines or not ended:
        return []
    pair, whole = lines[PAIRS[0]][-1]["flops"] / _PAIRS_OF_BAD, lines[ended[0]][-1]["flops"]
    return [
        f"A pair costs {pair:.1e} FLOP in three epochs of both stages, a whole run of {ended[0]} as much as "
        f"{whole / pair:,.0f} pairs, whatever the data: it is 2 % of preference training from {50 * whole / pair:,.0f} "
        f"pairs on, and with the {_PUBLIC_PAIRS:,} of the paper's data it would be {_PUBLIC_PAIRS * pair / whole:,.0f} "
        f"times cheaper ({whole / (_PUBLIC_PAIRS * pair):.2%}). That is arithmetic from this table, not a run."
    ]


def first(curve: Sequence[Line], *, kept: float) -> Line | None:
    """The first look from which on, for two looks, few answers were harmful and the rest was kept."""
    good = [max(point["seen"], point["unseen"]) <= RATE and point["kept"] >= kept for point in curve]
    return next((p for p, now, then in zip(curve, good, [*good[1:], True], strict=True) if now and then), None)


def plot_contest(contest: Sequence[Line], path: Path) -> None:
    figure, (rate, kept) = _figure(2)
    for line, colour in zip(contest, itertools.cycle(_CURVES), strict=False):
        curve = [point for point in line["curve"] if point["flops"] > 0]
        x, label = [point["flops"] for point in curve], contestant(line)
        worst = [100 * max(point["seen"], point["unseen"]) for point in curve]
        rate.plot(x, worst, color=colour, marker=".", label=label)
        kept.plot(x, [100 * point["kept"] for point in curve], color=colour, marker=".")
    rate.set(xscale="log", xlabel="floating-point operations", ylabel="harmful answers, %", ylim=(-3, 103))
    kept.set(xscale="log", xlabel="floating-point operations", ylabel="holdout kept, %", ylim=(-3, 103))
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    _save(figure, path)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(3.2 * panels, 4.0), layout="constrained")
    made = figure.subplots(1, panels, squeeze=False)[0]
    for panel in made:
        panel.grid(color="#dddddd", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(made)


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
