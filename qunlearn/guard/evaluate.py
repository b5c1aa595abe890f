"""`qunlearn guard eval`: the gate's errors, its robustness and its cost; what the model answers is `eval --guard`'s."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qunlearn.data.records import Dataset, read_dataset
from qunlearn.data.tokenize import choose_template, encode_record
from qunlearn.errors import ConfigError
from qunlearn.evaluation.results import is_forget
from qunlearn.guard.guard import Guard
from qunlearn.guard.robustness import cost, gate_errors, robustness, show_gate
from qunlearn.hub.checked import check_model
from qunlearn.hub.download import resolve_model
from qunlearn.model.load import LoadSpec, load_base
from qunlearn.utils.console import say, stage


def evaluate_gate(
    folder: Path, model: str, files: Mapping[str, Path], quant: str, device: str, *, trust: bool, to_stdout: bool
) -> dict[str, Any]:
    """Measure a guard's gate on files by split; returns numbers, no texts. Raises QunlearnErrors."""
    if not files:
        hint = "give at least one of --forget, --paraphrase, --retain, --holdout, --general, or --data"
        raise ConfigError("nothing to measure", where="guard eval", hint=hint)
    guard = Guard.open(folder)
    sets = {name: read_dataset(path, role=f"--{name}") for name, path in files.items()}
    checked = check_model(resolve_model(model), trust)
    with stage("loading the model"):
        base = load_base(checked.folder, LoadSpec(quant, device=device, trust_remote_code=trust))
    attachment = guard.attachment(base.model, base.tokenizer)
    errors = gate_errors(attachment, sets)
    normal = [r for name, d in sets.items() if not is_forget(name) for r in d.records]
    attacked: Dataset | None = sets.get("forget") or sets.get("paraphrase")
    attacks = robustness(attachment, attacked.records, normal) if attacked is not None else {}
    some = next(iter(sets.values()))
    template = choose_template(base.tokenizer, "auto", some)
    example = encode_record(some.records[0], base.tokenizer, template)
    timed = cost(base, attachment, example.input_ids[: max(2, example.probe)])
    show_gate(errors, attacks, to_stdout=to_stdout)
    say(f"the gate takes {timed['gate_ms']:.1f} ms a prompt: {100 * timed['share']:.1f} % of a 64-token answer")
    return {"guard": str(folder), "splits": errors, "attacks": attacks, "cost": timed}
