"""The measurements of engine.py: contestants in turn, memory in fresh processes, one axis at a time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from _contestants import CONTESTANTS, Arena, checkpoint_published, new_policy
from _meter import Peak, each_in_fresh_process, in_fresh_process, release, return_frees_at_once, seconds, used_bytes
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
    """Step times of the contestants in turn (a, b, c, d, a, b, c, d ...) on the same rows, a small round to warm up."""
    checkpoint_published(course.published_checkpointing)
    steps = replace(course, bad=1, normal=1, k=1).steps(1) + course.steps(course.rounds[1])
    base = random_base(course.shape, device, seed=course.seed)
    arena = Arena.build(new_policy(base), course.max_tokens)
    for key in keys:
        arena.prepare(key, course.shape, steps, course.seed)
    rounds: list[dict[str, float]] = []
    began = time.monotonic()
    for i, rows in enumerate(steps):
        if i > course.rounds[0] and time.monotonic() - began > course.seconds:
            break
        rounds.append({key: _timed(arena, key, rows, device) for key in keys})
    del arena, base
    release(device)
    return [_figures(course, key, [r[key] for r in rounds[1:]], steps[1:]) for key in keys]


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


def peak_bytes(course: Course, key: str, device_name: str) -> dict[str, int]:
    """Run in a fresh process: the highest memory of one step over the loaded base, in bytes.

    Adapter, gradients and optimizer count, for every contestant alike; so does (a)'s second model.
    """
    device = torch.device(device_name)
    gc.freeze()  # the libraries' objects are not worth another look
    return_frees_at_once()
    checkpoint_published(course.published_checkpointing)
    base = random_base(course.shape, device, seed=course.seed)
    with torch.no_grad():  # what the libraries set up once
        base.model(input_ids=torch.ones(1, 4, dtype=torch.long, device=device))
    release(device)
    loaded = used_bytes(device)
    steps = course.steps(1)
    arena = Arena.build(new_policy(base), course.max_tokens)
    arena.prepare(key, course.shape, steps, course.seed)
    release(device)
    with Peak(device) as peak:
        arena.step(key, steps[0])
    return {"peak_bytes": max(0, peak.peak_bytes - loaded), "loaded_bytes": base.bytes}


def time_alone(course: Course, key: str, device_name: str) -> dict[str, Any]:
    """Run in a fresh process: the step times of one contestant on its own."""
    return race(course, [key], torch.device(device_name))[0]


def compare(courses: Sequence[Course], keys: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    """Time and memory of every contestant in every cell, and what each costs against the others."""
    cells = []
    for course in courses:
        say(f"{course.shape.name}, K = {course.k}: {', '.join(keys)} in turn")
        cells.append(race(course, keys, device))
    say("memory of each")
    _add_memory([(course, figures) for course, cell in zip(courses, cells, strict=True) for figures in cell], device)
    for cell in cells:
        by_key = {figures["contestant"]: figures for figures in cell}
        for figures in cell:
            figures["ratios"] = {f"step/{k}": _paired(figures, by_key[k], "times_s") for k in "ab" if k in by_key}
            if "c" in by_key:
                figures["ratios"]["tokens_per_s/c"] = figures["tokens_per_s"] / by_key["c"]["tokens_per_s"]
            if "a" in by_key and by_key["a"]["peak_bytes"]:
                figures["ratios"]["peak/a"] = figures["peak_bytes"] / by_key["a"]["peak_bytes"]
    return [figures for cell in cells for figures in cell]


def _add_memory(measured: Sequence[tuple[Course, dict[str, Any]]], device: torch.device) -> None:
    calls = [(course, figures["contestant"], str(device)) for course, figures in measured]
    for (_, figures), peak in zip(measured, each_in_fresh_process(peak_bytes, calls, device=device), strict=True):
        figures |= peak


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
            known[point] = in_fresh_process(time_alone, point, "d", str(device), device=device)
            known[point] |= {name: getattr(point.shape, name) for name in ("hidden", "layers", "vocabulary")}
    _add_memory(list(known.items()), device)
    return [{"axis": axis, **known[point]} for (axis, _), point in points.items()]


def _moved(course: Course, axis: str, value: Any) -> Course:
    if axis == "rows":  # so many bad and as many normal rows: tokens per step
        return replace(course, bad=value, normal=value)
    if axis == "K":
        return replace(course, k=value)
    if axis == "vocabulary":
        return replace(course, shape=replace(course.shape, vocabulary=value))
    return replace(course, shape=value)
