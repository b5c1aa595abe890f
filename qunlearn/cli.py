"""The command line: parse, one call into the library, render. Nothing heavy is imported at the top."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qunlearn import __version__
from qunlearn.errors import EXIT_CODES, ConfigError, DoesNotFitError, QunlearnError

_EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + "."
app = typer.Typer(
    name="qunlearn",
    help="Make a language model forget, on one small GPU or none.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="One machine-readable result on stdout.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in that folder.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of `qunlearn forget`.")]
BaseModel = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time, on Python 3.10 too
    typer.Option("--model", help="The base, where it is not where the run found it."),
]


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
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            if os.environ.get("QUNLEARN_DEBUG"):
                raise
            first = (str(error).strip().splitlines() or [""])[0][:300]
            hint = "please report this; QUNLEARN_DEBUG=1 shows where it happened"
            _fail(QunlearnError(f"{type(error).__name__}: {first}", hint=hint))

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


# -- commands whose flags are settings -------------------------------------------------------------------


def _configured(options: dict[str, Any]) -> Any:
    """The configuration from a command's options; takes those that lay it down out of them."""
    from qunlearn.config import SETTINGS, parse_set, read_config_file, resolve

    recipe: Path | None = options.pop("config")
    assignments = options.pop("set")
    flags = {s.key: options[_name(s.key)] for s in SETTINGS.values() if options.get(_name(s.key)) is not None}
    overlays: list[tuple[str, Mapping[str, Any]]] = []
    if recipe is not None:
        overlays.append((str(recipe), read_config_file(recipe)))
    overlays += [("--set", parse_set(assignments or [])), ("command line", flags)]
    return resolve(*overlays)


def _name(key: str) -> str:
    return key.replace(".", "_")


def _option(kind: Any, default: Any, *names: str, **info: Any) -> Any:
    return Annotated[kind, typer.Option(*names, **info)], default


def _settings_command(
    name: str, body: Callable[..., None], keys: Sequence[str] | None = None, **own: tuple[Any, Any]
) -> None:
    """Add a command with a flag for each setting that has one (or for `keys`), and options of its own."""
    from qunlearn.config import SETTINGS

    made: dict[str, tuple[Any, Any]] = {
        "config": _option(Optional[Path], None, "--config", "-c", help="A recipe or a run's config.yaml; flags win."),  # noqa: UP045
        "set": _option(Optional[list[str]], None, "--set", help="Any other setting: section.key=value."),  # noqa: UP045
        **own,
        "json": _option(bool, False, "--json", help="One machine-readable result on stdout."),
    }
    for setting in SETTINGS.values():
        if setting.flag is None or (keys is not None and setting.key not in keys):
            continue
        kind, info = (Optional[str], {"metavar": _metavar(setting)})  # noqa: UP045
        if setting.base_type is bool:
            kind, info = Optional[bool], {}  # noqa: UP045
        names = [setting.flag, *(["-o"] if setting.flag == "--output" else [])]
        help_text = setting.help + _default_text(setting)
        made[_name(setting.key)] = _option(kind, None, *names, help=help_text, show_default=False, **info)
    keyword = inspect.Parameter.KEYWORD_ONLY
    # Typer reads names and defaults from the signature and from __annotations__; both are made, not written.
    parameters = [inspect.Parameter(name, keyword, annotation=a, default=d) for name, (a, d) in made.items()]
    body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    body.__annotations__ = {name: annotation for name, (annotation, _) in made.items()}
    app.command(name)(body)


def _metavar(setting: Any) -> str:
    if setting.choices:
        return "|".join(setting.choices)
    return {int: "INTEGER", float: "NUMBER"}.get(setting.base_type, "TEXT")


def _default_text(setting: Any) -> str:
    if setting.base_type is bool or setting.default == "" or (setting.default is None and setting.base_type is str):
        return ""
    return f" (default: {'auto' if setting.default is None else setting.default})"


@guarded
def _forget(**options: Any) -> None:
    """Make a model forget a file of bad answers; leaves a LoRA adapter."""
    run_forget(_configured(options), dry_run=options["dry_run"], as_json=options["json"])


