"""The command `qunlearn audit`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qunlearn import api
from qunlearn.cli.ask import BaseModel, Device, GuardFolder, Trust
from qunlearn.cli.flags import take_parameters
from qunlearn.cli.splits import File, General, Holdout, OwnForget, Paraphrase, QuantOfRun, TemplateOfRun
from qunlearn.config.fields import MOST_SEED
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
Seed = Annotated[int, typer.Option(help="Of which rows are asked, and of the placebo facts.", min=0, max=MOST_SEED)]
Vram = Annotated[File, typer.Option(help="GPU memory that may be used, such as 6GiB.")]
Output = Annotated[Folder, typer.Option("--output", "-o", help="The audit folder; default: audit in the run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier audit in that folder.")]
Beside = Annotated[
    Folder, typer.Option(metavar="RUN2", help="Another run that was audited, or its audit: set beside this one.")
]


def audit(*, json: bool, **options: Any) -> None:
    """Attack an unlearned model, each attack with a control, and say what is suppressed, where, and what comes back."""
    from qunlearn.utils.console import emit_json

    with api.together():  # until all is said: a launcher ends the others when one ends with another code than 0
        result = api.audit(**options, show=not json)
        if json:
            emit_json(result)
    if result["status"] == "leaks":
        raise typer.Exit(GateError.exit_code)


_SPLITS = {"forget": OwnForget, "paraphrase": Paraphrase, "retain": Retain, "holdout": Holdout, "general": General}
take_parameters(
    audit, api.audit,
    {
        "run": Target, "model": BaseModel, "adapter": OnTop, "guard": GuardFolder, "merged": Merged, "control": Control,
        "original": Original, **_SPLITS, "budget": Budget, "only": Only, "tolerance": Tolerance, "quant": QuantOfRun,
        "template": TemplateOfRun, "device": Device, "vram": Vram, "seed": Seed, "trust_remote_code": Trust,
        "output": Output, "overwrite": Overwrite, "compare": Beside,
    },
)  # fmt: skip


def add_audit(app: typer.Typer, guarded: Callable[..., Any]) -> None:
    """Hang the command into the application."""
    app.command()(guarded(audit))
