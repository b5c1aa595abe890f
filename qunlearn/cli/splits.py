"""The flags that name a split's file: one name and one help text in every command that measures."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

File = Optional[str]  # noqa: UP045 - a path, or sandbox:KIND/SPLIT; typer reads it at run time, on Python 3.10 too
DataFolder = Annotated[File, typer.Option(help="A folder with forget.jsonl, paraphrase.jsonl, ..., or sandbox:KIND.")]
OwnForget = Annotated[
    File, typer.Option("--forget", "--bad", help="What should be gone; default: the run's own bad file.")
]
Paraphrase = Annotated[File, typer.Option(help="The same asked in other words, never given to the run.")]
Holdout = Annotated[File, typer.Option(help="Neighbours that were never given.")]
General = Annotated[File, typer.Option(help="Anything else.")]