def run_forget(config: Any, *, dry_run: bool, as_json: bool) -> dict[str, Any]:
    """Plan, run and render. Ends the process with 130 after Ctrl-C."""
    from qunlearn.console import emit_json, say
    from qunlearn.plan import make_plan

    plan = make_plan(config)
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


_settings_command(
    "forget", _forget, dry_run=_option(bool, False, "--dry-run", help="Resolve everything, print the plan, stop.")
)


@guarded
def _plan(**options: Any) -> None:
    """Say what a run would need of memory, and whether it fits, before anything is downloaded or loaded."""
    from qunlearn.console import emit_json
    from qunlearn.memory import plan_run, show_plan

    config = _configured(options)
    plan = plan_run(config)
    if options["json"]:
        emit_json({"status": "fits" if plan.fits else "does not fit", "model": config.model.name, **plan.as_dict()})
        if not plan.fits:
            raise typer.Exit(DoesNotFitError.exit_code)
        return
    show_plan(plan, config.model.name)
    plan.check()


_settings_command(
    "plan",
    _plan,
    (
        *("model.name", "model.revision", "model.quant", "model.device", "model.embeddings", "model.vram"),
        *("data.bad", "data.prompt_field", "data.completion_field", "data.max_length"),
        *("lora.r", "lora.target_modules", "objective.mismatch_k"),
        *("train.batch_size", "train.normal_batch_size", "train.max_tokens", "train.optimizer"),
    ),
)


# -- the others ------------------------------------------------------------------------------------------


@app.command()
@guarded
def merge(
    run: RunFolder,
    output: Output,
    base: Annotated[
        str,
        typer.Option(help="original: the 16-bit weights. dequantized: the weights the adapter was trained on."),
    ] = "original",
    model: BaseModel = None,
    bad: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The bad file, where it is not where the run found it."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Merge a run's adapter into its base: a model folder that needs nothing of ours."""
    from qunlearn.carry import check_merge
    from qunlearn.console import emit_json

    request = check_merge(run, output, base=base, model=model, bad=bad, overwrite=overwrite)
    from qunlearn.merge import merge as merge_run

    report = merge_run(request, device)
    if json:
        emit_json(report.as_dict())
    report.raise_if_back()


@app.command()
@guarded
def export(
    run: RunFolder,
    output: Output,
    format: Annotated[str, typer.Option(help="peft: safetensors, config and card.")] = "peft",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the adapter alone, to carry it elsewhere."""
    from qunlearn.carry import export_adapter
    from qunlearn.console import emit_json

    files = export_adapter(run, output, format=format, overwrite=overwrite)
    if json:
        emit_json({"status": "done", "output": str(output), "files": files})


@app.command("eval")
@guarded
def evaluate(
    run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(metavar="[RUN]", help="A run or adapter folder; without it the bare --model."),
    ] = None,
    model: BaseModel = None,
    forget: Annotated[Optional[Path], typer.Option(help="What should be gone.")] = None,  # noqa: UP045
    retain: Annotated[Optional[Path], typer.Option(help="What was given as normal data.")] = None,  # noqa: UP045
    holdout: Annotated[Optional[Path], typer.Option(help="Neighbours that were never given.")] = None,  # noqa: UP045
    general: Annotated[Optional[Path], typer.Option(help="Anything else.")] = None,  # noqa: UP045
    quant: Annotated[Optional[str], typer.Option(help="nf4|fp4|int8|none; default: as the run.")] = None,  # noqa: UP045
    template: Annotated[Optional[str], typer.Option(help="As for forget; default: as the run.")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    rows: Annotated[int, typer.Option(help="At most so many rows of each file.", min=1)] = 1000,
    json: Json = False,
) -> None:
    """Measure a model with and without its adapter on forget, retain, holdout and general files."""
    from qunlearn.console import emit_json
    from qunlearn.evaluate.request import EvalRequest

    named = {"forget": forget, "retain": retain, "holdout": holdout, "general": general}
    files = {name: path for name, path in named.items() if path is not None}
    request = EvalRequest.check(run, model, files, template=template)
    from qunlearn.evaluate.command import evaluate as evaluate_files

    result = evaluate_files(request, quant=quant, device=device, rows=rows, to_stdout=not json)
    if json:
        emit_json(result)


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


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
