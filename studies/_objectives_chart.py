"""Forgetting against retention, a panel for each kind: one SVG, the same bytes from the same figures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qunlearn.sandbox import KINDS

_INK, _MUTED, _GRID, _PLAIN = "#1c2733", "#66727f", "#e4e8ec", "#7b8794"
_ACCENT = {"simnpo": "#0b6bcb", "llmu": "#c2410c"}
_NEAR = 6  # pixels: points that lie closer in both directions have one label
_LEAST_X, _LEAST_Y = 50.0, 60.0  # what lies lower stands at the edge, as a triangle with its figure


@dataclass(frozen=True)
class Point:
    """A method on a kind: % of paraphrased bad answers that are gone, % of never-given neighbours that are kept.

    `own`: with the settings of its row.
    """

    kind: str
    name: str
    own: bool
    forgotten: float
    kept: float

    @property
    def x(self) -> float:
        return max(self.forgotten, _LEAST_X)

    @property
    def y(self) -> float:
        return max(self.kept, _LEAST_Y)

    @property
    def label(self) -> str:
        """The name, with what is below the edge."""
        below = [f"{v:.0f}" for v, least in ((self.forgotten, _LEAST_X), (self.kept, _LEAST_Y)) if v < least]
        return f"{self.name} ({', '.join(below)})" if below else self.name

    @property
    def marker(self) -> str:
        return "v" if self.kept < _LEAST_Y else "<" if self.forgotten < _LEAST_X else "o"


def draw(points: Sequence[Point]) -> str:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 9,
        "font.family": "sans-serif",
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _MUTED,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _GRID,
        "svg.fonttype": "none",
        "svg.hashsalt": "objectives",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.2, 8.4), facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 2).flat
        figure.subplots_adjust(left=0.07, right=0.98, bottom=0.07, top=0.95, wspace=0.18, hspace=0.28)
        for axes, kind in zip(panels, KINDS, strict=True):
            _panel(axes, kind, [p for p in points if p.kind == kind])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _panel(axes: Any, kind: str, points: Sequence[Point]) -> None:
    axes.set_title(kind, fontsize=11, loc="left")
    axes.set_xlabel("paraphrased bad answers gone, %")
    axes.set_ylabel("neighbours never given kept, % of base")
    own = {p.name: p for p in points if p.own}
    for p in points:
        colour = _ACCENT.get(p.name, _PLAIN)
        if p.own:
            axes.plot(p.x, p.y, p.marker, color=colour, markersize=7, zorder=4)
        else:
            axes.plot(p.x, p.y, p.marker, markerfacecolor="white", color=colour, markersize=4.5, zorder=3)
            if p.name in own:
                line = ([own[p.name].x, p.x], [own[p.name].y, p.y])
                axes.plot(*line, "-", color=colour, linewidth=0.7, alpha=0.6, zorder=2)
    low = min([90.0, *(p.y for p in points)])
    left = min([80.0, *(p.x for p in points)])
    axes.set_xlim(left - 0.04 * (100 - left), 100 + 0.04 * (100 - left))
    axes.set_ylim(low - 0.06 * (100 - low), 100 + 0.1 * (100 - low))
    _label(axes, points)


def _label(axes: Any, points: Sequence[Point]) -> None:
    """Names beside their points, on no other point and on no other name; those of one place stand together."""
    places: list[list[Point]] = []
    for p in points:
        near = next((c for c in places if p.own == c[0].own and _close(axes, c[0], p)), None)
        if near is None:
            places.append([p])
        else:
            near.append(p)
    renderer = axes.figure.canvas.get_renderer()
    taken = [_box(*axes.transData.transform((p.x, p.y)), 6) for p in points]
    inside = axes.get_window_extent(renderer)
    for place in sorted(places, key=lambda c: (-len(c), not c[0].own)):
        names = list(dict.fromkeys(p.label for p in place))
        first = place[0]
        if not first.own:
            continue  # the line to its method says whose it is
        lines = [", ".join(names[i : i + 3]) for i in range(0, len(names), 3)]
        colour = _ACCENT.get(first.name, _INK) if len(names) == 1 else _INK
        best: tuple[float, Any, tuple[float, float]] | None = None
        for dx, dy, ha, va in _candidates():
            text = axes.annotate(
                "\n".join(lines), (first.x, first.y), (dx, dy), textcoords="offset points", ha=ha, va=va,
                color=colour, fontsize=8.5, linespacing=1.15, zorder=5,
            )  # fmt: skip
            box = text.get_window_extent(renderer).padded(1.5)
            hits = sum(_overlap(box, other) for other in taken) + 1e6 * _outside(box, inside)
            cost = hits * 100 + abs(dx) + abs(dy)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, (dx, dy))
            else:
                text.remove()
            if hits == 0 and abs(dx) + abs(dy) < 20:
                break
        if best is None:
            continue
        taken.append(best[1].get_window_extent(renderer).padded(1.5))
        if max(map(abs, best[2])) > 14:
            best[1].arrow_patch = None
            axes.annotate(
                "", (first.x, first.y), best[2], textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": _MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
            )  # fmt: skip


def _close(axes: Any, a: Point, b: Point) -> bool:
    (x, y), (u, v) = (axes.transData.transform((p.x, p.y)) for p in (a, b))
    return max(abs(x - u), abs(y - v)) <= _NEAR


def _candidates() -> Iterator[tuple[float, float, str, str]]:
    """Offsets in points with the alignment that keeps the text off its point, near ones first."""
    for r in (8, 14, 24, 38, 56, 80, 110):
        for x, y in ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)):
            ha = {-1: "right", 0: "center", 1: "left"}[x]
            va = {-1: "top", 0: "center", 1: "bottom"}[y]
            yield r * x * (0.7 if y else 1), r * y * (0.7 if x else 1), ha, va


def _box(x: float, y: float, r: float) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - r, y - r, x + r, y + r)


def _overlap(a: Any, b: Any) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


def _outside(box: Any, inside: Any) -> bool:
    return bool(box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1 + 8)
