"""Work through a file of forget requests against one base: `qunlearn batch`.

A line is one request, a JSON object of settings by flag (`"bad": "a.jsonl"`) or key (`"stop.target": 0.1`), over those
that all requests share. Each becomes a run of its own, with its folder, verdict and exit code. The same command
continues a queue that was cut off: runs that are finished are left as they are. With --overwrite all begin anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qunlearn.api import KEYS_BY_FLAG, run_forget
from qunlearn.config.resolve import TRUST, resolve
from qunlearn.config.settings import Config, ModelConfig
from qunlearn.data.local_path import local_path
from qunlearn.errors import ConfigError, DataError, GateError, QunlearnError
from qunlearn.parallel.ranks import current
from qunlearn.utils.console import announce
from qunlearn.utils.json_files import LARGE_BYTES, parse, read_text
from qunlearn.utils.output import default_folder
from qunlearn.utils.signals import stop_signals

if TYPE_CHECKING:
    from qunlearn.training.bases import Bases

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
    """Read and check all requests before any is begun. Raises DataError and ConfigError with file and line.

    Of several processes the main one reads the file, which may be a pipe.
    """
    text = current().from_main(lambda: _text(file))
    return current().first(lambda: _requests(text, file, shared))


def _text(file: str) -> str:
    try:
        return read_text(local_path(file), LARGE_BYTES, pipes=True)
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"cannot be read: {what}", where=file, hint="a JSON object a line") from error


def _requests(text: str, file: str, shared: Sequence[Overlay]) -> list[Request]:
    out: list[Request] = []
    for number, line in enumerate(text.splitlines(), 1):
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

    A request that fails does not keep the others from being run. `tell` hears of each when it is done. Of several
    processes each takes the next request when it is free, and makes the whole run; all return the same.
    """
    from qunlearn.parallel.queue import queue_of
    from qunlearn.training.bases import Bases

    ranks, model = current(), requests[0].config.model  # the queue's: no request has its own
    several = ranks.count > 1
    if several:
        ranks.first(lambda: _check_several(model))
        ranks.first_here(lambda: _fetch(model))
    bases, out = Bases(), dict[int, Done]()
    with queue_of(len(requests)) as queue:

        def hear() -> None:
            for number, told in queue.news():
                out[number] = Done(**told)
                tell(out[number])

        for number in queue:
            announce(f"request {number + 1} of {len(requests)}: {requests[number].name}", style="bold")
            with queue.working():
                done = _run(requests[number], folder, bases, several=several)
            queue.hand_in(number, asdict(done))
            if several:
                announce(f"{done.name}: {done.status}, exit code {done.exit_code}")
            hear()
            if done.exit_code == INTERRUPTED:
                queue.stop()
                break
        with stop_signals() if several else nullcontext(lambda: False) as asked:

            def meanwhile() -> None:
                if asked():
                    queue.stop()
                hear()

            queue.wait(meanwhile)
    return [out[number] for number in sorted(out)]


def _check_several(model: ModelConfig) -> None:
    """Refuse what a process cannot do alone. Raises ConfigError."""
    if model.device_map != "none":
        hint = "leave it out, or start one process without torchrun or accelerate launch"
        message = "under a launcher each request is one process's, on one GPU"
        raise ConfigError(message, where=f"--device-map {model.device_map}", hint=hint)


def _fetch(model: ModelConfig) -> None:
    """Fetch the model, where it is on the hub; where that fails each request says it."""
    from qunlearn.hub.checked import check_model
    from qunlearn.hub.download import resolve_model

    with suppress(QunlearnError):
        check_model(resolve_model(model.name, model.revision), model.trust_remote_code)


def _run(request: Request, folder: Path, bases: Bases, *, several: bool) -> Done:
    """Make one run. Raises KeyboardInterrupt where it is the only process: others would wait for it."""
    place = str(folder / request.name)
    config = replace(request.config, output=replace(request.config.output, folder=place))
    try:
        record = run_forget(config, resume=not config.output.overwrite, bases=bases)
        return Done(request.name, place, record["status"], _code(record))
    except QunlearnError as error:
        announce(f"! {request.name}: {error}" + (f" (hint: {error.hint})" if error.hint else ""), style="yellow")
        return Done(request.name, place, "error", error.exit_code, str(error))
    except KeyboardInterrupt:
        if not several:
            raise
        return Done(request.name, place, "interrupted", INTERRUPTED)


def _code(record: Mapping[str, Any]) -> int:
    if record["status"] == "interrupted":
        return INTERRUPTED
    return GateError.exit_code if record.get("not_reached") else 0


def exit_code(done: Sequence[Done]) -> int:
    """Return the queue's own exit code: that of an interruption, else the first that is not 0."""
    codes = [one.exit_code for one in done]
    return INTERRUPTED if INTERRUPTED in codes else next((code for code in codes if code), 0)
