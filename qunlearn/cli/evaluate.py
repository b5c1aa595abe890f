"""The commands `qunlearn eval`, `compare` and `report`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qunlearn import api
from qunlearn.cli.ask import BaseModel, Device, GuardFolder, Json, Trust
from qunlearn.cli.flags import take_parameters
from qunlearn.cli.splits import DataFolder, File, General, Holdout, OwnForget, Paraphrase, QuantOfRun, TemplateOfRun

Target = Annotated[File, typer.Argument(metavar="[RUN|MODEL]", help="A run or adapter folder, or a model.")]
OnTop = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--adapter", help="An adapter folder, on top of MODEL; none: the base alone."),
]
Suite = Annotated[str, typer.Option(help="basic, llmu, tofu, muse or code: see docs/evaluation.md.")]
Retain = Annotated[File, typer.Option("--retain", "--normal", help="What was given as normal data.")]
RetrainedModel = Annotated[
    File, typer.Option("--retrained-model", "--reference-model", help="A model that never saw what should be gone.")
]
HarmClassifier = Annotated[File, typer.Option(help="A text classifier for harm (llmu); or sandbox.")]
RewardModel = Annotated[File, typer.Option(help="A reward model for utility (llmu).")]
Rows = Annotated[int, typer.Option(help="At most so many rows of each file.", min=1)]
Output = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--output", "-o", help="Folder for eval.json and its cache; default: the run."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what is known.")]


def evaluate(*, json: bool, **options: Any) -> None:
    """Measure a model before and after: what should be gone, its neighbours, everything else."""
    from qunlearn.utils.console import emit_json

    result = api.evaluate(**options, show=not json)
    if json:
        emit_json(result)


_SPLITS = {"forget": OwnForget, "paraphrase": Paraphrase, "retain": Retain, "holdout": Holdout, "general": General}
_JUDGES = {"retrained_model": RetrainedModel, "harm_classifier": HarmClassifier, "reward_model": RewardModel}
take_parameters(
    evaluate, api.evaluate,
    {
        "run": Target, "model": BaseModel, "adapter": OnTop, "guard": GuardFolder, "suite": Suite, "data": DataFolder,
        **_SPLITS, **_JUDGES, "quant": QuantOfRun, "template": TemplateOfRun, "device": Device,
        "trust_remote_code": Trust, "rows": Rows, "output": Output, "fresh": Fresh,
    },
)  # fmt: skip


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Folders of runs, evaluations or audits.")],
    suite: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of evaluations; default: basic, or one they share. With it audits are left out."),
    ] = None,
    json: Json = False,
) -> None:
    """Set evaluations and audits side by side, and say which differences are more than noise."""
    from qunlearn.utils.console import emit_json

    result = api.compare(runs, suite=suite, show=not json)
    if json:
        emit_json(result)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or one that `eval -o` wrote.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The file to write; default: report.html in the run."),
    ] = None,
    include_samples: Annotated[
        bool, typer.Option("--include-samples", help="With the texts of the rows, those to forget among them.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is no report of ours.")] = False,
    json: Json = False,
) -> None:
    """Write one HTML file that says what the run did: verdict, pictures, tables, limits."""
    from qunlearn.report.page import write_report
    from qunlearn.utils.console import emit_json, say
    from qunlearn.utils.file_names import REPORT

    path = output or run / REPORT
    size = write_report(run, path, include_samples=include_samples, overwrite=overwrite)
    say(f"{path}: {size / 2**10:.0f} KiB, for any browser, no network needed")
    if json:
        emit_json({"status": "done", "report": str(path), "bytes": size, "samples": include_samples})


def add_measure(app: typer.Typer, guarded: Callable[..., Any]) -> None:
    """All three commands, each wrapped like the others."""
    app.command("eval")(guarded(evaluate))
    for command in (compare, report):
        app.command()(guarded(command))
