"""The stages of a recipe, each one call into the library that the command of the same name makes."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.attack.catalog import QUICK
from qunlearn.attack.own_audit import NOT_AUDITED, audit_run
from qunlearn.config.settings import SETTINGS, Config
from qunlearn.config.training import StopConfig
from qunlearn.data.records import read_dataset
from qunlearn.errors import ModelError, ResumeError
from qunlearn.evaluation.request import OWN_CLASSIFIER, EvalRequest, Wish
from qunlearn.hub.checked import check_model
from qunlearn.hub.download import resolve_model
from qunlearn.memory.devices import find_gpu
from qunlearn.memory.plan import MemoryPlan
from qunlearn.memory.request import plan_run
from qunlearn.memory.show import show_parts
from qunlearn.merging.request import MergeOptions, check_merge
from qunlearn.recipe import fetch
from qunlearn.recipe.progress import file_hash
from qunlearn.recipe.recipe_file import Recipe
from qunlearn.recipe.verdict import judge
from qunlearn.report.audit import audit_line, read_audit
from qunlearn.runs.folder import open_run
from qunlearn.training.request import check_forget
from qunlearn.utils.console import facts, say, warn
from qunlearn.utils.file_names import EVAL, EVAL_CACHE, RECORD, REPORT
from qunlearn.utils.staging import staging_folder
from qunlearn.utils.units import show_size

BASIC, FORGET = "basic", "forget"
DATA, BASE, RUN, MERGED, MERGED_EVAL = "data", "base", "run", "merged", "merged-eval"
_A_LOOK = 16  # rows of each kind in the run's own table
_AUDITED = ("forget", "paraphrase", "retain", "holdout", "general")
_LATER = ("paraphrase", "forget_reworded")  # asked in other words: a stage of its own


@dataclass(frozen=True)
class Order:
    """What was asked for. `settings`: the configuration without the data and the folder, which the stages fill in."""

    recipe: Recipe
    settings: Config
    folder: Path
    given: fetch.Given
    rows: int = 200
    merge_base: str = "original"

    @property
    def sandbox(self) -> bool:
        return self.settings.model.name == "sandbox"

    @property
    def audit(self) -> str:
        """The budget of the audit that ends a recipe."""
        asked = self.settings.output.audit
        return asked if asked != SETTINGS["output.audit"].default else QUICK

    @property
    def config(self) -> Config:
        """The run's configuration, once there is data."""
        normal = self.folder / DATA / fetch.NORMAL
        data = dataclasses.replace(
            self.settings.data,
            bad=str(self.folder / DATA / fetch.FILES["forget"]),
            normal=str(normal) if normal.is_file() else None,
            holdout=None,  # the stages around the run measure it
            prompt_field=None,  # the files in the data folder have our names
            completion_field=None,
            turns="last",
        )
        output = dataclasses.replace(self.settings.output, folder=str(self.folder / RUN), overwrite=True)
        return dataclasses.replace(self.settings, data=data, output=output, stop=self._stop)

    @property
    def _stop(self) -> StopConfig:
        """With a holdout the stages around the run measure everything: its own table need not measure it twice more."""
        stop, usual = self.settings.stop, StopConfig().table_rows
        measured = (self.folder / DATA / fetch.FILES["holdout"]).is_file()
        return dataclasses.replace(stop, table_rows=_A_LOOK) if measured and stop.table_rows == usual else stop


@dataclass(frozen=True)
class Stage:
    """`inputs`: what it depends on besides the stages before it; `outputs`: what must be there when it is done."""

    name: str
    title: str
    work: Callable[[Order], Mapping[str, Any]]
    inputs: Callable[[Order], Any]
    outputs: Sequence[str] = ()


# -- data and plan ---------------------------------------------------------------------------------------


def _fetch(order: Order) -> dict[str, Any]:
    counts = fetch.fetch(order.recipe, order.given, order.folder / DATA, sandbox=order.sandbox)
    facts("", [(name, f"{count} rows") for name, count in counts.items()])
    return {"rows": counts}


def _fetch_inputs(order: Order) -> Any:
    hashes = {name: file_hash(path) for name, path in order.given.files.items()}
    public = None if order.sandbox else [dataclasses.asdict(s) for s in (order.recipe.bad, order.recipe.normal)]
    return hashes, public, order.recipe.sandbox, order.given.test_percent, order.given.seed, order.given.fields


