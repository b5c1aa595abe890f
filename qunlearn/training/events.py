"""Write and print each step: metrics.jsonl, warnings, and the progress line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.model.gpus import peak_on_any
from qunlearn.objectives.table import INSTEAD, OBJECTIVES, RETAIN, TAUGHT
from qunlearn.training.watch import MEASURED, Watch, shown
from qunlearn.utils.console import Meter, warn

_TERM_NAMES = {INSTEAD.name, TAUGHT.name, *(t.name for row in OBJECTIVES.values() for t in row.forget)} | {
    t.name for kind in RETAIN.values() for t in kind
}


class Metrics:
    """metrics.jsonl, an event a line. A resumed run goes on where its checkpoint was made."""

    def __init__(self, path: Path) -> None:
        self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")

    def write(self, event: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(event).encode() + b"\n")
        self.file.truncate()  # what an earlier attempt left behind this
        self.file.flush()

    def state(self) -> dict[str, Any]:
        return {"bytes": self.file.tell()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.file.seek(int(state["bytes"]))


def on_step(event: Mapping[str, Any], metrics: Metrics, meter: Meter, watch: Watch) -> None:
    if "compile" in event:
        metrics.write(event)
        warn(f"--compile auto: no CUDA graphs from here on, every pass is launched piece by piece: {event['compile']}")
        return
    short = "max_tokens" in event
    event = watch.see(event)
    metrics.write(event)
    if short:
        warn(f"out of memory in step {event['step']}: the same step again with --max-tokens {event['max_tokens']}")
        return
    for sentence in _warnings(event, watch.config):
        warn(sentence)
    if event["step"] == 0:
        return
    if event["step"] > meter.total:
        meter.extend(watch.config.train.most_steps)
    said = [f"{name} {event[name]:.3f}" for name in event if name in _TERM_NAMES]
    if "forget" in event:
        said += [f"| p(bad) {event['forget']:.3f}", f"drift {event['drift']:.4f}"]
    if MEASURED in event:
        said.append(f"| exact: {shown(event[MEASURED])}")
    said.append(f"| {event['tokens_per_s']:.0f} tok/s, {peak_on_any(watch.policy.base.devices) / 2**20:.0f} MiB")
    meter.at(event["step"], " ".join(said))


def _warnings(event: Mapping[str, Any], config: Config) -> list[str]:
    """Return what an event gives cause to say at once."""
    o, remedy = config.objective, "the forget side's weight is raised"
    if o.name != "logodds":
        remedy += "; --objective logodds has a gradient where a model is certain"
    said = []
    if event.get("faint"):
        said.append(f"the first gradient is near the optimizer's rounding: {o.name} can hardly move; {remedy}")
    if event.get("still"):
        moved = f"step {event['step']}: p(bad) is {event['forget']:.4f}, and has hardly moved"
        said.append(f"{moved}: {o.name} has little gradient here; {remedy}")
    if "again" in event:
        back = f"in other words bad answers come back ({event['again']})"
        said.append(f"step {event['step']}: {back}: they are pushed there as well from here on")
    if "back_to" in event:
        back = f"back to the adapter of step {event['back_to']}, with half the rate and twice the retain weight"
        said.append(f"step {event['step']}: drift {event['drift']:.3g} is over {config.stop.max_drift:g}: {back}")
    return said
