"""The flags of every command that measures: a split's file, and how a run's model is loaded; one help text each."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

File = Optional[str]  # noqa: UP045 - a path, sandbox:KIND/SPLIT or a name; typer reads it at run time, on Python 3.10 too
DataFolder = Annotated[File, typer.Option(help="A folder with forget.jsonl, paraphrase.jsonl, ..., or sandbox:KIND.")]
OwnForget = Annotated[
    File, typer.Option("--forget", "--bad", help="What should be gone; default: the run's own bad file.")
]
Paraphrase = Annotated[File, typer.Option(help="The same asked in other words, never given to the run.")]
Holdout = Annotated[File, typer.Option(help="Neighbours that were never given.")]
General = Annotated[File, typer.Option(help="Anything else.")]
QuantOfRun = Annotated[File, typer.Option("--quant", help="nf4|fp4|int8|none; default: as the run.")]
TemplateOfRun = Annotated[File, typer.Option("--template", help="As for forget; default: as the run.")]
