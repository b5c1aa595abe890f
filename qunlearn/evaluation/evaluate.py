"""`qunlearn eval`: a suite of measures on any files, with and without an adapter, and beside a retrained model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qunlearn import __version__
from qunlearn.data.tokenize import Template
from qunlearn.errors import AdapterError, OutputError
from qunlearn.evaluation.cache import Cache
from qunlearn.evaluation.catalog import MEASURES, SUITES
from qunlearn.evaluation.conclusion import conclude
from qunlearn.evaluation.eval_file import read_suites
from qunlearn.evaluation.inputs import Collection, weights_of
from qunlearn.evaluation.measures import Values, can_measure, measure, row_values, verdict_of
from qunlearn.evaluation.metrics import VERDICTS
from qunlearn.evaluation.request import EvalRequest
from qunlearn.evaluation.results import KEPT, View, is_forget
from qunlearn.evaluation.runner import collect
from qunlearn.evaluation.table import show
from qunlearn.model.device import choose_device, choose_dtype
from qunlearn.model.gpus import chosen_devices, describe_devices
from qunlearn.model.load import LoadSpec, describe_quantization, load_spec
from qunlearn.parallel.ranks import current
from qunlearn.utils.console import say
from qunlearn.utils.files import json_text, write_whole
from qunlearn.utils.output import real


def evaluate(
    request: EvalRequest, *, quant: str | None, device: str, rows: int, to_stdout: bool, fresh: bool = False
) -> dict[str, Any]:
    """Score every split under the base, the adapter and the retrained model, where given. Raises QunlearnErrors.

    `rows`: at most so many of a file; `fresh`: measure again what is known. What is returned and printed holds no
    text of any file; eval.json, where there is a folder for it, holds them all.
    """
    ranks = current()
    spec = ranks.first(lambda: _spec(request, quant, device))
    ranks.from_main(lambda: _prepare_output(request))
    found = collect(request, spec, rows, Cache(request.cache_folder, fresh=fresh))
    view = found.view()
    values = _all_values(request, view)
    result = _result(request, view, values, found)
    result["conclusion"] = conclude(result)
    where = f"{result['quantization']} on {describe_devices(chosen_devices(spec.device, spec.device_map))}"
    templates = {split: template["name"] for split, template in result["templates"].items()}
    say(f"{where}; templates: {templates}")
    result["templates"] = templates
    if found.cache.known:
        say(found.cache.describe())
    show(result, to_stdout=to_stdout)
    if ranks.main:
        _write(request, result, view, values)
    return result


def _spec(request: EvalRequest, quant: str | None, device: str) -> LoadSpec:
    """Return how the model is loaded. Raises ConfigError, DeviceError."""
    spec = load_spec(request.config.model, quant=quant, device=device)
    chosen_devices(spec.device, spec.device_map)
    return spec


# -- numbers ---------------------------------------------------------------------------------------------

_Place = tuple[str, str, str]  # subject, split, measure
_MEASURED = ("weights", "quantization")  # what suites in one file have in common


def _places(request: EvalRequest, view: View) -> list[_Place]:
    suite = SUITES[request.suite]
    asked = [(s, split, name) for split in view.items for name in suite.on(split) for s in view.subjects]
    if any(not is_forget(split) for split in view.items):
        asked += [(s, KEPT, name) for name in suite.whole for s in view.subjects]
    return [(s, split, name) for s, split, name in asked if can_measure(name, view, s, split)]


def _all_values(request: EvalRequest, view: View) -> dict[_Place, Values | None]:
    return {
        (s, split, name): None if split == KEPT else row_values(name, view, s, split)
        for s, split, name in _places(request, view)
    }


def _result(
    request: EvalRequest, view: View, values: Mapping[_Place, Values | None], found: Collection
) -> dict[str, Any]:
    measures: dict[str, dict[str, dict[str, Any]]] = {}
    for (subject, split, name), known in values.items():
        estimate = measure(name, view, subject, split, known)
        if estimate is not None:
            measures.setdefault(split, {}).setdefault(name, {})[subject] = asdict(estimate)
    return {
        "model": (request.run.record.get("model", {}).get("asked") if request.run else None)
        or request.model.source.asked,
        "adapter": str(request.run.adapter) if request.run else None,
        "guard": request.guard.identity if request.guard else None,
        "weights": weights_of(request),
        "retrained_model": request.retrained.source.asked if request.retrained else None,
        "quantization": _quantization(request, found.spec),
        "suite": request.suite,
        "files": {
            name: {"path": d.path, "sha256": d.sha256, "rows": len(view.items[name])}
            for name, d in request.sets.items()
        },
        "templates": {split: _template(template) for split, template in found.rows["base"].templates.items()},
        "scores": {subject: _scores(measures, subject) for subject in view.subjects},
        "verdicts": {s: dict(_verdicts(view, s, "forget")) for s in view.subjects if view.has(s, "forget", "outputs")},
        "verdicts_paraphrase": {
            s: dict(_verdicts(view, s, "paraphrase")) for s in view.subjects if view.has(s, "paraphrase", "outputs")
        },
        "measures": measures,
        "not_measured": _not_measured(request, measures),
        "qunlearn": __version__,
    }


def _template(template: Template) -> dict[str, Any]:
    return asdict(template)


def _quantization(request: EvalRequest, spec: LoadSpec) -> str:
    if request.model.facts.quantization:
        return f"{request.model.facts.quantization}, as the checkpoint has it"
    return describe_quantization(spec, choose_dtype(choose_device(spec.device)))


def _scores(measures: Mapping[str, Any], subject: str) -> dict[str, dict[str, float]]:
    """The three measures of the before/after table, in the form that records hold them."""
    out: dict[str, dict[str, float]] = {}
    for split, of_split in measures.items():
        known = {n: of_split[n][subject] for n in ("probability", "exact_match", "perplexity") if n in of_split}
        if len(known) == 3:
            out[split] = {"n": known["probability"]["n"], **{n: e["mean"] for n, e in known.items()}}
    return out


def _verdicts(view: View, subject: str, split: str) -> list[tuple[str, int]]:
    found = _verdict_list(view, subject, split)
    return [(word, found.count(word)) for word in VERDICTS]


def _verdict_list(view: View, subject: str, split: str) -> list[str]:
    outputs = view.get(subject, split, "outputs")
    return [verdict_of(item, output) for item, output in zip(view.items[split], outputs, strict=True)]


def _not_measured(request: EvalRequest, measures: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return what the suite names and could not be had, with what is missing."""
    suite, missing = SUITES[request.suite], {}
    for name in (*suite.forget, *suite.keep, *suite.whole):
        if not any(name in of_split for of_split in measures.values()):
            asks = MEASURES[name].asks
            choices = "rows with wrong answers (`perturbed`)" if "choices" in MEASURES[name].needs else ""
            missing[name] = asks or choices or "rows to measure it on"
    return missing


