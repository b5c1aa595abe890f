"""The public functions: what the commands of the same names do, from Python. Imports nothing heavy at the top.

Errors are the exceptions of `qunlearn.errors`; each says what is wrong, where, and what to do. What is told on the
way goes to stderr, as on the command line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qunlearn.config.resolve import resolve
from qunlearn.config.settings import SETTINGS, Config
from qunlearn.errors import ConfigError
from qunlearn.parallel.ranks import Ranks, current, is_joined
from qunlearn.runs import folder as runs
from qunlearn.runs.folder import FINISHED, Run
from qunlearn.utils.arguments import typed
from qunlearn.utils.file_names import AUDIT
from qunlearn.utils.launch import process_count, process_number

if TYPE_CHECKING:
    from qunlearn.evaluation.request import EvalRequest
    from qunlearn.merging.merge import MergeReport
    from qunlearn.training.bases import Bases

FilePath = str | Path
KEYS_BY_FLAG: dict[str, str] = {
    s.flag.removeprefix("--").replace("-", "_"): key for key, s in SETTINGS.items() if s.flag
}
_NO_AUDIT = SETTINGS["output.audit"].default


@typed
def forget(
    model: str,
    bad: FilePath,
    output: FilePath,
    *,
    normal: FilePath | None = None,
    resume: bool = False,
    set: Mapping[str, Any] | None = None,
    **flags: Any,
) -> Run:
    """Unlearn a file of bad answers, and return the run with its adapter and record.

    `flags` are the command line's, with underscores (`batch_size=4`); `set` holds any other setting by its key
    (`{"stop.target": 0.1}`). A run that misses its target is returned as well: `run.record["not_reached"]` says why.
    Raises QunlearnError.
    """
    named = {"model.name": model, "data.bad": str(bad), "output.folder": str(output)}
    if normal is not None:
        named["data.normal"] = str(normal)
    asked = {
        KEYS_BY_FLAG.get(name, name): str(value) if isinstance(value, Path) else value for name, value in flags.items()
    }
    record = run_forget(resolve(("set", set or {}), ("arguments", asked | named)), resume=resume)
    return open_run(record["run"])


def run_forget(
    config: Config, *, resume: bool = False, dry_run: bool = False, bases: Bases | None = None
) -> dict[str, Any]:
    """Check a configuration and carry it out; returns record.json, or what a dry run decided.

    `bases` keep the model for further runs. With `output.audit` a finished run is audited, by one process; `audit` in
    what is returned says what that came to. Raises QunlearnError.
    """
    with together():
        folder, record = _run_forget(config, resume=resume, dry_run=dry_run, bases=bases)
        return _audited(config, folder, record)


@contextlib.contextmanager
def together() -> Iterator[Ranks]:
    """Join the processes that a launcher has started, where it has, of which the main one alone speaks.

    Inside of it they are joined, and stay what they are.
    """
    if process_count() == 1 or is_joined():
        yield current()
        return
    from qunlearn.parallel.group import joined
    from qunlearn.utils.console import silence

    if number := process_number():
        silence(f"process {number}")
    with joined() as ranks:
        yield ranks


def _run_forget(config: Config, *, resume: bool, dry_run: bool, bases: Bases | None) -> tuple[Path, dict[str, Any]]:
    """Carry a configuration out; returns where the run is, and its record."""
    from qunlearn.training.request import check_forget
    from qunlearn.utils.console import say

    request = current().first(lambda: check_forget(config, resume=resume))
    if config.output.audit != _NO_AUDIT:
        from qunlearn.attack.own_audit import check_enough

        check_enough(request.forget_rows)
    if resume:
        from qunlearn.training.resume import finished_record

        if (finished := current().from_main(lambda: finished_record(request))) is not None:
            say(f"this run is finished: {request.output}")
            return request.output, finished
    from qunlearn.training.prepare import prepare

    ready = prepare(request)
    if dry_run:
        from dataclasses import asdict

        say("dry run: nothing was loaded, trained or written", style="bold")
        return request.output, {"status": "dry run", "run": str(request.output), "config": asdict(config)}
    from qunlearn.training.forget import forget

    return request.output, forget(ready, bases)


def _audited(config: Config, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Audit a run where that was asked for, it came to an end, and it has not been audited."""
    if config.output.audit == _NO_AUDIT or record["status"] not in FINISHED:
        return record

    def audited() -> dict[str, Any] | None:
        if (folder / AUDIT).is_dir():
            return None
        from qunlearn.attack.own_audit import audit_run

        return audit_run(folder, config.model, config.output.audit)

    # By the process that has the run folder, whose failure is told and not raised: the others would wait for it.
    found = current().from_main(audited)
    return record if found is None else {**record, "audit": found}


