"""Work through a file of forget requests against one base: `qunlearn batch`.

A line is one request, a JSON object of settings by flag (`"bad": "a.jsonl"`) or key (`"stop.target": 0.1`), over those
that all requests share. Each becomes a run of its own, with its folder, verdict and exit code. The same command
continues a queue that was cut off: runs that are finished are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.api import KEYS_BY_FLAG, run_forget
from qunlearn.config.resolve import TRUST, resolve
from qunlearn.config.settings import Config
from qunlearn.data.local_path import local_path
from qunlearn.errors import ConfigError, DataError, GateError, QunlearnError
from qunlearn.utils.console import say, warn
from qunlearn.utils.json_files import LARGE_BYTES, parse, read_text
from qunlearn.utils.output import default_folder

Overlay = tuple[str, Mapping[str, Any]]
INTERRUPTED = 130
_NAME = "name"  # of a request: its run's folder
_SHARED = ("model.", "output.")  # settings that are the whole queue's


@dataclass(frozen=True)
class Request:
    """One line of the file: its run's name, and all settings of the run."""

    name: str
    config: Config


@dataclass(frozen=True)
class Done:
    """What came of a request. `status` is the record's, or "error" with a `message`."""

    name: str
    folder: str
    status: str
    exit_code: int
    message: str = ""


def read_requests(file: str, shared: Sequence[Overlay]) -> list[Request]:
    """Read and check all requests before any is begun. Raises DataError and ConfigError with file and line."""
    path = local_path(file)
    try:
        lines = read_text(path, LARGE_BYTES, pipes=True).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"cannot be read: {what}", where=file, hint="a JSON object a line") from error
    out: list[Request] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        request = _request(line, where, shared)
        if any(other.name == request.name for other in out):
            hint = f'give each its own "{_NAME}"'
            raise ConfigError(f"another request is called {request.name!r} too", where=where, hint=hint)
        out.append(request)
    if not out:
        raise DataError("no requests in the file", where=file, hint='a line is a request: {"bad": "bad.jsonl"}')
    return out


def _request(line: str, where: str, shared: Sequence[Overlay]) -> Request:
    try:
        value = parse(line)
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}", where=where, hint="a JSON object a line") from None
    if not isinstance(value, dict):
        raise DataError("not a JSON object", where=where, hint='such as {"bad": "bad.jsonl"}')
    name = value.pop(_NAME, None)
    asked: dict[str, Any] = {KEYS_BY_FLAG.get(str(key).replace("-", "_"), str(key)): one for key, one in value.items()}
    if fixed := [key for key in asked if key == TRUST or key.startswith(_SHARED)]:
        hint = "all requests have one model and one folder: say it on the command line"
        raise ConfigError(f"{fixed[0]} cannot be a request's own", where=where, hint=hint)
    config = resolve(*shared, (where, asked))
    if not config.data.bad:
        raise ConfigError("no file of bad answers was named", where=where, hint='"bad": "bad.jsonl"')
    if name is None:
        name = Path(config.data.bad).name.split(".")[0]
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]{0,63}", name):
        hint = "letters, digits, dots, hyphens and underscores, at most 64"
        raise ConfigError("a request's name is its folder's", where=where, hint=hint)
    return Request(name, config)


def folder_of(file: str, config: Config) -> Path:
    """Return where the runs of a queue are: --output, or runs/MODEL-FILE."""
    return Path(config.output.folder) if config.output.folder else default_folder(config.model.name, file)


def run_batch(requests: Sequence[Request], folder: Path, tell: Callable[[Done], None] = lambda _: None) -> list[Done]:
    """Run the requests in turn, the base loaded once; returns what came of each, up to a Ctrl-C.

    A request that fails does not keep the others from being run. `tell` hears of each when it is done.
    """
    from dataclasses import replace

    from qunlearn.training.bases import Bases

    bases, out = Bases(), list[Done]()
    for number, request in enumerate(requests, 1):
        place = folder / request.name
        say(f"request {number} of {len(requests)}: {request.name}", style="bold")
        config = replace(request.config, output=replace(request.config.output, folder=str(place)))
        try:
            record = run_forget(config, resume=True, bases=bases)
            done = Done(request.name, str(place), record["status"], _code(record))
        except QunlearnError as error:
            warn(f"{request.name}: {error}" + (f" (hint: {error.hint})" if error.hint else ""))
            done = Done(request.name, str(place), "error", error.exit_code, str(error))
        out.append(done)
        tell(done)
        if done.exit_code == INTERRUPTED:
            break
    return out


def _code(record: Mapping[str, Any]) -> int:
    if record["status"] == "interrupted":
        return INTERRUPTED
    return GateError.exit_code if record.get("not_reached") else 0


def exit_code(done: Sequence[Done]) -> int:
    """Return the queue's own exit code: that of an interruption, else the first that is not 0."""
    codes = [one.exit_code for one in done]
    return INTERRUPTED if INTERRUPTED in codes else next((code for code in codes if code), 0)
