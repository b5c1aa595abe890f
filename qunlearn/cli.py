"""The command line: parse, one call into the library, render. Nothing heavy is imported at the top."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qunlearn import __version__
from qunlearn.cli_ask import NO_ADAPTER, BaseModel, Device, Json, RunFolder, add_ask
from qunlearn.cli_data import add_data
from qunlearn.cli_recipe import add_recipe
from qunlearn.errors import EXIT_CODES, ConfigError, DoesNotFitError, ModelError, QunlearnError
from qunlearn.flags import add_flags, configured, option

_EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + "."
app = typer.Typer(
    name="qunlearn",
    help="Make a language model forget, on one small GPU or none.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in that folder.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn every failure into one message and a documented exit code: no traceback reaches a user."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except QunlearnError as error:
            _fail(error)
        except MemoryError:
            _fail(DoesNotFitError("out of memory", hint="a smaller model, --max-tokens or --batch-size"))
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            _say_interrupted()
            raise typer.Exit(130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            if os.environ.get("QUNLEARN_DEBUG"):
                raise
            first = (str(error).strip().splitlines() or [""])[0][:300]
            hint = "please report this; QUNLEARN_DEBUG=1 shows where it happened"
            _fail(QunlearnError(f"{type(error).__name__}: {first}", hint=hint))
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # a panic of the tokenizers library is no Exception
                raise
            hint = "is it the model's own? a pattern that looks back without end is given up after ten million steps"
            _fail(ModelError("the tokenizer's library gave up on a text", hint=hint))

    return run


def _fail(error: QunlearnError) -> None:
    from qunlearn.console import emit_json, say

    say(f"error: {error}", style="bold red")
    if error.hint:
        say(f"  hint: {error.hint}")
    if "--json" in sys.argv:
        fault = {"message": error.message, "where": error.where, "hint": error.hint}
        emit_json({"status": "error", "exit_code": error.exit_code, "error": fault})
    raise typer.Exit(error.exit_code)


def _say_interrupted() -> None:
    from qunlearn.console import say

    say("interrupted", style="bold red")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"qunlearn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# -- forget, plan ----------------------------------------------------------------------------------------


@guarded
def _forget(**options: Any) -> None:
    """Make a model forget a file of bad answers; leaves a LoRA adapter."""
    resume = options["resume"]
    run_forget(configured(options, resume=resume), dry_run=options["dry_run"], as_json=options["json"], resume=resume)


def run_forget(config: Any, *, dry_run: bool, as_json: bool, resume: bool = False) -> dict[str, Any]:
    """Plan, run and render. Ends the process with 130 after Ctrl-C."""
    from qunlearn.console import emit_json, say
    from qunlearn.plan import make_plan

    plan = make_plan(config, resume=resume)
    if resume:
        from qunlearn.unfinished import finished_record

        if (finished := finished_record(plan)) is not None:
            say(f"this run is finished: {plan.output}")
            if as_json:
                emit_json(finished)
            return finished
    from qunlearn.forget import forget, prepare

    ready = prepare(plan)
    if dry_run:
        import dataclasses

        say("dry run: nothing was loaded, trained or written", style="bold")
        if as_json:
            emit_json({"status": "dry run", "run": str(plan.output), "config": dataclasses.asdict(config)})
        return {}
    record = forget(plan, ready)
    if as_json:
        emit_json(record)
    if record["status"] == "interrupted":
        raise typer.Exit(130)
    return record


add_flags(
    _forget,
    dry_run=option(bool, False, "--dry-run", help="Resolve everything, print the plan, stop."),
    resume=option(
        bool, False, "--resume", help="Go on where the run of this --output was stopped; it knows its other flags."
    ),
)
app.command("forget")(_forget)


@guarded
def _plan(**options: Any) -> None:
    """Say what a run would need of memory, and whether it fits, before anything is downloaded or loaded."""
    from qunlearn.console import emit_json
    from qunlearn.memory import plan_run, show_plan

    config = configured(options)
    plan = plan_run(config)
    if options["json"]:
        emit_json({"status": "fits" if plan.fits else "does not fit", "model": config.model.name, **plan.as_dict()})
        if not plan.fits:
            raise typer.Exit(DoesNotFitError.exit_code)
        return
    show_plan(plan, config.model.name)
    plan.check()


add_flags(
    _plan,
    (
        *("model.name", "model.revision", "model.quant", "model.device", "model.embeddings", "model.vram"),
        *("data.bad", "data.prompt_field", "data.completion_field", "data.max_length"),
        *("lora.r", "lora.target_modules", "objective.mismatch_k"),
        *("train.batch_size", "train.normal_batch_size", "train.max_tokens", "train.optimizer"),
    ),
)
app.command("plan")(_plan)


# -- the others ------------------------------------------------------------------------------------------


RunFolders = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Run folders of `qunlearn forget`, added in this order.")
]
MergeBase = Annotated[
    str, typer.Option(help="original: the 16-bit weights. dequantized: the weights the adapter was trained on.")
]
BadFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="The bad file, where it is not where the run found it."),
]
Measure = Annotated[
    bool, typer.Option(help="Load what was written and measure it; takes the memory of the whole model.")
]


@app.command()
@guarded
def merge(
    runs: RunFolders,
    output: Output,
    base: MergeBase = "original",
    model: BaseModel = None,
    bad: BadFile = None,
    gate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FORMS", help="Measure it quantised too: nf4, fp4, int8, or none. Default: nf4."),
    ] = None,
    measure: Measure = True,
    device: Device = "auto",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Merge runs' adapters into their base: a model folder that needs nothing of ours, in little memory."""
    from qunlearn.carry import MergeOptions, check_merge, gates
    from qunlearn.console import emit_json
    from qunlearn.merge.ahead import read_ahead

    options = MergeOptions(base, model, bad, overwrite, measure, gates(gate, measure))
    request = check_merge(runs, output, options)
    read_ahead(request.model.folder)
    from qunlearn.merge.command import merge as merge_runs

    report = merge_runs(request, device)
    if json:
        emit_json(report.as_dict())
    report.raise_if_back()