def _plan(order: Order) -> dict[str, Any]:
    """The memory plan, before a weight is loaded. Raises DoesNotFitError."""
    config = order.config
    here = config.model.device == "auto" and find_gpu(0) is None and config.model.vram is None
    if here:  # `plan` asks about a GPU that may not be here; this run is here
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, device="cpu"))
    try:
        plan = plan_run(config)
    except ModelError as error:
        warn(f"no memory plan: {error}")
        return {"planned": False}
    show_parts(plan, to_stdout=False)
    plan.check()
    from qunlearn.recipe.speed import measured_flops

    flops = _training_flops(config, plan)
    seconds = flops / measured_flops(config.model.device)
    say(
        f"at most {flops:.1e} floating-point operations to train: {seconds:,.0f} s at the speed of a large matrix "
        "product here, of which real steps reach a part"
    )
    return {"planned": True, "needed_bytes": plan.needs.total_bytes, "limit_bytes": plan.limit_bytes, "flops": flops}


def _training_flops(config: Config, plan: MemoryPlan) -> float:
    """If every row is as long as the longest. Per token a forward, a recomputed forward and a backward pass through
    frozen weights cost the same, 2 operations a parameter; the reference is one forward more."""
    passes = config.train.batch_size * config.objective.answers * 3 + config.train.normal_batch_size * 4
    return 2.0 * plan.shape.parameters * plan.load.row_tokens * config.train.usual_steps * passes


def _plan_inputs(order: Order) -> Any:
    tree = dataclasses.asdict(order.settings)
    del tree["output"]
    # Rows that were edited after they were fetched are other rows for everything that follows.
    data = {path.name: file_hash(path) for path in sorted((order.folder / DATA).glob("*.jsonl"))}
    return tree, order.settings.model.name, data


# -- measuring -------------------------------------------------------------------------------------------


def _measure(order: Order, run: bool, model: Path | None, files: Mapping[str, Path], suite: str, out: Path) -> Any:
    """One suite on a run, on a model's folder, or on the base. Returns the result, which `out` holds too."""
    from qunlearn.evaluation.evaluate import evaluate

    config = order.config
    template = None if config.data.template == "auto" else config.data.template
    own = order.sandbox and suite == "llmu" and order.recipe.harm_classifier == OWN_CLASSIFIER
    trust = config.model.trust_remote_code
    wish = Wish(suite=suite, harm=OWN_CLASSIFIER if own else None, output=out, trust=trust)
    if run:
        request = EvalRequest.check(order.folder / RUN, config.model.name, files, template=template, wish=wish)
    else:
        source = resolve_model(str(model)) if model else resolve_model(config.model.name, config.model.revision)
        checked = check_model(source, trust)
        sets = {name: read_dataset(path, role=name) for name, path in files.items()}
        judges = {"harm": None} if own else {}
        request = EvalRequest(None, config, checked, sets, template, suite, None, judges, out)
    result = evaluate(request, quant=None, device=config.model.device, rows=order.rows, to_stdout=False)
    gc.collect()
    return result


def _figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """The means that the stages file holds; everything else is in eval.json."""
    names = ("leaks", "exact_match", "probability")
    return {
        split: {name: {who: round(e["mean"], 4) for who, e in found[name].items()} for name in names if name in found}
        for split, found in result["measures"].items()
    }


def _suites(order: Order) -> list[str]:
    return [*([order.recipe.suite] if order.recipe.suite != BASIC else []), BASIC]


def _base(order: Order) -> dict[str, Any]:
    files, out = fetch.splits(order.folder / DATA), order.folder / BASE
    for suite in _suites(order):
        result = _measure(order, False, None, files, suite, out)
    return _figures(result)


def _evaluate(order: Order) -> dict[str, Any]:
    out = order.folder / RUN
    # The base is the same with the adapter beside it: what was measured is not measured again.
    shutil.copytree(order.folder / BASE / EVAL_CACHE, out / EVAL_CACHE, dirs_exist_ok=True)
    files = {split: path for split, path in fetch.splits(order.folder / DATA).items() if split not in _LATER}
    return _figures(_measure(order, True, None, files, BASIC, out))


