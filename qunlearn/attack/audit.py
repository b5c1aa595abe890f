"""`qunlearn audit`: run the attacks that a budget allows on every subject, and say what they found."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qunlearn import __version__
from qunlearn.attack import collateral, formats, layers, membership, prompts, relearn, weights
from qunlearn.attack.bench import Bench
from qunlearn.attack.catalog import FAMILIES, PREFIX_SEARCH, Format, formats_of
from qunlearn.attack.cells import CONTROL, MERGED, ORIGINAL, PLACEBO, UNGUARDED, UNLEARNED, Cell, Cells, Place
from qunlearn.attack.request import AuditRequest
from qunlearn.attack.show import show
from qunlearn.attack.subjects import Checkpoint, Loads, checkpoints
from qunlearn.attack.verdict import conclude
from qunlearn.errors import DoesNotFitError, is_out_of_memory
from qunlearn.memory.show import plan_before_loading
from qunlearn.memory.show_gpus import gpus_plan_before_loading
from qunlearn.memory.step import CONTEXT_BYTES
from qunlearn.model.device import cap_memory, choose_device, choose_dtype, device_facts
from qunlearn.model.gpus import chosen_devices
from qunlearn.model.load import describe_quantization, load_spec
from qunlearn.parallel.queue import work_through
from qunlearn.parallel.ranks import current
from qunlearn.roles.self_made_file import write_self_made
from qunlearn.utils.console import Meter, say
from qunlearn.utils.file_names import AUDIT_RESULT
from qunlearn.utils.files import json_text, write_private
from qunlearn.utils.staging import resumable
from qunlearn.utils.units import parse_size

Attack = Callable[[Bench, str], Cell]
ATTACKS: Mapping[str, Attack] = {
    "formats": formats.run,
    "prompts": prompts.run,
    "relearning": relearn.run,
    "weights": weights.run,
    "layers": layers.run,
    "membership": membership.run,
    "collateral": collateral.run,
}
_EVERYONE = (ORIGINAL, UNLEARNED, CONTROL, PLACEBO)
_SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "weights": (UNLEARNED,),
    "membership": (ORIGINAL, UNLEARNED, CONTROL),
    "collateral": (ORIGINAL, UNLEARNED, CONTROL),
}
_OF_THE_WEIGHTS = ("relearning", "weights", "layers")  # who has them can take a guard off
_OPEN = ("formats", "open")
_ASKED_FIRST = ("formats.reworded", "relearning")  # of the original: what is asked of the others hangs on it
_PLACEBOS = "placebo.jsonl"


def audit(request: AuditRequest, *, to_stdout: bool) -> dict[str, Any]:
    """Attack, write the audit folder, print and return what audit.json holds: no text of any row.

    Several processes divide the attacks, each of which is one process's, but for the prefix search, whose questions
    they divide; the main one writes. Raises QunlearnErrors.
    """
    ranks = current()
    started, wanted, missing = time.monotonic(), *_wanted(request)
    ranks.first(lambda: _plan(request))
    ranks.check_same(request.identity)
    notes = _notes(request)
    with resumable(request.place, request.identity()) if ranks.main else contextlib.nullcontext() as journal:
        cells = Cells(journal)
        if cells.known:
            say(f"known from before: {cells.known} cells")
        with _named_memory_errors():
            _attack(request, cells, wanted, notes)
        result = ranks.from_main(lambda: _result(request, cells, missing, notes))
        if journal is not None:
            result["seconds"] = round(time.monotonic() - started, 1)
            write_private(journal.folder / AUDIT_RESULT, json_text(result))
            if request.given.retrained is None:
                write_self_made(journal.folder / _PLACEBOS, [f.record for f in request.inputs.placebo if f.asks])
    show(result, to_stdout=to_stdout)
    say(f"every cell: {request.output}")
    if request.given.retrained is None:
        n = sum(fact.asks for fact in request.inputs.placebo)
        say(f"placebo facts, {request.renamed} of {n} about subjects that do not exist: {request.output / _PLACEBOS}")
    return result


def _wanted(request: AuditRequest) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Return the attacks to run, and of the others what they lack."""
    found, missing = [], {}
    for family, name, form in formats_of(request.wish.budget, request.only):
        lacks = [need for need in form.needs if not _has(request, need)]
        if lacks:
            given = lacks == ["--paraphrase"] and "paraphrase" in request.given.sets
            lacking = "no paraphrase has a row's answer" if given else "needs " + ", ".join(lacks)
            missing[f"{family}.{name}"] = lacking
        else:
            found.append((family, name))
    # Asked even where --only leaves it out: the control of the weights' forms, and what relearning could win back.
    if _OPEN not in found and any(family in ("weights", "relearning") for family, _ in found):
        found.append(_OPEN)
    # Relearning comes last: it lays an adapter of its own over the model.
    return sorted(found, key=lambda place: place[0] == "relearning"), missing


def _notes(request: AuditRequest) -> list[str]:
    """Return what is to be known of what was given."""
    notes = ["merged: read from a GGUF file and dequantised to 16 bits, not run by llama.cpp"] if request.gguf else []
    if unmatched := request.inputs.unmatched:
        rows = len(request.given.sets["paraphrase"].records)
        notes.append(f"{unmatched} of {rows} paraphrases have no row's answer, and are not asked")
    return notes


