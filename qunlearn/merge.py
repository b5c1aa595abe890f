"""`qunlearn merge`: the adapter into the weights, checked against the adapter it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qunlearn.carry import MergeRequest, describe
from qunlearn.console import Column, say, stage, table, warn
from qunlearn.data.batch import ALL, collate
from qunlearn.data.tokenize import Example, Template, choose_template, encode
from qunlearn.errors import GateError, ModelError
from qunlearn.evaluate.metrics import SetScore, aggregate
from qunlearn.evaluate.score import score_rows
from qunlearn.forget import load_spec
from qunlearn.model.head import token_kl
from qunlearn.model.load import Base, LanguageModel, LoadSpec, dequantized, load_base, quiet_transformers
from qunlearn.model.policy import Policy, adapter_tensors
from qunlearn.run import staged

_SHARD = "4GB"


@dataclass(frozen=True)
class MergeReport:
    """What was written and measured. `divergence`: KL(policy || merged), nats per token; None without a bad file."""

    request: dict[str, Any]
    tensors: int
    weight_bytes: int
    shards: int
    divergence: float | None
    scores: Mapping[str, SetScore]
    back: bool

    def as_dict(self) -> dict[str, Any]:
        scores = {name: asdict(score) for name, score in self.scores.items()}
        return {**asdict(self), "scores": scores, "status": "came back" if self.back else "done"}

    def raise_if_back(self) -> None:
        """Raises GateError when the merged model says again what the adapter made the base forget."""
        if self.back:
            hint = "the folder is written all the same; "
            if self.request["base"] == "original":
                hint += "the adapter was trained on quantised weights: --base dequantized merges into those"
            else:
                hint += "train longer, or with a lower --target and a higher --floor-nll"
            raise GateError("the forgotten answers came back in the merged model", hint=hint)


def merge(request: MergeRequest, device: str) -> MergeReport:
    """Merge, write, load what was written as anyone would, and measure. Raises QunlearnErrors."""
    adapter = request.run.adapter
    trained = replace(load_spec(request.config), device=device)
    plain = replace(trained, quant="none", double_quant=False)
    rows, scores, expected = _before(request, trained)
    with stage(f"merging into the {request.base} weights"):
        original = request.base == "original"
        base = load_base(request.model.folder, replace(plain, as_stored=True) if original else trained)
        if not original:
            base = dequantized(base)
        merged, tensors = _merged(base, adapter)
        if not original:
            merged = merged.to(torch.bfloat16)  # sixteen bits, whatever the training computed in
    with staged(request.output) as folder:
        with stage("writing"), quiet_transformers():
            merged.save_pretrained(folder, max_shard_size=_SHARD)
            base.tokenizer.save_pretrained(folder)
        del merged, base
        with stage("measuring what was written"):
            written = load_base(folder, plain)
            divergence = _divergence(written, rows, expected) if rows else None
            if rows:
                scores["merged"] = _score(written, rows)
            files = sorted(folder.glob("*.safetensors"))
            size = sum(file.stat().st_size for file in files)
    back = bool(rows) and _is_back(scores["adapter"], scores["merged"], request.config.stop.target)
    report = MergeReport(describe(request), tensors, size, len(files), divergence, scores, back)
    _show(report, request.output)
    return report


def _before(request: MergeRequest, spec: LoadSpec) -> tuple[list[Example], dict[str, SetScore], list[Tensor]]:
    """The bad rows, their scores under base and adapter, and the adapter's hidden states (T, D) of each row."""
    with stage("loading the base with the adapter"):
        policy = Policy.load(load_base(request.model.folder, spec), request.run.adapter)
    rows = _rows(request, policy)
    if not rows:
        return [], {}, []
    limit = request.config.train.max_tokens
    with stage("measuring the adapter"):
        with policy.reference():
            base = aggregate(score_rows(policy, rows, limit))
        scores = {"base": base, "adapter": aggregate(score_rows(policy, rows, limit))}
        return rows, scores, [_hidden(policy, row).cpu() for row in rows]


def _merged(base: Base, adapter: Path) -> tuple[Any, int]:
    """The model with the update added to its weights, and how many adapter tensors went into it.

    Raises AdapterError for an adapter of another model, ModelError unless each tensor was used exactly once.
    """
    policy = Policy.load(base, adapter)  # each tensor of the file has its place, and each place its tensor
    policy.model.merge_adapter(safe_merge=True)
    merged = [name for layer in policy.layers for name in layer.merged_adapters]
    tensors = len(adapter_tensors(adapter))
    if len(merged) != len(policy.layers) or 2 * len(merged) != tensors:
        message = f"{len(policy.layers)} layers, {len(merged)} merges, {tensors} tensors"
        raise ModelError(
            f"an adapter tensor was not used exactly once: {message}", where=str(adapter), hint="report it"
        )
    model = policy.model.unload()
    model.config.use_cache = True
    return model, tensors


@torch.no_grad()
def _hidden(lm: LanguageModel, row: Example) -> Tensor:
    batch = collate([row], ALL, lm.tokenizer.pad_token_id).to(lm.device)
    return batch.pick(lm.hidden(batch))


def _divergence(written: Base, rows: Sequence[Example], expected: Sequence[Tensor]) -> float:
    """KL(adapter on its base || merged), nats per token: the head is the same in both."""
    kls = [
        token_kl(_hidden(written, row), h.to(written.device), written.head).double()
        for row, h in zip(rows, expected, strict=True)
    ]
    return float(torch.cat(kls).mean())


def _score(lm: LanguageModel, rows: Sequence[Example]) -> SetScore:
    return aggregate(score_rows(lm, rows, 2048))


def _is_back(adapter: SetScore, merged: SetScore, target: float) -> bool:
    """Said again word for word, or probable again: by more than rounding explains."""
    probable = merged.probability > max(target, 2 * adapter.probability)
    return merged.exact_match > adapter.exact_match + 0.05 or probable


def _show(report: MergeReport, output: Path) -> None:
    gib = report.weight_bytes / 2**30
    say(f"{report.tensors} adapter tensors, each used once; {report.shards} files, {gib:.2f} GiB in {output}")
    if report.divergence is not None:
        columns = [Column("bad answers", right=False), *(Column(name) for name in report.scores)]
        rows = [
            ["exact match", *(f"{100 * s.exact_match:.1f} %" for s in report.scores.values())],
            ["probability", *(f"{s.probability:.4f}" for s in report.scores.values())],
        ]
        table("What the merged model says", columns, rows)
        say(f"KL(adapter || merged): {report.divergence:.5f} nats/token")
    say(f'next: AutoModelForCausalLM.from_pretrained("{output}")', style="bold")


def _rows(request: MergeRequest, policy: Policy) -> list[Example]:
    if request.bad is None:
        warn("the bad file is not where the run found it: nothing is measured (give --bad)")
        return []
    stored = request.run.record.get("data", {}).get("template")
    asked = request.config.data.template
    template = Template(**stored) if stored else choose_template(policy.tokenizer, asked, request.bad)
    encoded = encode(request.bad, policy.tokenizer, template, request.config.data.max_length)
    return list(encoded.examples[: request.config.stop.table_rows])
