"""Write the model card of an adapter: what was done and measured, and nothing of what was forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qunlearn.config.settings import Config

_SUPPRESSES = (
    "It suppresses what it was trained on; it is no proof that the knowledge is gone, and other quantisations of the "
    "base, or fine-tuning, may bring some of it back."
)
_UNTOUCHED = "It is the untouched adapter, that of step 0, before any training: it changes nothing, nothing is gone."


def model_card(config: Config, record: Mapping[str, Any]) -> str:
    """Markdown with the front matter the hub reads. No text of the forget set is in it."""
    model, training = record["model"], record["training"]
    why = "; ".join(record["not_reached"])
    untouched = training["best"]["step"] == 0
    missed = [f"**The run did not reach its target**: {why}.", ""] if why else []
    lines = [
        "---",
        f"base_model: {_yaml(model['base_id'])}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [unlearning, lora, qunlearn]",
        "---",
        "",
        "# An unlearning adapter",
        "",
        f"LoRA (r = {config.lora.r}, alpha = {config.lora.alpha}) on `{model['base_id']}`, loaded as "
        f"{model['quantization']}, trained with `{config.objective.name}` (eps1 = {config.objective.eps1:g}, "
        f"eps3 = {config.objective.eps3:g}) for {training['steps']} steps; "
        f"kept: step {training['best']['step']}. Stopped because: {record['stop_reason']}.",
        "",
        *missed,
        *_table(record),
        f"Drift on held-back normal data: {training['best']['drift']:.4f} nats per token.",
        "",
        f"Load it with `peft.PeftModel.from_pretrained(base, FOLDER)`. {_UNTOUCHED if untouched else _SUPPRESSES}",
        "",
        f"Made with qunlearn {record['versions']['qunlearn']}.",
    ]
    return "\n".join(lines) + "\n"


def _table(record: Mapping[str, Any]) -> list[str]:
    before, after = record["before"], record["after"]
    if not after:
        return ["The run was not measured to its end.", ""]
    rows = ["| set | exact match | probability | perplexity |", "|---|---|---|---|"]
    for name, old in before.items():
        new = after[name]
        cells = [
            f"{100 * old['exact_match']:.1f} % → {100 * new['exact_match']:.1f} %",
            f"{old['probability']:.3f} → {new['probability']:.3f}",
            f"{old['perplexity']:.2f} → {new['perplexity']:.4g}",
        ]
        rows.append(f"| {name} ({old['n']} rows) | {' | '.join(cells)} |")
    return [*rows, ""]


def _yaml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
