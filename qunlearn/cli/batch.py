"""The command `qunlearn batch`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from qunlearn.cli.flags import add_flags, overlays_of

Guard = Callable[[Callable[..., None]], Callable[..., None]]


def add_batch(app: typer.Typer, guarded: Guard) -> None:
    """Put `batch` into the command line."""
    command = guarded(_batch)
    file = Annotated[str, typer.Argument(metavar="REQUESTS", help="A JSON object a line: flags with underscores.")]
    add_flags(command, requests=(file, inspect.Parameter.empty))
    app.command("batch", epilog="Example: qunlearn batch requests.jsonl --model llama-7b -o runs/queue")(command)


def _batch(**options: Any) -> None:
    """Run a file of forget requests against one base, each in a folder of its own; continues where it was cut off.

    With --overwrite every request begins anew, finished or not. Flags hold for all requests; a request's own
    settings come before them. The exit code is the first request's that is not 0. Under a launcher the requests are
    divided: each process takes the next one, and makes the whole run.
    """
    from dataclasses import asdict

    from qunlearn.api import together
    from qunlearn.batch import exit_code, folder_of, read_requests, run_batch
    from qunlearn.config.resolve import resolve
    from qunlearn.utils.console import Column, emit_json, table

    as_json, file = options["json"], options.pop("requests")
    shared = overlays_of(options)
    with together() as ranks:
        folder = ranks.first(lambda: folder_of(file, resolve(*shared)))
        done = run_batch(read_requests(file, shared), folder)
        code = exit_code(done)
        if as_json:
            runs = [*map(asdict, done)]
            emit_json({"status": "done" if not code else "incomplete", "folder": str(folder), "runs": runs})
        else:
            columns = [Column("request", False), Column("verdict", False), Column("exit code"), Column("folder", False)]
            rows = [[one.name, one.message or one.status, str(one.exit_code), one.folder] for one in done]
            table("", columns, rows, to_stdout=True)
    if code:
        raise typer.Exit(code)