# -- what is written -------------------------------------------------------------------------------------


def _prepare_output(request: EvalRequest) -> None:
    """Refuse, before any work, a folder that cannot be written. Raises OutputError."""
    folder, path, cache = request.output, request.result_path, request.cache_folder
    if folder is None or path is None or cache is None:
        return
    real(folder)
    hint = "choose another --output"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in (path, cache):
            if place.is_symlink():
                raise OutputError(
                    "is a link, and links are not followed", where=str(place), hint=f"remove it, or {hint}"
                )
    except OSError as error:
        raise OutputError(f"cannot be made: {error.strerror}", where=str(folder), hint=hint) from error
    for place in (folder, cache, path):
        if place.exists() and not os.access(place, os.W_OK):
            raise OutputError("cannot be written", where=str(place), hint="-o FOLDER keeps the evaluation elsewhere")
    try:
        read_results(path)
    except AdapterError as error:
        hint = f"remove it, or {hint}"
        raise OutputError(f"not what `qunlearn eval` writes: {error.message}", where=str(path), hint=hint) from error


def _write(request: EvalRequest, result: Mapping[str, Any], view: View, values: Mapping[_Place, Values | None]) -> None:
    """eval.json: the latest result of each suite, with every row's texts and values, for their owner's eyes only."""
    path = request.result_path
    if path is None:
        return
    items = {split: _items(view, split, values) for split in view.items}
    known = read_results(path)
    kept = {name: of for name, of in known.items() if all(of.get(key) == result[key] for key in _MEASURED)}
    if others := sorted(known.keys() - kept.keys() - {request.suite}):
        say(f"{path} held {', '.join(others)} of another model, adapter, guard or form: it is dropped")
    suites = {**kept, request.suite: {**result, "items": items}}
    try:
        write_whole(path, json_text({"suites": suites, "latest": request.suite}))
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=str(path), hint="free space") from error
    say(f"every row, with its texts: {path}")


def _items(view: View, split: str, values: Mapping[_Place, Values | None]) -> list[dict[str, Any]]:
    with_outputs = [s for s in view.subjects if view.has(s, split, "outputs")]
    verdicts = {s: _verdict_list(view, s, split) for s in with_outputs} if is_forget(split) else {}
    rows = []
    for i, item in enumerate(view.items[split]):
        row: dict[str, Any] = {"key": item.key, "prompt": item.prompt, "answer": item.answer}
        row |= {"truth": item.truth} if item.truth is not None else {}
        row["outputs"] = {s: view.get(s, split, "outputs")[i].text for s in with_outputs}
        row["verdicts"] = {s: words[i] for s, words in verdicts.items()}
        of_row: dict[str, dict[str, float]] = {}
        for (subject, of_split, name), known in values.items():
            if of_split == split and known is not None and known[i] is not None:
                of_row.setdefault(subject, {})[name] = known[i]  # type: ignore[assignment]
        row["values"] = of_row
        rows.append(row)
    return rows


def read_results(path: Path) -> dict[str, Any]:
    """The suites in an eval.json; none where there is no file. Raises AdapterError for what is none of ours."""
    return read_suites(path) if path.is_file() else {}