def _paraphrase(order: Order) -> dict[str, Any]:
    """Everything, in the suite of the paper and in the basic one, which the report's verdict is taken from."""
    files = fetch.splits(order.folder / DATA)
    if not set(files) & set(_LATER):
        say("plain texts have no prompts to put in other words")
    for suite in _suites(order):
        result = _measure(order, True, None, files, suite, order.folder / RUN)
    found = _figures(result)
    return {split: found[split] for split in _LATER if split in found}


def _merged_eval(order: Order) -> dict[str, Any]:
    files = fetch.splits(order.folder / DATA)
    return _figures(_measure(order, False, order.folder / MERGED, files, BASIC, order.folder / MERGED_EVAL))


# -- forgetting, merging, reporting ----------------------------------------------------------------------


def _forget(order: Order) -> dict[str, Any]:
    """Raises KeyboardInterrupt where the run was interrupted: what it kept is not the end of this stage."""
    from qunlearn.training.forget import forget
    from qunlearn.training.prepare import prepare

    request = check_forget(order.config, resume=staging_folder(order.folder / RUN).is_dir())
    ready = prepare(request)
    try:
        record = forget(ready)
    except ResumeError as error:
        warn(f"{error.message}: starting at the beginning")
        record = forget(dataclasses.replace(ready, request=dataclasses.replace(request, resume=False)))
    gc.collect()
    if record["status"] == "interrupted":
        raise KeyboardInterrupt
    training = record["training"]
    told = {name: record.get(name) for name in ("stop_reason", "not_reached")}
    return {"steps": training["steps"], "seconds": training["seconds"], **told}


def _merge(order: Order) -> dict[str, Any]:
    from qunlearn.merging.merge import merge

    target = order.folder / MERGED
    # What was written is measured by the next stage, on all files and in the form it will be loaded in.
    trust = order.settings.model.trust_remote_code
    options = MergeOptions(order.merge_base, overwrite=target.exists(), measure=False, trust=trust)
    report = merge(check_merge([order.folder / RUN], target, options), order.settings.model.device)
    say("(the next stage measures it)")
    gc.collect()
    return {"base": order.merge_base, "tensors": report.tensors, "weight_bytes": report.weight_bytes}


def _audit(order: Order) -> dict[str, Any]:
    """The attacks on the run, beside placebo facts; they are told, and the verdict of the answers stands by itself."""
    files = {split: path for split, path in fetch.splits(order.folder / DATA).items() if split in _AUDITED}
    return audit_run(order.folder / RUN, order.settings.model, order.audit, files, overwrite=True)


def _report(order: Order) -> dict[str, Any]:
    from qunlearn.evaluation.evaluate import read_results
    from qunlearn.report.page import write_report

    path = order.folder / REPORT
    size = write_report(order.folder / RUN, path, include_samples=False)
    say(f"{path}: {show_size(size)}, for any browser")
    base, run, merged = (read_results(order.folder / name / EVAL)[BASIC] for name in (BASE, RUN, MERGED_EVAL))
    verdict = judge(base, run, merged, open_run(order.folder / RUN).record)
    audit = read_audit(order.folder / RUN)
    told = f"audit: {NOT_AUDITED}" if audit is None else audit_line(audit)
    return {"report": str(path), "verdict": verdict.as_dict(), "line": verdict.line, "audit": told}


def _nothing(order: Order) -> None:
    return None


STAGES: tuple[Stage, ...] = (
    Stage("fetch", "fetch the data", _fetch, _fetch_inputs, (f"{DATA}/{fetch.FILES['forget']}",)),
    Stage("plan", "plan", _plan, _plan_inputs),
    Stage("base", "evaluate the base", _base, lambda order: order.rows, (f"{BASE}/{EVAL}",)),
    Stage(FORGET, "forget", _forget, _nothing, (f"{RUN}/{RECORD}", f"{RUN}/adapter")),
    Stage("evaluate", "evaluate", _evaluate, _nothing, (f"{RUN}/{EVAL}",)),
    Stage("paraphrase", "ask in other words", _paraphrase, _nothing),
    Stage("merge", "merge", _merge, lambda order: order.merge_base, (f"{MERGED}/config.json",)),
    Stage("merged", "evaluate the merged model", _merged_eval, _nothing, (f"{MERGED_EVAL}/{EVAL}",)),
    Stage("audit", "audit", _audit, lambda order: order.audit),
    Stage("report", "report", _report, _nothing, (REPORT,)),
)
