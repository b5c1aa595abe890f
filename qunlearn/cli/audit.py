"""The command `qunlearn audit`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qunlearn.cli.ask import BaseModel, Device, DrawSeed, GuardFolder, Json, Trust
from qunlearn.cli.splits import File, General, Holdout, OwnForget, Paraphrase, QuantOfRun, TemplateOfRun
from qunlearn.errors import GateError

Target = Annotated[File, typer.Argument(metavar="[RUN|MODEL]", help="A run or adapter folder, or a model.")]
Folder = Optional[Path]  # noqa: UP045
OnTop = Annotated[Folder, typer.Option("--adapter", help="An adapter folder, on top of MODEL.")]
Merged = Annotated[File, typer.Option(help="What `merge` made of RUN, or a GGUF file: audited beside it.")]
Control = Annotated[
    File, typer.Option(help="A model that never saw what should be gone. Without: placebo facts, a weaker claim.")
]
Original = Annotated[File, typer.Option(help="The model before unlearning, where MODEL is not an adapter on it.")]
Retain = Annotated[File, typer.Option("--retain", "--normal", help="What was to stay; default: the run's normal rows.")]
Budget = Annotated[str, typer.Option(help="quick, standard or deep: which attacks, and how much of each.")]
Only = Annotated[
    File, typer.Option(metavar="NAMES", help="Some alone, with commas: A to F, formats,weights …, prefix-search.")
]
Tolerance = Annotated[
    float, typer.Option(help="Share of the facts that may leak beyond the control; above: exit code 5.")
]
Vram = Annotated[File, typer.Option(help="GPU memory that may be used, such as 6GiB.")]
Output = Annotated[Folder, typer.Option("--output", "-o", help="The audit folder; default: audit in the run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier audit in that folder.")]
Beside = Annotated[
    Folder, typer.Option(metavar="RUN2", help="Another run that was audited, or its audit: set beside this one.")
]


def audit(
    target: Target = None,
    model: BaseModel = None,
    adapter: OnTop = None,
    guard: GuardFolder = None,
    merged: Merged = None,
    control: Control = None,
    original: Original = None,
    forget: OwnForget = None,
    paraphrase: Paraphrase = None,
    retain: Retain = None,
    holdout: Holdout = None,
    general: General = None,
    budget: Budget = "standard",
    only: Only = None,
    tolerance: Tolerance = 0.0,
    quant: QuantOfRun = None,
    template: TemplateOfRun = None,
    device: Device = "auto",
    vram: Vram = None,
    seed: DrawSeed = 0,
    trust: Trust = False,
    output: Output = None,
    overwrite: Overwrite = False,
    compare: Beside = None,
    json: Json = False,
) -> None:
    """Attack an unlearned model, each attack with a control, and say what is suppressed, where, and what comes back."""
    from qunlearn import api
    from qunlearn.utils.console import emit_json

    files = {"forget": forget, "paraphrase": paraphrase, "retain": retain, "holdout": holdout, "general": general}
    models = {"model": model, "merged": merged, "control": control, "original": original}
    with api.together():  # until all is said: a launcher ends the others when one ends with another code than 0
        result = api.audit(
            target,
            **models,
            adapter=adapter,
            guard=guard,
            **files,
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
