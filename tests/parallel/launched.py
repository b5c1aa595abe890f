"""Start the processes of a run as a launcher does, and wait for them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DRIVER = Path(__file__).with_name("group_driver.py")


@dataclass
class Call:
    """A command line, and the fault that happens in some of its processes."""

    args: Sequence[object]
    fault: str = ""
    ranks: Sequence[int] = ()
    ports: list[int] = field(default_factory=list)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def launch(count: int, folder: Path, calls: Sequence[Call], timeout: float = 500) -> list[list[dict[str, Any]]]:
    """Run the calls one after another in `count` processes; returns what each process said of each call.

    A process that was killed has said less; its return code is in `launch.codes`.
    """
    file = folder / "calls.json"
    ports = free_ports(len(calls))
    file.write_text(
        json.dumps(
            [
                {"port": port, "args": [str(a) for a in call.args], "fault": call.fault, "ranks": list(call.ranks)}
                for port, call in zip(ports, calls, strict=True)
            ]
        )
    )
    places = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(count):
        (folder / f"calls.json.{rank}").unlink(missing_ok=True)
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        processes.append(
            subprocess.Popen(
                [sys.executable, DRIVER, file],
                env={**os.environ, **places, **mine},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    launch.codes = [process.returncode for process in processes]  # type: ignore[attr-defined]
    found = []
    for rank, text in enumerate(said):
        told = folder / f"calls.json.{rank}"
        assert told.is_file() or launch.codes[rank] < 0, text  # type: ignore[attr-defined]
        found.append(json.loads(told.read_text()) if told.is_file() else [])
    return found
