"""The measurements of engine.py: contestants in turn, and one axis at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from _contestants import CONTESTANTS, Arena, checkpoint_published, new_policy
from _meter import Peak, release, seconds, used_bytes
from _models import Shape, random_base
from _report import say
from _rows import Drawer, Lengths, Rows


@dataclass(frozen=True)
class Course:
    """One cell: a shape, the rows of a step and the limits of its measurement."""

    shape: Shape
    k: int
    bad: int = 2  # the published script's batch
    normal: int = 2
    max_tokens: int = 2048
    seed: int = 0
    lengths: Lengths = field(default_factory=Lengths)
    rounds: tuple[int, int] = (3, 5)  # at least and at most
    seconds: float = 40.0  # no further round is begun after so long
    published_checkpointing: bool = False

    def steps(self, n: int) -> list[Rows]:
        drawer = Drawer(self.shape.vocabulary, self.seed, self.lengths)
        return [drawer.step(self.bad, self.normal, self.k) for _ in range(n)]


def race(course: Course, keys: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    """Memory of one step of each contestant, which warms up besides; then step times in turn (a, b, c, d, a, b ...)."""
    checkpoint_published(course.published_checkpointing)
    steps = course.steps(course.rounds[1])
    base = random_base(course.shape, device, seed=course.seed)
    with torch.no_grad():  # what the libraries set up once
        base.model(input_ids=torch.ones(1, 4, dtype=torch.long, device=device))
    release(device)
    loaded = used_bytes(device)
    arena = Arena.build(new_policy(base), course.max_tokens)
    # A library's workspace stays once it is there: the leanest contestants, which are the last ones, go first.
    peaks = {key: _peak_bytes(arena, key, course, steps[0], device) - loaded for key in reversed(keys)}
    for key in keys:
        arena.prepare(key, course.shape, steps, course.seed)
    rounds: list[dict[str, float]] = []
    began = time.monotonic()
    for i, rows in enumerate(steps):
        if i >= course.rounds[0] and time.monotonic() - began > course.seconds:
            break
        rounds.append({key: _timed(arena, key, rows, device) for key in keys})
    found = [_figures(course, key, [r[key] for r in rounds], steps) for key in keys]
    for figures in found:
        figures |= {"peak_bytes": max(0, peaks[figures["contestant"]]), "loaded_bytes": base.bytes}
    del arena, base
    release(device)
    return found


def _peak_bytes(arena: Arena, key: str, course: Course, rows: Rows, device: torch.device) -> int:
    """The highest memory of a step, with adapter, gradients and optimizer for every contestant alike, and with what
    this one alone holds: (a) a second model."""
    arena.prepare(key, course.shape, [rows], course.seed)
    release(device)
    with Peak(device) as peak:
        arena.step(key, rows)
    arena.drop()
    return peak.peak_bytes


def _timed(arena: Arena, key: str, rows: Rows, device: torch.device) -> float:
    return seconds(lambda: arena.step(key, rows), device)


def _figures(course: Course, key: str, times: list[float], steps: Sequence[Rows]) -> dict[str, Any]:
    contestant = CONTESTANTS[key]
    tokens = [contestant.tokens(rows) for rows in steps[: len(times)]]
    rates = [n / t for n, t in zip(tokens, times, strict=True)]
    return {
        "shape": course.shape.name,
        "k": course.k,
        "contestant": key,
        "title": contestant.title,
        "rounds": len(times),
        "times_s": times,
        "step_s": statistics.median(times),
        "tokens": statistics.median(tokens),
        "tokens_per_s": statistics.median(rates),
    }


def compare(courses: Sequence[Course], keys: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    """Time and memory of every contestant in every cell, and what each costs against the others."""
    cells = []
    for course in courses:
        say(f"{course.shape.name}, K = {course.k}: {', '.join(keys)} in turn")
        cells.append(race(course, keys, device))
    for cell in cells:
        by_key = {figures["contestant"]: figures for figures in cell}
        for figures in cell:
            figures["ratios"] = {f"step/{k}": _paired(figures, by_key[k], "times_s") for k in "ab" if k in by_key}
            if "c" in by_key:
                figures["ratios"]["tokens_per_s/c"] = figures["tokens_per_s"] / by_key["c"]["tokens_per_s"]
            if "a" in by_key and by_key["a"]["peak_bytes"]:
                figures["ratios"]["peak/a"] = figures["peak_bytes"] / by_key["a"]["peak_bytes"]
    return [figures for cell in cells for figures in cell]


def _paired(one: dict[str, Any], other: dict[str, Any], name: str) -> float:
    """The median over rounds of a round's ratio: what slows a whole round cancels out."""
    return statistics.median(x / y for x, y in zip(one[name], other[name], strict=True))


def scale(course: Course, axes: dict[str, Sequence[Any]], device: torch.device) -> list[dict[str, Any]]:
    """Time and memory of (d) along each axis, everything else as in `course`."""
    points = {(axis, i): _moved(course, axis, value) for axis, values in axes.items() for i, value in enumerate(values)}
    known: dict[Course, dict[str, Any]] = {}  # `course` itself lies on every axis
    for point in points.values():
        if point not in known:
            say(f"scaling: {point.shape.name}, {point.bad} rows, K = {point.k}, vocabulary {point.shape.vocabulary}")
            known[point] = race(point, ["d"], device)[0]
            known[point] |= {name: getattr(point.shape, name) for name in ("hidden", "layers", "vocabulary")}
    return [{"axis": axis, **known[point]} for (axis, _), point in points.items()]


def _moved(course: Course, axis: str, value: Any) -> Course:
    if axis == "rows":  # so many bad and as many normal rows: tokens per step
        return replace(course, bad=value, normal=value)
    if axis == "K":
        return replace(course, k=value)
    if axis == "vocabulary":
        return replace(course, shape=replace(course.shape, vocabulary=value))
    return replace(course, shape=value)
