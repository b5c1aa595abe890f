"""One of several processes, as a launcher starts them: runs command lines one after another, and says what came of it.

    RANK=… WORLD_SIZE=… LOCAL_RANK=… MASTER_ADDR=… python group_driver.py FILE

FILE is a JSON list of {"port", "args", "fault", "ranks"}: the fault, one of `FAULTS` or the number of an event at which
the process is killed, happens in the processes of these ranks. What came of it goes to FILE.RANK: a JSON list of
{"code", "stdout", "stderr"}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

from typer.testing import CliRunner  # noqa: E402 - one thread from the first

from qunlearn.attack import cells  # noqa: E402
from qunlearn.cli.app import app  # noqa: E402
from qunlearn.data.records import DataError  # noqa: E402
from qunlearn.model import device  # noqa: E402
from qunlearn.parallel import group  # noqa: E402
from qunlearn.training import checkpoint, events, forget, gradients, retain_rows, stopping  # noqa: E402
from qunlearn.utils import console  # noqa: E402

device._cpu_has_bf16 = lambda: False  # rounding must not hide a wrong sum


def at_step(step: int, act: Callable[[], Any]) -> None:
    """Act before the passes of a step, counted over attempts."""
    plain, calls = gradients.MicroBatcher._passes, [0]

    def passes(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            act()
        return plain(self, *args)

    gradients.MicroBatcher._passes = passes  # type: ignore[method-assign]


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("injected")


def not_finite() -> None:
    """Every loss of the next passes is NaN in this process."""
    plain = gradients._supervised

    def supervised(batch: Any, h: Any, *args: Any) -> Any:
        gradients._supervised = plain
        return plain(batch, h * float("nan"), *args)

    gradients._supervised = supervised


def at_rows(act: Callable[[], Any]) -> None:
    """Act where the retain rows are put together: no step is done yet."""
    plain = retain_rows.split_held_back

    def split(*args: Any) -> Any:
        act()
        return plain(*args)

    retain_rows.split_held_back = split


def at_event(number: int) -> None:
    """SIGKILL before or after the so manieth call of anything that steps, looks, writes or puts on the disk."""
    seen = [0]

    def event() -> None:
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            event()
            value = plain(*args, **kwargs)
            event()
            return value

        setattr(owner, name, wrapper)

    for owner, name in (
        *((gradients.MicroBatcher, "_passes"), (torch.optim.AdamW, "step"), (stopping, "look")),
        *((checkpoint, "_write_tensors"), (events.Metrics, "write"), (forget, "score_sets"), (os, "fsync")),
        *((Path, "rename"), (group.Group, "add")),
    ):
        counted(owner, name)


def at_cell(number: int, act: Callable[[], Any]) -> None:
    """Act where so manieth cell of an audit is kept, whoever has found it."""
    plain, calls = cells.Cells.keep, [0]

    def keep(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            act()
        return plain(self, *args)

    cells.Cells.keep = keep  # type: ignore[method-assign]


def refuse() -> None:
    raise DataError("this one cannot go on", where="test")


FAULTS: Mapping[str, Callable[[], None]] = {
    "out of memory at step 2": lambda: at_step(2, out_of_memory),
    "always out of memory": lambda: setattr(gradients.MicroBatcher, "_passes", lambda *_: out_of_memory()),
    "not finite at step 2": lambda: at_step(2, not_finite),
    "SIGTERM at step 3": lambda: at_step(3, lambda: signal.raise_signal(signal.SIGTERM)),
    "SIGKILL at step 4": lambda: at_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "SIGKILL at cell 3": lambda: at_cell(3, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "SIGINT at cell 3": lambda: at_cell(3, lambda: signal.raise_signal(signal.SIGINT)),
    "an error at cell 3": lambda: at_cell(3, refuse),
    "an error before training": lambda: at_rows(refuse),
}


def main() -> None:
    told = []
    for run in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(run["port"])
        console._Voice.silent = False
        kept = gradients.MicroBatcher._passes, gradients._supervised, retain_rows.split_held_back
        kept_cell = cells.Cells.keep
        fault, ranks = run.get("fault"), run.get("ranks", [])
        if fault and int(os.environ["RANK"]) in ranks:
            at_event(int(fault)) if fault.isdecimal() else FAULTS[fault]()
        result = CliRunner().invoke(app, run["args"])
        gradients.MicroBatcher._passes, gradients._supervised = kept[0], kept[1]  # type: ignore[method-assign]
        retain_rows.split_held_back = kept[2]
        cells.Cells.keep = kept_cell  # type: ignore[method-assign]
        if torch.distributed.is_initialized():  # of a run that failed
            torch.distributed.destroy_process_group()
        odd = result.exception is not None and not isinstance(result.exception, SystemExit)
        error = repr(result.exception) if odd else ""
        told.append({"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr + error})
        Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
