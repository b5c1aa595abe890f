"""The commands `qunlearn guard fit`, `guard eval`, `guard serve` and `guard show`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from qunlearn.cli.ask import Device, Json, Trust
from qunlearn.cli.splits import DataFolder, File, General, Holdout, Paraphrase
from qunlearn.config.fields import MOST_SEED

Model = Annotated[str, typer.Option("--model", help="A folder, a hub id or a short name.")]
GuardFolder = Annotated[Path, typer.Argument(metavar="GUARD", help="A folder of `qunlearn guard fit`.")]
Quant = Annotated[str, typer.Option(help="nf4|fp4|int8|none.")]


def fit(
    model: Model,
    bad: Annotated[str, typer.Option("--bad", "--forget", help="What should be gone.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    normal: Annotated[
        File, typer.Option("--normal", "--retain", help="Rows to pass; the base generates what is short of --rows.")
    ] = None,
    retrained_model: Annotated[
        File, typer.Option(help="A model that never saw what should be gone: its score is the strength's goal.")
    ] = None,
    corrupt: Annotated[str, typer.Option(help="The function of the table in the guide.")] = "noise-first",
    dims: Annotated[int, typer.Option(help="Dimensions of an embedding that are touched.", min=1)] = 1,
    tokens: Annotated[str, typer.Option(help="Corrupted tokens: all (but the last), turn or subject.")] = "turn",
    ner: Annotated[
        File, typer.Option(help="A model that tags names, a folder or hub id: what --tokens subject corrupts.")
    ] = None,
    classifier: Annotated[
        File, typer.Option(help="An encoder, a folder or hub id, that is trained as the gate; else the embedded one.")
    ] = None,
    classifier_lr: Annotated[float, typer.Option(help="Its learning rate.", min=1e-8, max=1.0)] = 2e-5,
    classifier_epochs: Annotated[int, typer.Option(help="Its epochs.", min=1, max=1000)] = 30,
    strength: Annotated[str, typer.Option(help="auto (bracketing), zeroth, agnostic, or a number.")] = "auto",
    false_alarms: Annotated[
        float, typer.Option(help="Share of normal prompts that may be flagged.", min=0.0001, max=0.5)
    ] = 0.01,
    conformal: Annotated[bool, typer.Option("--conformal", help="Set the threshold by split conformal.")] = False,
    rows: Annotated[int, typer.Option(help="Normal rows, given and generated.", min=16)] = 384,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", min=0, max=MOST_SEED)] = 0,
    template: Annotated[str, typer.Option(help="As for forget.")] = "auto",
    quant: Quant = "nf4",
    device: Device = "auto",
    trust: Trust = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a guard in that folder.")] = False,
    json: Json = False,
) -> None:
    """Train a gate for prompts about the bad rows, and find how strongly to corrupt them."""
    from dataclasses import replace

    from qunlearn.evaluation.request import check_quant
    from qunlearn.guard.request import FitWish, ModelNames, check_fit
    from qunlearn.utils.console import emit_json

    check_quant(quant)
    wish = FitWish(corrupt, dims, tokens, strength, false_alarms, conformal, rows, seed, template, trust, overwrite)
    wish = replace(wish, classifier_lr=classifier_lr, classifier_epochs=classifier_epochs)
    models = ModelNames(model, retrained_model, classifier, ner)
    request = check_fit(models, bad, normal, output, wish)
    from qunlearn.guard.fit import fit as fit_guard

    report = fit_guard(request, quant, device)
    if json:
        emit_json(report)


def evaluate(
    guard: GuardFolder,
    model: Model,
    data: DataFolder = None,
    forget: Annotated[File, typer.Option("--forget", "--bad", help="Prompts to flag.")] = None,
    paraphrase: Paraphrase = None,
    retain: Annotated[File, typer.Option("--retain", "--normal", help="Prompts to pass.")] = None,
    holdout: Holdout = None,
    general: General = None,
    quant: Quant = "nf4",
    device: Device = "auto",
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Measure the gate: errors by split, robustness, cost. `qunlearn eval MODEL --guard GUARD` measures the answers."""
    from qunlearn.evaluation.request import check_quant, split_files
    from qunlearn.utils.console import emit_json

    check_quant(quant)
    named = {"forget": forget, "paraphrase": paraphrase, "retain": retain, "holdout": holdout, "general": general}
    files = split_files(data, named)
    from qunlearn.guard.evaluate import evaluate_gate

    result = evaluate_gate(guard, model, files, quant, device, trust=trust, to_stdout=not json)
    if json:
        emit_json(result)


def serve(
    guard: GuardFolder,
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    quant: Annotated[str, typer.Option(help="nf4|int8|none.")] = "nf4",
    device: Device = "auto",
) -> None:
    """Serve a guarded model with transformers' own OpenAI-compatible server (needs `qunlearn[serve]`)."""
    from qunlearn.guard.serve import ServeWish
    from qunlearn.guard.serve import serve as serve_guarded

    serve_guarded(guard, model, ServeWish(host, port, quant, device))


_HASH = 48  # letters without a space from which a text is a hash


def show(guard: GuardFolder, json: Json = False) -> None:
    """Say what a guard is: its gate on held-out prompts, the corruption, and the curve of the strength."""
    from dataclasses import asdict

    from qunlearn.guard import Guard
    from qunlearn.utils.console import Column, emit_json, table

    opened = Guard.open(guard)
    found = {"corruption": asdict(opened.corruption), "tokens": opened.tokens, "ner": opened.ner is not None}
    found |= {"gate": opened.gate.settings(), "base": asdict(opened.base), "report": dict(opened.report)}
    if json:
        emit_json(found)
        return
    lines = [(key, value) for key, value in found.items() if key != "report"] + list(opened.report.items())
    rows = [[key.replace("_", " "), _brief(value)] for key, value in lines]
    table(str(guard), [Column("", False), Column("", False)], rows, to_stdout=True)


def _brief(value: object) -> str:
    """Return a value for people: numbers to three digits, hashes by their beginning."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {_brief(item)}" for key, item in value.items() if item not in (None, {}, []))
    if isinstance(value, (list, tuple)):
        return ", ".join(f"({_brief(item)})" if isinstance(item, (list, tuple)) else _brief(item) for item in value)
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    return text if len(text) <= _HASH or " " in text else f"{text[:12]}…"


def add_guard(app: typer.Typer, guarded: Callable[..., Any]) -> None:
    """Hang the group into the application."""
    group = typer.Typer(help="Forget at inference time: a gate and corrupted embeddings.", no_args_is_help=True)
    group.command("fit")(guarded(fit))
    group.command("eval")(guarded(evaluate))
    group.command("serve")(guarded(serve))
    group.command("show")(guarded(show))
    app.add_typer(group, name="guard")
