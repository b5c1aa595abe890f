"""The commands that talk to a run: `qunlearn ask` and `qunlearn chat`."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qunlearn.config.fields import MOST_SEED
from qunlearn.errors import ConfigError

NO_ADAPTER = "none"  # as in evaluation/request.py, which is not imported for --help
Json = Annotated[bool, typer.Option("--json", help="One machine-readable result on stdout.")]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder of `qunlearn forget`; with --guard also a model.")
]
BaseModel = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time, on Python 3.10 too
    typer.Option("--model", help="The base, where it is not where the run found it."),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
AskedAdapter = Annotated[Optional[str], typer.Option(metavar="none", help="none: ask the base alone.")]  # noqa: UP045
GuardFolder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--guard", metavar="GUARD", help="A folder of `qunlearn guard fit`: guard the model, adapter or none."
    ),
]
System = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="TEXT", help="A system prompt. Left out, the one that all bad rows have, if they have one."),
]
NewTokens = Annotated[int, typer.Option(help="At most so many tokens of answer.", min=1, max=1 << 20)]
Temperature = Annotated[float, typer.Option(help="0: the most probable answer.", min=0.0, max=100.0)]
DrawSeed = Annotated[int, typer.Option("--seed", help="Of what is drawn at a temperature.", min=0, max=MOST_SEED)]


def ask(
    run: RunFolder,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: BaseModel = None,
    adapter: AskedAdapter = None,
    guard: GuardFolder = None,
    system: System = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    seed: DrawSeed = 0,
    device: Device = "auto",
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Ask the base and the adapter on it the same, side by side."""
    if not question.strip():
        raise ConfigError("the question is empty", where="ask", hint='qunlearn ask RUN "..."')
    draw, on = (max_new_tokens, temperature, seed), (device, trust, system, guard)
    opened = _asked(run, model, adapter, draw, on, as_json=json)
    from qunlearn.ask import ask as ask_both
    from qunlearn.utils.console import emit_json

    result = ask_both(opened, question)
    if json:
        emit_json(result)


def chat(
    run: RunFolder,
    model: BaseModel = None,
    adapter: AskedAdapter = None,
    guard: GuardFolder = None,
    system: System = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    seed: DrawSeed = 0,
    device: Device = "auto",
    trust: Trust = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout, for each question.")] = False,
) -> None:
    """Ask the base and the adapter on it line after line, typed or piped, side by side."""
    draw, on = (max_new_tokens, temperature, seed), (device, trust, system, guard)
    opened = _asked(run, model, adapter, draw, on, as_json=json)
    from qunlearn.ask import chat as chat_with

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a pipe may hold anything
    chat_with(opened, sys.stdin)


def _asked(
    run: Path,
    model: str | None,
    adapter: str | None,
    draw: tuple[int, float, int],
    on: tuple[str, bool, str | None, Path | None],
    *,
    as_json: bool,
) -> Any:
    if adapter not in (None, NO_ADAPTER):
        raise ConfigError(f"unknown adapter {adapter[:40]!r}", where="--adapter", hint="none, or leave it out")
    from qunlearn.ask import Asking, open_asked
    from qunlearn.model.generate import Sampling

    sampling, (device, trust, system, guard) = Sampling(draw[0], draw[1], seed=draw[2]), on
    return open_asked(run, model, Asking(sampling, device, not as_json, adapter is not None, trust, system, guard))


def add_ask(app: typer.Typer, guarded: Callable[..., Any]) -> None:
    """Hang the commands into the application."""
    app.command()(guarded(ask))
    app.command()(guarded(chat))