@app.command()
@guarded
def export(
    run: RunFolder,
    output: Output,
    format: Annotated[
        str, typer.Option(metavar="peft|merged", help="peft: the adapter alone. merged: a whole model.")
    ] = "peft",
    quant: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="nf4|fp4|int8", help="merged: quantised, as bitsandbytes stores it."),
    ] = None,
    base: MergeBase = "original",
    model: BaseModel = None,
    bad: BadFile = None,
    measure: Measure = True,
    device: Device = "auto",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write what others load: the adapter alone, or a merged model, in 16 bits or quantised."""
    from qunlearn.carry import MergeOptions, check_export, check_merge, export_adapter, gates
    from qunlearn.console import emit_json

    check_export(format, quant)
    if format == "peft":
        files = export_adapter(run, output, overwrite=overwrite)
        if json:
            emit_json({"status": "done", "output": str(output), "files": files})
        return
    forms = () if quant else gates(None, measure)  # what is written quantised is measured as it is
    request = check_merge([run], output, MergeOptions(base, model, bad, overwrite, measure, forms))
    from qunlearn.merge.command import merge as merge_run
    from qunlearn.merge.export import export_quantized

    report = export_quantized(request, quant, device) if quant else merge_run(request, device)
    if json:
        emit_json(report.as_dict())
    report.raise_if_back()


File = Optional[str]  # noqa: UP045 - a path, or sandbox:KIND/SPLIT


@app.command("eval")
@guarded
def evaluate(
    target: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[RUN|MODEL]", help="A run or adapter folder, or a model."),
    ] = None,
    model: BaseModel = None,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter folder, on top of MODEL; none: the base alone.")
    ] = None,
    suite: Annotated[str, typer.Option(help="basic, llmu, tofu, muse or code: see docs/evaluation.md.")] = "basic",
    data: Annotated[
        File, typer.Option(help="A folder with forget.jsonl, paraphrase.jsonl, ..., or sandbox:KIND.")
    ] = None,
    forget: Annotated[File, typer.Option(help="What should be gone; default: the run's own bad file.")] = None,
    paraphrase: Annotated[File, typer.Option(help="The same asked in other words, never given to the run.")] = None,
    retain: Annotated[File, typer.Option(help="What was given as normal data.")] = None,
    holdout: Annotated[File, typer.Option(help="Neighbours that were never given.")] = None,
    general: Annotated[File, typer.Option(help="Anything else.")] = None,
    reference_model: Annotated[File, typer.Option(help="A model that never saw what should be gone.")] = None,
    harm_classifier: Annotated[File, typer.Option(help="A text classifier for harm (llmu); or sandbox.")] = None,
    reward_model: Annotated[File, typer.Option(help="A reward model for utility (llmu).")] = None,
    quant: Annotated[Optional[str], typer.Option(help="nf4|fp4|int8|none; default: as the run.")] = None,  # noqa: UP045
    template: Annotated[Optional[str], typer.Option(help="As for forget; default: as the run.")] = None,  # noqa: UP045
    device: Device = "auto",
    rows: Annotated[int, typer.Option(help="At most so many rows of each file.", min=1)] = 1000,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Folder for eval.json and its cache; default: the run."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is known.")] = False,
    json: Json = False,
) -> None:
    """Measure a model before and after: what should be gone, its neighbours, everything else."""
    from qunlearn.console import emit_json
    from qunlearn.evaluate.request import EvalRequest, Wish, base_alone, find_target, is_adapter_folder, split_files

    named = {"forget": forget, "paraphrase": paraphrase, "retain": retain, "holdout": holdout, "general": general}
    files = split_files(data, named)
    if adapter is not None and str(adapter) == NO_ADAPTER:
        run = None
        if target is not None and is_adapter_folder(Path(target)):
            model, quant, own = base_alone(Path(target), model, quant)
            files = files or own
        else:
            run, model = find_target(target, None, model)
    else:
        run, model = find_target(target, adapter, model)
    wish = Wish(suite, reference_model, harm_classifier, reward_model, output)
    request = EvalRequest.check(run, model, files, template=template, wish=wish)
    from qunlearn.evaluate.command import evaluate as evaluate_files

    result = evaluate_files(request, quant=quant, device=device, rows=rows, to_stdout=not json, fresh=fresh)
    if json:
        emit_json(result)


@app.command()
@guarded
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Folders that `qunlearn eval` has measured.")],
    suite: Annotated[Optional[str], typer.Option(help="Default: basic, or one they share.")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """Set evaluations side by side, and say which differences are more than noise."""
    from qunlearn.console import emit_json
    from qunlearn.evaluate.compare import compare as compare_runs

    result = compare_runs(runs, suite, to_stdout=not json)
    if json:
        emit_json(result)


@app.command()
@guarded
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or one that `eval -o` wrote.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The file to write; default: report.html in the run."),
    ] = None,
    include_samples: Annotated[
        bool, typer.Option("--include-samples", help="With the texts of the rows, those to forget among them.")
    ] = False,
    json: Json = False,
) -> None:
    """Write one HTML file that says what the run did: verdict, pictures, tables, limits."""
    from qunlearn.console import emit_json, say
    from qunlearn.report.page import write_report
    from qunlearn.run import REPORT

    path = output or run / REPORT
    size = write_report(run, path, include_samples=include_samples)
    say(f"{path}: {size / 2**10:.0f} KiB, for any browser, no network needed")
    if json:
        emit_json({"status": "done", "report": str(path), "bytes": size, "samples": include_samples})


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
    from qunlearn.sandbox.demo import demo as run_demo

    run_demo(kind, output)


@app.command()
@guarded
def models(json: Json = False) -> None:
    """List the short names that --model takes."""
    import dataclasses

    from qunlearn.console import Column, emit_json, table
    from qunlearn.model.names import SHORT_NAMES

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
    from qunlearn.console import Column, emit_json, table
    from qunlearn.objectives.document import described

    rows = described()
    if json:
        emit_json(rows)
        return
    columns = [Column(name, False) for name in ("objective", "forget side, minimised", "retain", "needs", "source")]
    cells = [[row["name"], row["forget"], row["retain"], row["needs"], row["source"]] for row in rows]
    table("--objective", columns, cells, to_stdout=True)


@app.command()
@guarded
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where the runs are.")] = Path("runs"),
    json: Json = False,
) -> None:
    """List what was forgotten, from which model, when, with what result: names and hashes, no texts."""
    from qunlearn.console import emit_json
    from qunlearn.registry import find_runs, show_runs

    rows = find_runs(folder)
    if json:
        emit_json(rows)
    else:
        show_runs(rows)


@app.command()
@guarded
def doctor(json: Json = False) -> None:
    """Check the installation, and print what a bug report needs and nothing private."""
    from qunlearn.console import Column, emit_json, table
    from qunlearn.doctor import BROKEN, as_dict, examine
    from qunlearn.errors import InstallationError

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
add_recipe(app, guarded)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