def _has(request: AuditRequest, need: str) -> bool:
    inputs = request.inputs
    there = {
        "prompts": any(fact.asks for fact in inputs.facts),
        "options": any(fact.wrong for fact in inputs.facts),
        "--paraphrase": any(fact.paraphrases for fact in inputs.facts),
        "retain rows": any(record.turns for record in inputs.retain),
        "--general": bool(inputs.general),
        "--holdout": any(record.turns for record in inputs.holdout),
        "general rows": any(record.turns for record in inputs.general),
        "adapter": request.given.run is not None,
        "--control": request.given.retrained is not None,
        "chat template": (request.given.template or request.config.data.template) in ("auto", "chat"),
    }
    return there[need]


def _plan(request: AuditRequest) -> None:
    """Plan the memory as for `forget`, and keep to --vram."""
    config = request.config
    devices, model = chosen_devices(config.model.device, config.model.device_map), request.given.model.facts.config
    facts = [device_facts(device) for device in devices]
    if len(devices) > 1:
        gpus_plan_before_loading(config, model, facts, config.data.max_length)
    else:
        plan_before_loading(config, model, facts[0], config.data.max_length)
    if config.model.vram:
        for device in devices:
            cap_memory(device, parse_size(config.model.vram, "--vram") - CONTEXT_BYTES)


_Target = tuple[Checkpoint, Place]


def _attack(request: AuditRequest, cells: Cells, wanted: list[tuple[str, str]], notes: list[str]) -> None:
    """Fill the cells, checkpoint by checkpoint and subject by subject; what is known is not attacked again."""
    loads = checkpoints(request)
    places = [
        (load, Place(family, name, subject))
        for load in loads
        for late in (False, True)
        for subject in load.subjects
        for family, name in wanted
        if (family == "relearning") == late and _attacked(family, name, subject)
    ]
    left = [(load, place) for load, place in places if place not in cells.found]
    told: dict[Place, list[str]] = {}
    with Meter("attacks", len(left)) as meter, Loads(request) as models:

        def attack(target: _Target) -> dict[str, Any]:
            load, place = target
            with models.bench(load, place, cells) as bench:
                return {"cell": asdict(ATTACKS[place.family](bench, place.format)), "notes": bench.notes}

        def hear(target: _Target, found: Mapping[str, Any]) -> None:
            place = target[1]
            cells.keep(place, Cell(**found["cell"]))
            told[place] = found["notes"]
            meter.at(len(told), f"{place.subject}: {FAMILIES[place.family].title}, {place.format}")

        first, together, others = _parts(left)
        work_through(first, attack, hear)
        for target in together:
            hear(target, attack(target))
        work_through(others, attack, hear)
    notes += dict.fromkeys(note for _, place in left for note in told[place] if note not in notes)


def _parts(left: Sequence[_Target]) -> tuple[list[_Target], list[_Target], list[_Target]]:
    """Return what several processes divide first, what all of them attack together, and what they divide then.

    None begins what hangs on an attack that another one is still at; and since a prefix search takes as long as all
    the others, its questions are divided.
    """
    first: list[_Target] = []
    together: list[_Target] = []
    others: list[_Target] = []
    for target in left:
        place = target[1]
        if current().count > 1 and place.format == PREFIX_SEARCH:
            together.append(target)
        elif current().count > 1 and place.subject == ORIGINAL and place.file.startswith(_ASKED_FIRST):
            first.append(target)
        else:
            others.append(target)
    return first, together, others


def _original(request: AuditRequest) -> str | None:
    if request.original is not None:
        return request.original.source.asked
    return "base" if request.given.run or request.given.guard else None


def _attacked(family: str, name: str, subject: str) -> bool:
    """Return whether an attack is put to a subject."""
    if subject == UNGUARDED:
        return family in _OF_THE_WEIGHTS or (family, name) == _OPEN
    if subject == MERGED:
        return family != "weights"  # forms of the adapter
    if name == PREFIX_SEARCH and subject == ORIGINAL:
        return False  # which gives the answers unasked
    return subject in _SUBJECTS.get(family, _EVERYONE)


def _result(request: AuditRequest, cells: Cells, missing: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    given, baseline = request.given, CONTROL if request.given.retrained else PLACEBO
    spec = load_spec(request.config.model, quant=request.quant)
    forms: dict[tuple[str, str], Format] = {
        (f, n): form for f, n, form in formats_of(request.wish.budget, request.only)
    }
    return {
        "model": given.model.source.asked,
        "adapter": str(given.run.adapter) if given.run else None,
        "control": given.retrained.source.asked if given.retrained else None,
        "original": _original(request),
        "merged": request.merged.source.asked if request.merged else None,
        "guard": given.guard.identity if given.guard else None,
        "quantization": describe_quantization(spec, choose_dtype(choose_device(spec.device))),
        "budget": request.wish.budget,
        "seed": request.wish.seed,
        "facts": len(request.inputs.facts),
        "units": len(set(request.inputs.units)),
        "placebo_renamed": request.renamed,
        "unmatched_paraphrases": request.inputs.unmatched,
        "files": {name: {"path": d.path, "sha256": d.sha256} for name, d in given.sets.items()},
        "keys": [fact.key for fact in request.inputs.facts],
        "fact_units": request.inputs.units,
        **conclude(cells, forms, baseline, request.wish.tolerance, missing, request.inputs.units),
        "notes": notes,
        "qunlearn": __version__,
    }


@contextlib.contextmanager
def _named_memory_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        hint = "--device cpu, a smaller --budget, or --only A,B"
        raise DoesNotFitError("out of memory while attacking", where="audit", hint=hint) from error
