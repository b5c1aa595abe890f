"""`qunlearn merge`: merge adapters into the weights, and measure the result before it gets its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qunlearn import __version__
from qunlearn.errors import GateError
from qunlearn.evaluation.metrics import SetScore
from qunlearn.hub.fingerprint import fingerprint
from qunlearn.hub.preflight import preflight_folder
from qunlearn.merging.plan import MergePlan, make_plan
from qunlearn.merging.request import MergeRequest, describe
from qunlearn.merging.writer import write_model
from qunlearn.parallel.ranks import current
from qunlearn.utils.console import say, stage, warn
from qunlearn.utils.files import sha256_of
from qunlearn.utils.staging import resumable

if TYPE_CHECKING:
    from qunlearn.merging.verify import Comparison


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
    """Return what helps, by where it came back (docs/robustness.md)."""
    harder = "train longer, with a lower --target and a higher --floor-nll"
    if "merged" in back:
        other = "the adapter was trained on quantised weights: --base dequantized merges into those"
        return other if base == "original" else harder
    beside = "or serve the base as it was trained with the adapter beside it (qunlearn export)"
    rounded = "use it in 16 bits" if base == "original" else "--base original loses less when it is quantised again"
    return f"{rounded}, {beside}, or {harder}"


def merge(request: MergeRequest, device: str) -> MergeReport:
    """Plan, write, load what was written as anyone would, measure, put in place. Raises QunlearnErrors.

    Of several processes the main one plans and writes; all load what is measured, and divide its rows.
    """
    ranks = current()
    ranks.check_same(lambda: _facts(request))
    with stage("planning"):
        plan = make_plan(request, device) if ranks.main else None
    comparison = None
    if request.measure:
        # What measuring needs takes seconds to import, and memory that a small machine may want for the merge.
        from qunlearn.merging import verify

        comparison = verify.before(request, device)
    with _written(request, plan) if plan is not None else nullcontext() as folder:
        written = Path(ranks.from_main(lambda: str(folder)))
        if comparison is not None:
            verify.after(comparison, written, request.gate)
    sums: list[Any] = [plan.adapter_tensors, [shard.bytes for shard in plan.shards]] if plan is not None else []
    tensors, sizes = ranks.from_main(lambda: sums)
    return report_of(request, tensors, sizes, comparison)


@contextmanager
def _written(request: MergeRequest, plan: MergePlan) -> Iterator[Path]:
    """Write the merged model; yields the folder that gets its name when the block ends well."""
    with resumable(request.place, plan.identity) as journal:
        with stage(f"merging into the {request.base} weights"):
            write_model(plan, journal)
        preflight_folder(journal.folder, trust_remote_code=request.sources[0].config.model.trust_remote_code)
        yield journal.folder


def _facts(request: MergeRequest) -> dict[str, object]:
    """Return what must be the same in all processes, or they would measure unlike things."""
    found: dict[str, object] = {"model": fingerprint(request.model.folder), "qunlearn": __version__}
    for name, source in zip(request.names, request.sources, strict=True):
        found[f"adapter of {name}"] = sha256_of(source.run.adapter / "adapter_model.safetensors")
        for word, rows in (("bad", source.forget_rows), ("normal", source.retain_rows)):
            found[f"{word} data of {name}"] = rows.sha256 if rows is not None else None
    return found


def report_of(
    request: MergeRequest, tensors: int, sizes: Sequence[int], comparison: Comparison | None, load: str | None = None
) -> MergeReport:
    """The report of a folder that has its name now, after showing it. sizes: bytes of each weight file; load: the line
    that loads it, where that is not transformers'."""
    gib = sum(sizes) / 2**30
    say(f"{tensors} adapter tensors, each used once; {len(sizes)} files, {gib:.2f} GiB in {request.output}")
    if comparison is not None:
        comparison.show()
    elif not request.measure:
        warn("nothing was measured (--no-measure): whether the answers stay forgotten here is not known")
    plain = f'AutoModelForCausalLM.from_pretrained("{request.output}")'
    say(f"next: {load or plain}", style="bold")
    told = (comparison.divergence, comparison.scores(), comparison.back()) if comparison else (None, {}, [])
    return MergeReport(describe(request), tensors, sum(sizes), len(sizes), *told)
