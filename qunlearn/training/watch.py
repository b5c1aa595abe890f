"""Measure while training, every few steps, where asked for: greedy answers on the forget set and on what stays.

It is done between two steps: what is measured stands in metrics.jsonl beside the step it was measured after. Nothing
of the training may hang on it, so answers are greedy, dropout is off, and no random number is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.data.tokenize import Example
from qunlearn.evaluation.metrics import texts, verdicts
from qunlearn.evaluation.scores import score_rows
from qunlearn.model.policy import Policy

MEASURED = "measured"  # the key in an event


@dataclass(frozen=True)
class Watch:
    """Rows by name that are looked at every `stop.eval_every` steps (0: never), and at the first and the last."""

    policy: Policy
    sets: Mapping[str, Sequence[Example]]
    config: Config

    def due(self, step: int) -> bool:
        every, train = self.config.stop.eval_every, self.config.train
        return every > 0 and (step % every == 0 or step in (train.usual_steps, train.most_steps))

    def see(self, event: Mapping[str, Any]) -> Mapping[str, Any]:
        """The event of a step, with what was measured after it where that is due."""
        if "max_tokens" in event or not self.due(event["step"]):
            return event
        with self.policy.measured():
            found = {
                name: look(self.policy, rows, self.config.train.pass_tokens) for name, rows in self.sets.items() if rows
            }
        return {**event, MEASURED: found}

    def follow(self, event: Mapping[str, Any]) -> None:
        """Take part in what the main process measures after a step."""
        self.see(event)


def look(policy: Policy, examples: Sequence[Example], max_tokens: int) -> dict[str, float]:
    """Means over rows of the cheap measures, as `qunlearn eval` defines them, and the number of rows."""
    rows = [
        {
            "exact_match": texts.exact_match(row.output, row.answer),
            "leaks": float(verdicts.leaks(row.output, row.answer, row.prompt)),
            "probability": row.probability,
            "extraction_strength": row.stats.extraction,
        }
        for row in score_rows(policy, examples, max_tokens)
    ]
    return {"n": len(rows), **{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}}


def shown(found: Mapping[str, Mapping[str, float]]) -> str:
    """One short piece of a progress line: exact matches by set."""
    return ", ".join(f"{name} {100 * values['exact_match']:.0f} %" for name, values in found.items())
