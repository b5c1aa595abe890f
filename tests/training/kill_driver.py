"""Runs a command of ours once without a kill, counting what happens; then again for each kill, in a child that dies
there, and once more for what is left. One process pays for the imports; it forks before torch starts threads.

    python kill_driver.py forget|import FOLDER KILLS SEED ARGUMENT…

`{out}` in an argument stands for the run's own place. Prints JSON: how many events there were, and of each kill what
came of it and what the second attempt said.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from qunlearn.cli.app import app
from qunlearn.utils import staging

_DISK = [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (shutil, "rmtree")]


def of_import() -> list[tuple[Any, str]]:
    from qunlearn.data import importers

    return [*_DISK, (importers, "_opened"), (importers, "_as_row"), (importers, "check_leaks"), (staging, "held")]


def of_forget() -> list[tuple[Any, str]]:
    import torch

    torch.set_num_threads(1)  # torch must not start threads before this process forks

    from qunlearn.model import reference
    from qunlearn.training import checkpoint, forget, loop, record, resume, stopping

    return [
        *_DISK,
        (resume.shutil, "copyfile"),
        (checkpoint, "write_json"),
        (resume, "write_json"),
        (record, "write_json"),
        (record, "save_adapter"),
        (checkpoint, "_write_tensors"),
        (forget.Metrics, "write"),
        (loop.MicroBatcher, "backward"),
        (torch.optim.AdamW, "step"),
        (stopping, "look"),
        (forget, "score_sets"),
        (reference.Cached, "_open"),
        (reference, "_checksum"),
    ]


EVENTS: dict[str, Callable[[], list[tuple[Any, str]]]] = {"forget": of_forget, "import": of_import}


class Count:
    """What has happened so far, and after how much of it this process dies."""

    events: int = 0
    limit: int | None = None


def counted(owner: Any, name: str) -> None:
    """Every call counts as two events: before it and after it."""
    plain = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _event()
        out = plain(*args, **kwargs)
        _event()
        return out

    setattr(owner, name, wrapper)


def _event() -> None:
    Count.events += 1
    if Count.limit is not None and Count.events > Count.limit:
        os.kill(os.getpid(), signal.SIGKILL)


def run(args: list[str], folder: Path, place: Path, limit: int | None = None) -> int:
    """The status of a child that runs the command, and dies after `limit` events."""
    child = os.fork()
    if not child:
        Count.events, Count.limit = 0, limit
        os.environ["QUNLEARN_CACHE"] = str(place.with_name(place.name + "-cache"))
        result = CliRunner().invoke(app, [arg.replace("{out}", str(place)) for arg in args])
        (folder / "events").write_text(str(Count.events))
        (folder / "said").write_text(result.stderr)
        os._exit(result.exit_code if result.exception is None or isinstance(result.exception, SystemExit) else 99)
    return os.waitpid(child, 0)[1]


def main() -> None:
    kind, folder, kills, seed, args = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]
    again = [*args, "--resume" if kind == "forget" else "--overwrite"]
    for owner, name in EVENTS[kind]():
        counted(owner, name)
    if run(args, folder, folder / "whole") != 0:
        sys.exit((folder / "said").read_text())
    events, states = int((folder / "events").read_text()), []
    for point in sorted(random.Random(seed).sample(range(events), kills)):
        place = folder / f"killed-{point}"
        status = run(args, folder, place, point)
        found = sorted(path.name for path in folder.glob(f"{place.name}*"))
        state = {"point": point, "signal": os.WTERMSIG(status), "found": found}
        state["again"] = run(again, folder, place)
        state["said"] = (folder / "said").read_text()
        states.append(state)
    tries = 0
    if kind == "forget" and kills > 10:  # killed again and again, a third further each time
        while run(again, folder, folder / "chain", max(60, events // 3)):
            tries += 1
            if tries == 50:
                sys.exit("a chain of kills gets nowhere")
    print(json.dumps({"events": events, "states": states, "tries": tries}))  # noqa: T201 - its data


if __name__ == "__main__":
    main()
