"""Turn every failure into one message, one JSON document where asked, and a documented exit code."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from qunlearn.errors import (
    ConfigError,
    DoesNotFitError,
    ModelError,
    OutputError,
    ProcessLostError,
    QunlearnError,
    is_out_of_memory,
)

_INTERRUPTED = 130
# What a system, a disk or whoever set permissions is at fault for, wherever it is met.
_SURROUNDINGS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO),
    *(errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.ELOOP),
}
_arguments: list[str] = []  # of the call that is running


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn every failure into one message and a documented exit code: no traceback reaches a user."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from qunlearn.utils import console

        console.begin_call()
        try:
            command(*args, **{name: _at_home(value) for name, value in kwargs.items()})
        except QunlearnError as error:
            raise typer.Exit(tell(error)) from None
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            console.say("interrupted", style="bold red")
            _emit_fault("interrupted", _INTERRUPTED, {"message": "interrupted", "where": None, "hint": None})
            raise typer.Exit(_INTERRUPTED) from None
        except Exception as error:
            if os.environ.get("QUNLEARN_DEBUG"):
                raise
            if isinstance(error, OSError) and error.errno in _SURROUNDINGS:
                raise typer.Exit(tell(_surroundings(error))) from None
            if is_out_of_memory(error):
                hint = "a smaller model, --max-tokens or --batch-size"
                raise typer.Exit(tell(DoesNotFitError("out of memory", hint=hint))) from None
            first = (str(error).strip().splitlines() or [""])[0][:300]
            hint = "please report this; QUNLEARN_DEBUG=1 shows where it happened"
            raise typer.Exit(tell(QunlearnError(f"{type(error).__name__}: {first}", hint=hint))) from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # a panic of the tokenizers library is no Exception
                raise
            hint = "is it the model's own? a pattern that looks back without end is given up after ten million steps"
            raise typer.Exit(tell(ModelError("the tokenizer's library gave up on a text", hint=hint))) from None

    return run


def _at_home(value: Any) -> Any:
    """Return a path, or each of a list, with the home folder for its `~`: shells leave that of `--output=~/x` alone."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_at_home, value))
    if not isinstance(value, Path):
        return value
    try:
        return value.expanduser()
    except RuntimeError:  # of a user whom nobody knows
        return value


def _surroundings(error: OSError) -> OutputError:
    """Return what kept a file from being read or written."""
    where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
    return OutputError(f"cannot be read or written: {error.strerror}", where=where, hint="check it and its folder")


def tell(error: QunlearnError) -> int:
    """Say what went wrong, as JSON too where that was asked for; returns the exit code."""
    from qunlearn.utils.console import say, speak

    name = "" if isinstance(error, ProcessLostError) and error.told else speak()
    say(f"{name}error: {error}", style="bold red")
    if error.hint:
        say(f"  hint: {error.hint}")
    if not name:  # of several processes one writes the document
        _emit_fault("error", error.exit_code, {"message": error.message, "where": error.where, "hint": error.hint})
    return error.exit_code


def _emit_fault(status: str, exit_code: int, fault: dict[str, Any]) -> None:
    """The one document on stdout; where a command has printed its report before it failed, that is it."""
    from qunlearn.utils import console

    if "--json" in (_arguments or sys.argv) and not console.documents:
        console.emit_json({"status": status, "exit_code": exit_code, "error": fault})


class App(TyperGroup):
    """The whole command line: a call that is not understood has its JSON document as well."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """Run a call. Raises SystemExit."""
        from qunlearn.utils import console

        _arguments[:] = sys.argv[1:] if args is None else args
        console.begin_call()
        self._refused: list[str] = []
        try:
            return super().main(args, *more, **options)
        except QunlearnError as error:  # stdout gave up outside a command, at --help
            sys.exit(tell(error))
        except SystemExit as stop:
            if self._refused and stop.code == ConfigError.exit_code:
                fault = {"message": self._refused[-1], "where": "command line", "hint": "see --help"}
                _emit_fault("error", ConfigError.exit_code, fault)
            raise
        finally:
            _arguments.clear()

    def make_context(self, *args: Any, **options: Any) -> Any:
        return self._remembering(super().make_context, *args, **options)

    def invoke(self, ctx: Any) -> Any:
        return self._remembering(super().invoke, ctx)

    def _remembering(self, act: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return what the parser says is shown by the library, which then exits: what it was is needed once more."""
        try:
            return act(*args, **options)
        except Exception as error:
            if hasattr(error, "format_message"):
                self._refused.append(str(error.format_message()))
            raise


def run_app(app: Callable[[], Any]) -> None:
    """The console script: streams that do not fail, the call, and what is still in them. Raises SystemExit."""
    from qunlearn.utils.streams import prepare

    prepare()
    code: Any = 0
    try:
        app()
    except SystemExit as stop:
        code = stop.code
    try:
        sys.stdout.flush()
    except QunlearnError as error:
        code = code or tell(error)
    sys.exit(code)
