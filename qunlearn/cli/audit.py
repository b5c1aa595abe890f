"""The command `qunlearn audit`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qunlearn.cli.ask import BaseModel, Device, DrawSeed, GuardFolder, Json, Trust
from qunlearn.cli.splits import File, General, Holdout, OwnForget, Paraphrase
from qunlearn.errors import GateError


def audit(
    target: Annotated[File, typer.Argument(metavar="[RUN|MODEL]", help="A run or adapter folder, or a model.")] = None,
    model: BaseModel = None,
    adapter: Annotated[Optional[Path], typer.Option(help="An adapter folder, on top of MODEL.")] = None,  # noqa: UP045
    guard: GuardFolder = None,
    merged: Annotated[File, typer.Option(help="What `merge` made of RUN, or a GGUF file: audited beside it.")] = None,
    control: Annotated[
        File, typer.Option(help="A model that never saw what should be gone. Without: placebo facts, a weaker claim.")
    ] = None,
    original: Annotated[
        File, typer.Option(help="The model before unlearning, where MODEL is not an adapter on it.")
    ] = None,
    forget: OwnForget = None,
    paraphrase: Paraphrase = None,
    retain: Annotated[
        File, typer.Option("--retain", "--normal", help="What was to stay; default: the run's normal rows.")
    ] = None,
    holdout: Holdout = None,
    general: General = None,
    budget: Annotated[
        str, typer.Option(help="quick, standard or deep: which attacks, and how much of each.")
    ] = "standard",
    only: Annotated[
        File,
        typer.Option(metavar="NAMES", help="Some alone, with commas: A to F, formats,weights …, prefix-search."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Share of the facts that may leak beyond the control; above: exit code 5.")
    ] = 0.0,
    quant: Annotated[File, typer.Option(help="nf4|fp4|int8|none; default: as the run.")] = None,
    template: Annotated[File, typer.Option(help="As for forget; default: as the run.")] = None,
    device: Device = "auto",
    vram: Annotated[File, typer.Option(help="GPU memory that may be used, such as 6GiB.")] = None,
    seed: DrawSeed = 0,
    trust: Trust = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The audit folder; default: audit in the run."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier audit in that folder.")] = False,
    compare: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="RUN2", help="Another run that was audited, or its audit: set beside this one."),
    ] = None,
    json: Json = False,
) -> None:
    """Attack an unlearned model, each attack with a control, and say what is suppressed, where, and what comes back."""
    from qunlearn import api
    from qunlearn.utils.console import emit_json

    result = api.audit(
        target,
        model=model,
        adapter=adapter,
        guard=guard,
        merged=merged,
        control=control,
        original=original,
        forget=forget,
        paraphrase=paraphrase,
        retain=retain,
        holdout=holdout,
        general=general,
        budget=budget,
        only=only,
        tolerance=tolerance,
        quant=quant,
        template=template,
        device=device,
        vram=vram,
        seed=seed,
        trust_remote_code=trust,
        output=output,
        overwrite=overwrite,
        compare=compare,
        show=not json,
    )
    if json:
        emit_json(result)
    if result["status"] == "leaks":
        raise typer.Exit(GateError.exit_code)


def add_audit(app: typer.Typer, guarded: Callable[..., Any]) -> None:
    """Hang the command into the application."""
    app.command()(guarded(audit))
