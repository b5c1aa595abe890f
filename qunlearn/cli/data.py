"""`qunlearn data import` and `data check`: convert published data sets, show how a file is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

Guard = Callable[[Callable[..., None]], Callable[..., None]]
Json = Annotated[bool, typer.Option("--json", help="One machine-readable result on stdout.")]
Text = Optional[str]  # noqa: UP045 - typer reads the annotation at run time, on Python 3.10 too
Words = Optional[int]  # noqa: UP045


def add_data(app: typer.Typer, guarded: Guard) -> None:
    """Put the `data` commands into the command line."""
    commands = typer.Typer(help="Import public data sets, and check what the tool understands of a file.")
    commands.command("import")(guarded(import_))
    commands.command("check")(guarded(check))
    app.add_typer(commands, name="data", no_args_is_help=True)


def import_(
    format: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT", help="halueval, truthfulqa, saferlhf, tofu, muse, alpaca, preference or text."
        ),
    ],
    source: Annotated[str, typer.Argument(metavar="SRC", help="A file, gzipped or not, or hub:OWNER/NAME.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to write, readable by you alone.")],
    side: Annotated[
        Text, typer.Option(metavar="bad|normal|paraphrase", help="What to take of each row; default: by the format.")
    ] = None,
    split: Annotated[
        Text, typer.Option(metavar="SHARES", help="80/20: OUT.train and OUT.test; 70/10/20: and OUT.val.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split.", min=0)] = 0,
    limit: Annotated[Optional[int], typer.Option(help="At most so many rows.", min=1)] = None,  # noqa: UP045
    subset: Annotated[Text, typer.Option(help="Of a data set on the hub.")] = None,
    part: Annotated[Text, typer.Option(help="Of a data set on the hub, such as validation; default: train.")] = None,
    prompt_words: Annotated[
        Words, typer.Option(help="text: words of a prompt, or characters of Chinese and Japanese; default: 30.", min=1)
    ] = None,
    answer_words: Annotated[Words, typer.Option(help="text: words of its continuation; default: 50.", min=1)] = None,
    ask: Annotated[str, typer.Option(help="text: a question around the prompt, with {text} in it.")] = "",
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave rows out that are not of the format, and count them.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    json: Json = False,
) -> None:
    """Turn a published data set into JSONL, row by row, and say what was dropped and why."""
    from qunlearn.cli.flags import check_unused
    from qunlearn.data.importers import TEXT, Source, Wanted, import_data, parse_shares, show_imported
    from qunlearn.data.text_windows import Windows
    from qunlearn.utils.console import emit_json, stage

    if format != TEXT:
        words = {"--prompt-words": prompt_words is not None, "--answer-words": answer_words is not None}
        check_unused(f"the format {format}", {**words, "--ask": bool(ask)})
    cut = Windows(prompt_words or 30, answer_words or 50, ask)
    wanted = Wanted(side, limit, parse_shares(split), seed, skip_broken, cut, overwrite)
    with stage(f"importing {source}"):
        done = import_data(format, Source(source, subset, part), output, wanted)
    show_imported(done)
    if json:
        emit_json({"status": "done", **done.as_dict()})


def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A data file, - for stdin, or sandbox:KIND/SPLIT.")],
    model: Annotated[Text, typer.Option(help="Whose tokenizer counts; weights are loaded for context alone.")] = None,
    against: Annotated[Text, typer.Option(metavar="OTHER", help="Another file, to find what both have.")] = None,
    forget_tokens: Annotated[
        str, typer.Option(help="The rule whose tokens are marked: specific, or context.", metavar="RULE")
    ] = "specific",
    prompt_field: Annotated[Text, typer.Option(help="Field of the prompt, where it has its own name.")] = None,
    completion_field: Annotated[Text, typer.Option(help="Field of the answer, likewise.")] = None,
    turns: Annotated[Text, typer.Option(metavar="last|all", help="As for forget.")] = None,
    template: Annotated[Text, typer.Option(help="As for forget.")] = None,
    max_length: Annotated[Optional[int], typer.Option(help="As for forget.", min=8)] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """Show what the tool understands of a file: shape, two rows, what of them is trained and pushed, lengths."""
    from qunlearn.config.settings import DataConfig
    from qunlearn.data.records import FieldNames
    from qunlearn.errors import ConfigError
    from qunlearn.training.preview import PreviewOptions, check_data
    from qunlearn.utils.console import emit_json

    if forget_tokens not in ("specific", "context"):
        raise ConfigError(f"specific or context, not {forget_tokens[:40]!r}", where="--forget-tokens")
    if forget_tokens == "context" and model is None:
        raise ConfigError("context asks the model itself", where="--forget-tokens", hint="give --model")
    if turns not in (None, "last", "all"):
        raise ConfigError(f"last or all, not {turns[:40]!r}", where="--turns")
    default = DataConfig()
    fields = FieldNames(prompt_field, completion_field, turns or default.turns)
    options = PreviewOptions(
        fields, model, against, template or default.template, max_length or default.max_length, forget_tokens
    )
    result = check_data(file, options, to_stdout=not json)
    if json:
        emit_json(result)
