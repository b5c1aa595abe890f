"""The command line: parse, one call into the library, render. Nothing heavy is imported at the top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qunlearn import __version__
from qunlearn.cli.ask import Json, add_ask
from qunlearn.cli.audit import add_audit
from qunlearn.cli.batch import add_batch
from qunlearn.cli.data import add_data
from qunlearn.cli.evaluate import add_measure
from qunlearn.cli.failures import App, guarded, run_app
from qunlearn.cli.flags import add_flags, configured, option
from qunlearn.cli.guard import add_guard
from qunlearn.cli.merge import add_carry
from qunlearn.cli.recipe import add_recipe
from qunlearn.errors import EXIT_CODES, ConfigError, DoesNotFitError, GateError, TrainingError
from qunlearn.utils.launch import process_count, process_number
from qunlearn.utils.signals import as_interrupts
from qunlearn.utils.threads import spin_briefly

_EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + "."
app = typer.Typer(
    name="qunlearn",
    cls=App,
    help="Make a language model forget, on one small GPU or none.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"qunlearn {__version__}")
        raise typer.Exit


_IN_SEVERAL = ("forget", "eval", "batch", "audit", "merge")  # what several processes can do together


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    command = context.invoked_subcommand or ""
    if process_count() > 1 and command not in _IN_SEVERAL:
        if process_number() > 0:  # one tells
            raise typer.Exit(ConfigError.exit_code)
        hint = f"type `qunlearn {command}` without torchrun or accelerate launch: it uses one GPU"
        raise ConfigError(
            f"{command} runs in one process; {process_count()} were launched", where="launcher", hint=hint
        )


# -- forget, plan ----------------------------------------------------------------------------------------


@guarded
def _forget(**options: Any) -> None:
    """Make a model forget a file of bad answers; leaves a LoRA adapter."""
    from qunlearn.api import run_forget, together
    from qunlearn.utils.console import emit_json

    resume, dry_run = options["resume"], options["dry_run"]
    config = configured(options, resume=resume)
    with together():  # until all is said: a launcher ends the others when one ends with another code than 0
        record = run_forget(config, resume=resume, dry_run=dry_run)
        if options["json"]:
            emit_json(record, warned=False)  # as it is in the run folder
    if record["status"] == "interrupted":
        raise typer.Exit(130)
    if record["status"] == "failed":  # found finished by --resume
        raise typer.Exit(TrainingError.exit_code)
    if record.get("not_reached"):
        raise typer.Exit(GateError.exit_code)


add_flags(
    _forget,
    dry_run=option(bool, False, "--dry-run", help="Resolve everything, print the plan, stop."),
    resume=option(
        bool, False, "--resume", help="Resume the interrupted run in --output; its other flags are remembered."
    ),
)
_EXAMPLE = "Example: qunlearn forget --model llama-7b --bad bad.jsonl --vram 8GiB"
app.command("forget", epilog=_EXAMPLE)(_forget)


@guarded
def _plan(**options: Any) -> None:
    """Say what a run would need of memory, and whether it fits, before anything is downloaded or loaded."""
    from qunlearn.memory.plan import MemoryPlan
    from qunlearn.memory.request import plan_run, plan_run_on_gpus
    from qunlearn.memory.show import show_plan
    from qunlearn.memory.show_gpus import show_gpus_plan
    from qunlearn.utils.console import emit_json

    gpus, config = options.pop("gpus"), configured(options)
    plan = plan_run(config) if gpus is None else plan_run_on_gpus(config, gpus)
    if options["json"]:
        emit_json({"status": "fits" if plan.fits else "does not fit", "model": config.model.name, **plan.as_dict()})
        if not plan.fits:
            raise typer.Exit(DoesNotFitError.exit_code)
        return
    if isinstance(plan, MemoryPlan):
        show_plan(plan, config.model.name)
    else:
        show_gpus_plan(plan, config.model.name)
    plan.check()


add_flags(
    _plan,
    (
        *("model.name", "model.revision", "model.quant", "model.device", "model.embeddings", "model.vram"),
        *("data.bad", "data.prompt_field", "data.completion_field", "data.max_length"),
        *("lora.r", "lora.target_modules", "objective.mismatch_k"),
        *("train.batch_size", "train.normal_batch_size", "train.max_tokens", "train.compile", "train.optimizer"),
    ),
    gpus=option(
        Optional[int],  # noqa: UP045
        None,
        "--gpus",
        help="Plan for so many GPUs of one machine, each of --vram: what each needs with the model laid over them, and "
        "sharded.",
        metavar="INTEGER",
    ),
)
app.command("plan")(_plan)


# -- the others ------------------------------------------------------------------------------------------

add_batch(app, guarded)
add_carry(app, guarded)
add_measure(app, guarded)
add_audit(app, guarded)


@app.command()
@guarded
def demo(
    kind: Annotated[str, typer.Argument(help="hallucination, copyright, harm or code.")] = "hallucination",
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Keep the run here; default: a temporary folder."),
    ] = None,
) -> None:
    """Watch the embedded sandbox model forget, in under three minutes on two CPU cores."""
    from qunlearn.sandbox import KINDS

    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}", where="demo", hint=f"one of {', '.join(KINDS)}")
    from qunlearn.recipe.demo import demo as run_demo

    run_demo(kind, output)


@app.command()
@guarded
def models(json: Json = False) -> None:
    """List the short names that --model takes."""
    import dataclasses

    from qunlearn.hub.short_names import SHORT_NAMES
    from qunlearn.utils.console import Column, emit_json, table

    if json:
        emit_json([dataclasses.asdict(model) for model in SHORT_NAMES.values()])
        return
    columns = [Column("name", False), Column("hub id", False), Column("parameters"), Column("", False)]
    rows = [
        [
            m.name,
            m.hub_id or "(embedded)",
            f"{m.params_b:g} B",
            ", ".join(filter(None, ["gated" if m.gated else "", m.note])),
        ]
        for m in SHORT_NAMES.values()
    ]
    table("Short names for --model; a folder or any hub id works as well", columns, rows, to_stdout=True)


@app.command()
@guarded
def objectives(json: Json = False) -> None:
    """List the unlearning objectives: what each minimises, needs and costs, and where it comes from."""
    from qunlearn.objectives.document import described
    from qunlearn.utils.console import Column, emit_json, table

    rows = described()
    if json:
        emit_json(rows)
        return
    titles = ("objective", "forget side, minimised", "retain", "needs", "cost", "source")
    columns = [Column(title, title == "cost") for title in titles]
    cells = [[str(row[key]) for key in ("name", "forget", "retain", "needs", "cost", "source")] for row in rows]
    table("--objective", columns, cells, to_stdout=True)


@app.command()
@guarded
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where the runs are.")] = Path("runs"),
    json: Json = False,
) -> None:
    """List what was forgotten, from which model, when, with what result: names and hashes, no texts."""
    from qunlearn.runs.list import find_runs, show_runs
    from qunlearn.utils.console import emit_json

    rows = find_runs(folder)
    if json:
        emit_json(rows)
    else:
        show_runs(rows)


@app.command()
@guarded
def doctor(json: Json = False) -> None:
    """Check the installation, and print what a bug report needs and nothing private."""
    from qunlearn.doctor import BROKEN, as_dict, examine
    from qunlearn.errors import InstallationError
    from qunlearn.utils.console import Column, emit_json, table

    findings = examine()
    if json:
        emit_json(as_dict(findings))
    else:
        rows = [[f.state, f.name, f.text + (f" (hint: {f.hint})" if f.hint else "")] for f in findings]
        table("", [Column("", False), Column("", False), Column("", False)], rows, to_stdout=True)
    if any(f.state == BROKEN for f in findings):
        raise typer.Exit(InstallationError.exit_code)


add_ask(app, guarded)
add_data(app, guarded)
add_guard(app, guarded)
add_recipe(app, guarded)


def main() -> None:
    """The console script."""
    as_interrupts()
    spin_briefly()
    run_app(app)


if __name__ == "__main__":
    main()
