"""`qunlearn merge`: the adapters into the weights, and a look at what was written before it gets its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qunlearn.carry import MergeRequest, describe
from qunlearn.console import say, stage, warn
from qunlearn.errors import GateError
from qunlearn.evaluate.metrics import SetScore
from qunlearn.evaluate.suite import show_sets
from qunlearn.forget import load_spec
from qunlearn.journal import resumable
from qunlearn.merge.measure import Column, Subject, after, before, divergence, gate, gates_failed
from qunlearn.merge.plan import make_plan
from qunlearn.merge.stream import write_model
from qunlearn.model.load import LoadSpec, load_base
from qunlearn.model.source import preflight_folder


@dataclass(frozen=True)
class MergeReport:
    """What was written and measured.

    `scores`: column (base, adapter, merged, nf4, …) -> set -> score; empty where nothing was measured. `divergence`:
    the largest KL(adapter || merged) of the runs, nats per token. `back`: the forms in which bad answers are back.
    """

    request: Mapping[str, Any]
    tensors: int
    weight_bytes: int
    shards: int
    divergence: float | None
    scores: Mapping[str, Mapping[str, SetScore]]
    back: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        scores = {name: {title: asdict(s) for title, s in sets.items()} for name, sets in self.scores.items()}
        return {**asdict(self), "scores": scores, "status": "came back" if self.back else "done"}

    def raise_if_back(self) -> None:
        """Raises GateError when the merged model says again what the adapter made the base forget."""
        if self.back:
            where = ", ".join("in the merged model" if name == "merged" else f"at {name}" for name in self.back)
            hint = f"the folder is written all the same; {_remedy(self.request['base'], self.back)}"
            raise GateError(f"the forgotten answers came back {where}", hint=hint)


def _remedy(base: str, back: Sequence[str]) -> str:
    """What helps, by where it came back (docs/robustness.md)."""
    harder = "train longer, with a lower --target and a higher --floor-nll"
    if "merged" in back:
        other = "the adapter was trained on quantised weights: --base dequantized merges into those"
        return other if base == "original" else harder
    beside = "or serve the base as it was trained with the adapter beside it (qunlearn export)"
    rounded = "use it in 16 bits" if base == "original" else "--base original loses less when it is quantised again"
    return f"{rounded}, {beside}, or {harder}"


def merge(request: MergeRequest, device: str) -> MergeReport:
    """Plan, write, load what was written as anyone would, measure, put in place. Raises QunlearnErrors."""
    first = request.sources[0].config
    trained = replace(load_spec(first), device=device)
    subjects: list[Subject] = []
    columns: list[Column] = []
    with stage("planning"):
        plan = make_plan(request, device)
    if request.measure:
        subjects, columns = before(request, trained)
    with resumable(request.output, plan.identity) as journal:
        with stage(f"merging into the {request.base} weights"):
            write_model(plan, journal)
        preflight_folder(journal.folder, trust_remote_code=trained.trust_remote_code)
        kl = _measure(journal.folder, trained, request.gate, subjects, columns) if request.measure else None
    sizes = [shard.bytes for shard in plan.shards]
    return report_of(request, plan.adapter_tensors, sizes, kl, columns, subjects)


def report_of(
    request: MergeRequest,
    tensors: int,
    sizes: Sequence[int],
    kl: float | None,
    columns: Sequence[Column],
    subjects: Sequence[Subject],
) -> MergeReport:
    """The report of a folder that has its name now, after showing it. sizes: bytes of each weight file."""
    scores = {column.name: {title: column.of(title) for title in column.scores} for column in columns}
    back = gates_failed(columns, subjects) if columns else []
    report = MergeReport(describe(request), tensors, sum(sizes), len(sizes), kl, scores, back)
    gib = report.weight_bytes / 2**30
    say(f"{report.tensors} adapter tensors, each used once; {report.shards} files, {gib:.2f} GiB in {request.output}")
    if not request.measure:
        warn("nothing was measured (--no-measure): whether the answers stay forgotten here is not known")
    if any(column.scores for column in columns):
        show_sets("What the merged model says", [(column.name, column.scores) for column in columns])
    if kl is not None:
        say(f"KL(adapter || merged): {kl:.5f} nats/token")
    say(f'next: AutoModelForCausalLM.from_pretrained("{request.output}")', style="bold")
    return report


def _measure(
    folder: Path, trained: LoadSpec, gates: Sequence[str], subjects: Sequence[Subject], columns: list[Column]
) -> float | None:
    """Adds the columns of the written model, as it is and quantised; returns the largest divergence."""
    if not any(subject.sets for subject in subjects):
        return None
    with stage("measuring what was written"):
        written = load_base(folder, replace(trained, quant="none", double_quant=False))
        columns.append(after("merged", written, subjects))
        kls = [kl for subject in subjects if (kl := divergence(written, subject)) is not None]
    del written
    columns.extend(gate(folder, quant, trained, subjects) for quant in gates)
    return max(kls, default=None)