@typed
def evaluate(
    run: FilePath | None = None,
    *,
    model: str | None = None,
    adapter: FilePath | None = None,
    guard: FilePath | None = None,
    suite: str = "basic",
    data: FilePath | None = None,
    forget: FilePath | None = None,
    paraphrase: FilePath | None = None,
    retain: FilePath | None = None,
    holdout: FilePath | None = None,
    general: FilePath | None = None,
    retrained_model: str | None = None,
    harm_classifier: str | None = None,
    reward_model: str | None = None,
    quant: str | None = None,
    template: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    rows: int = 1000,
    output: FilePath | None = None,
    fresh: bool = False,
    show: bool = False,
) -> dict[str, Any]:
    """Measure a run, or a model with or without an adapter, on files of rows; returns what eval.json holds, less texts.

    `run` may be a run folder, an adapter folder or a model, as on the command line. Without files the run's own are
    measured, where they still are what they were. `guard`, a folder of `guard fit`, stands before the adapter or base.
    `show` prints the table on stdout. Under a launcher the processes divide the rows, and the main one prints and
    writes. Raises QunlearnError.
    """
    from qunlearn.evaluation.request import Wish, check_eval

    splits = {"forget": forget, "paraphrase": paraphrase, "retain": retain, "holdout": holdout, "general": general}
    named = {name: None if path is None else str(path) for name, path in splits.items()}
    target, on_top = None if run is None else str(run), _path(adapter)
    files = None if data is None else str(data)

    def checked() -> tuple[EvalRequest, str | None]:
        if rows < 1:
            raise ConfigError(f"must be at least 1, not {rows}", where="evaluate(rows)", hint="the rows of each file")
        worn = None if guard is None else _guard(guard)
        judges = (retrained_model, harm_classifier, reward_model)
        wish = Wish(suite, *judges, _path(output), trust_remote_code, worn)
        return check_eval(target, on_top, model, files, named, quant, template, wish)

    with together() as ranks:
        request, form = ranks.first(checked)
        from qunlearn.evaluation.evaluate import evaluate as measured

        return measured(request, quant=form, device=device, rows=rows, to_stdout=show, fresh=fresh)


@typed
def audit(
    run: FilePath | None = None,
    *,
    model: str | None = None,
    adapter: FilePath | None = None,
    guard: FilePath | None = None,
    merged: str | None = None,
    control: str | None = None,
    original: str | None = None,
    forget: FilePath | None = None,
    paraphrase: FilePath | None = None,
    retain: FilePath | None = None,
    holdout: FilePath | None = None,
    general: FilePath | None = None,
    budget: str = "standard",
    only: str | None = None,
    tolerance: float = 0.0,
    quant: str | None = None,
    template: str | None = None,
    device: str = "auto",
    vram: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    output: FilePath | None = None,
    overwrite: bool = False,
    compare: FilePath | None = None,
    show: bool = False,
) -> dict[str, Any]:
    """Attack an unlearned model beside its control; returns what audit.json holds, which has no text of any row.

    `guard`, a folder of `guard fit`, stands before the model under audit; the weights are attacked with it off as well.
    `merged` is what `merge` made of the run: a subject of its own.
    `control` never saw what should be gone; without one placebo facts stand for it. `result["status"]` is "leaks" where
    an attack beats its control on more than the share `tolerance` of the facts. `compare` is another audit, or a run
    that has one: `result["compared"]` sets this one beside it. Under a launcher the processes divide the attacks, and
    the main one prints and writes. Raises QunlearnError.
    """
    from qunlearn.attack.request import AuditRequest, AuditWish, check_audit

    splits = {"forget": forget, "paraphrase": paraphrase, "retain": retain, "holdout": holdout, "general": general}
    named = {name: None if path is None else str(path) for name, path in splits.items()}
    how = (quant, template, device, trust_remote_code)

    def checked() -> AuditRequest:
        if compare is not None:
            _check_audited(compare)
        worn = None if guard is None else _guard(guard)
        wish = AuditWish(budget, only, tolerance, original, _path(output), overwrite, seed, vram, worn, merged)
        return check_audit(None if run is None else str(run), _path(adapter), model, named, control, how, wish)

    with together() as ranks:
        request = ranks.first(checked)
        from qunlearn.attack.audit import audit as attacked

        result = attacked(request, to_stdout=show)
        if compare is not None:
            names = [str(compare), str(request.output)]
            result["compared"] = ranks.from_main(lambda: _audits_beside(names, show=show))
    return result


