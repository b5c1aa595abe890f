"""The commands `qunlearn recipe list`, `show`, `copy` and `run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from qunlearn.cli.ask import Trust

Guard = Callable[[Callable[..., None]], Callable[..., None]]
Json = Annotated[bool, typer.Option("--json", help="One machine-readable result on stdout.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A recipe that `recipe list` names, or a YAML file.")]
Text = Optional[str]  # noqa: UP045 - typer reads the annotation at run time, on Python 3.10 too
File = Optional[Path]  # noqa: UP045


def add_recipe(app: typer.Typer, guarded: Guard) -> None:
    """Put the `recipe` commands into the command line."""
    commands = typer.Typer(help="Whole stories, from data to verdict: list, show, copy and run them.")
    commands.command("list")(guarded(list_))
    commands.command("show")(guarded(show))
    commands.command("copy")(guarded(copy))
    commands.command("run")(guarded(run))
    app.add_typer(commands, name="recipe", no_args_is_help=True)


def list_(json: Json = False) -> None:
    """List the recipes."""
    from qunlearn.recipe.recipe_file import names, read
    from qunlearn.utils.console import Column, emit_json, table

    recipes = [read(name) for name in names()]
    if json:
        emit_json([{"name": r.name, "about": r.about, "bad": r.bad.source, "normal": r.normal.source} for r in recipes])
        return
    columns = [Column(title, False) for title in ("recipe", "what it does", "bad", "normal")]
    rows = [[r.name, r.about, r.bad.source, r.normal.source] for r in recipes]
    table("Without --model each runs on the sandbox, with data of its own", columns, rows, to_stdout=True)


def show(name: Name) -> None:
    """Print a recipe."""
    from qunlearn.recipe.recipe_file import find
    from qunlearn.utils.console import write_out

    write_out(find(name).read_text(encoding="utf-8"), end="")


def copy(
    name: Name,
    output: Annotated[File, typer.Option("--output", "-o", help="File to write; default: NAME.yaml here.")] = None,
) -> None:
    """Copy a recipe, to change it and run the copy."""
    from qunlearn.recipe.recipe_file import copy as copy_recipe
    from qunlearn.utils.console import say
    from qunlearn.utils.text import command_line

    target = output or Path(f"{Path(name).stem}.yaml")
    copy_recipe(name, target)
    say(f"next: {command_line('qunlearn', 'recipe', 'run', target)}", style="bold")


def run(
    name: Name,
    model: Annotated[Text, typer.Option(help="As for forget; default: the sandbox.")] = None,
    bad: Annotated[File, typer.Option(help="What should go: rows, or a .txt to be cut up; default: public.")] = None,
    normal: Annotated[File, typer.Option(help="What should stay, likewise; with --bad alone the base's own.")] = None,
    paraphrase: Annotated[File, typer.Option(help="The bad rows in other words; only measured.")] = None,
    holdout: Annotated[File, typer.Option(help="Neighbours that should stay; only measured.")] = None,
    test_share: Annotated[
        int, typer.Option(help="Percent of the prompts that are not given, but asked afterwards.", min=0, max=90)
    ] = 20,
    vram: Annotated[Text, typer.Option(help="Memory the run may use on the GPU, such as 8GiB.")] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    trust: Trust = False,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any other setting: section.key=value.")] = None,
    rows: Annotated[int, typer.Option(help="At most so many rows of each file in a measurement.", min=1)] = 200,
    base: Annotated[str, typer.Option(metavar="original|dequantized", help="What to merge into.")] = "original",
    output: Annotated[File, typer.Option("--output", "-o", help="Folder; default: runs/NAME-MODEL-BAD.")] = None,
    json: Json = False,
) -> None:
    """Run a recipe: data, plan, base, forget, evaluate, other words, merge, evaluate, audit, report. Resumable."""
    from qunlearn.config.resolve import TRUST, parse_set, resolve
    from qunlearn.data.paths import fields_of
    from qunlearn.errors import ConfigError
    from qunlearn.merging.request import BASES
    from qunlearn.recipe.fetch import Given, named
    from qunlearn.recipe.recipe_file import read
    from qunlearn.recipe.run import default_folder
    from qunlearn.recipe.run import run as run_recipe
    from qunlearn.recipe.stages import Order
    from qunlearn.recipe.verdict import raise_if_missed
    from qunlearn.utils.console import emit_json

    recipe = read(name)
    flags = {"model.name": model, "model.vram": vram, "model.device": device, TRUST: trust or None}
    given_flags = {key: value for key, value in flags.items() if value is not None}
    config = resolve(
        (str(recipe.path), recipe.settings), ("--set", parse_set(settings or [])), ("command line", given_flags)
    )
    if base not in BASES:
        raise ConfigError(f"unknown base {base!r}", where="--base", hint=f"one of {', '.join(BASES)}")
    fields = fields_of(config.data)
    given = Given(bad, normal, paraphrase, holdout, test_share, config.train.seed, fields)
    given = named(given, recipe, config)
    folder = output or Path(config.output.folder or default_folder(recipe.name, config.model.name, given.bad))
    result = run_recipe(Order(recipe, config, folder, given, rows, base), to_stdout=not json)
    if json:
        emit_json(result)
    raise_if_missed(result)
