"""`qunlearn eval`: the measures of the before/after table on any files, with and without an adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qunlearn import __version__
from qunlearn.console import say, stage
from qunlearn.data.tokenize import Template, choose_template, encode
from qunlearn.evaluate.request import EvalRequest
from qunlearn.evaluate.suite import Scores, score_sets, show_sets, summaries, verdicts
from qunlearn.model.device import describe_device
from qunlearn.model.load import Base, LoadSpec, load_base
from qunlearn.model.policy import Policy


def evaluate(request: EvalRequest, *, quant: str | None, device: str, rows: int, to_stdout: bool) -> dict[str, Any]:
    """Score every set under the base and, where there is one, under the adapter. Raises QunlearnErrors."""
    m, limit = request.config.model, request.config.train.max_tokens
    spec = LoadSpec(quant or m.quant, m.double_quant, device, m.trust_remote_code)
    with stage("loading the model"):
        base = load_base(request.model.folder, spec)
        policy = Policy.load(base, request.run.adapter) if request.run else None
    sets, templates = {}, {}
    for name, dataset in request.sets.items():
        template = _template(request, base, name)
        encoded = encode(dataset, base.tokenizer, template, request.config.data.max_length)
        sets[name], templates[name] = encoded.examples[:rows], template.name
    named: list[tuple[str, Scores]] = []
    with stage("measuring"):
        if policy is None:
            named.append(("base", score_sets(base, sets, limit)))
        else:
            with policy.reference():
                named.append(("base", score_sets(policy, sets, limit)))
            named.append(("adapter", score_sets(policy, sets, limit)))
    say(f"{base.quantization} on {describe_device(base.device)}; templates: {templates}")
    show_sets(f"{request.model.source.asked}", named, to_stdout=to_stdout)
    result: dict[str, Any] = {
        "model": request.model.source.asked,
        "adapter": str(request.run.adapter) if request.run else None,
        "quantization": base.quantization,
        "files": {name: {"path": d.path, "sha256": d.sha256} for name, d in request.sets.items()},
        "templates": templates,
        "scores": {name: summaries(scores) for name, scores in named},
        "qunlearn": __version__,
    }
    if "forget" in sets:
        result["verdicts"] = {name: verdicts(scores["forget"]) for name, scores in named}
    return result


def _template(request: EvalRequest, base: Base, name: str) -> Template:
    """The run's own template where nothing else was asked for; each plain-text file stays plain."""
    dataset = request.sets[name]
    stored = request.run.record.get("data", {}).get("template") if request.run else None
    if request.template is None and stored and dataset.shape != "text":
        return replace(Template(**stored), why="as in the run")
    return choose_template(base.tokenizer, request.template or request.config.data.template, dataset)