def _check_audited(folder: FilePath) -> None:
    from qunlearn.attack.compare import open_audit

    open_audit(Path(folder), str(folder))


def _audits_beside(names: Sequence[str], *, show: bool) -> dict[str, Any]:
    from qunlearn.attack.compare import compare_audits

    return compare_audits([Path(name) for name in names], names, to_stdout=show)


@typed
def compare(runs: Sequence[FilePath], *, suite: str | None = None, show: bool = False) -> dict[str, Any]:
    """Set side by side what `evaluate` and `audit` left in folders, of each what all of them have, beside the first.

    Returns the evaluations' suite, runs and rows, and under `audits` families, rows, worst cells and rank stability;
    with `suite` evaluations alone. Raises QunlearnError.
    """
    from qunlearn.evaluation.compare import compare as compared
    from qunlearn.evaluation.compare import names_of
    from qunlearn.report.audit import find_audit
    from qunlearn.utils.file_names import EVAL

    folders = [Path(run) for run in runs]
    audited = suite is None and len(folders) > 1 and all(find_audit(folder) for folder in folders)
    measured = not audited or all((folder / EVAL).is_file() for folder in folders)
    result = compared(folders, suite, to_stdout=show) if measured else {}
    if audited:
        from qunlearn.attack.compare import compare_audits

        result["audits"] = compare_audits(folders, names_of(folders), to_stdout=show)
    return result


@typed
def merge(
    runs: Sequence[FilePath],
    output: FilePath,
    *,
    base: str = "original",
    model: str | None = None,
    bad: FilePath | None = None,
    gate: str | None = None,
    measure: bool = True,
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> MergeReport:
    """Merge runs' adapters into their base, in the order given, and measure what was written.

    `gate` names forms in which the result is measured too (nf4, fp4, int8, or none). The report's `raise_if_back()`
    raises GateError where forgotten answers came back. Under a launcher the main process merges and writes, and all
    divide the rows that are measured. Raises QunlearnError.
    """
    from qunlearn.merging.read_ahead import read_ahead
    from qunlearn.merging.request import MergeOptions, MergeRequest, check_merge, gates

    def checked() -> MergeRequest:
        options = MergeOptions(base, model, _path(bad), overwrite, measure, gates(gate, measure), trust_remote_code)
        request = check_merge([Path(run) for run in runs], Path(output), options)
        if gate is not None:
            request.check_gate()
        return request

    with together() as ranks:
        request = ranks.first(checked)
        if ranks.main:
            read_ahead(request.model.folder)
        from qunlearn.merging.merge import merge as merged

        return merged(request, device)


@typed
def open_run(folder: FilePath) -> Run:
    """Read a run folder or a bare adapter folder: `run.record` is record.json, `run.adapter` the adapter's folder.

    Raises AdapterError.
    """
    return runs.open_run(Path(folder))


def _guard(folder: FilePath) -> Any:
    from qunlearn.guard import Guard

    return Guard.open(folder)


def _path(given: FilePath | None) -> Path | None:
    return None if given is None else Path(given)
