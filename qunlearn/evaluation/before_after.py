"""Score named sets of rows, and print the before/after table of a run or merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qunlearn.data.tokenize import Example
from qunlearn.evaluation.metrics import VERDICTS, RowScore, SetScore, aggregate
from qunlearn.evaluation.scores import score_each
from qunlearn.model.language_model import LanguageModel
from qunlearn.utils.console import Column, say, table
from qunlearn.utils.text import shortened

Scores = Mapping[str, Sequence[RowScore]]


def score_sets(lm: LanguageModel, sets: Mapping[str, Sequence[Example]], max_tokens: int) -> Scores:
    """Every row of every set."""
    return dict(zip(sets, score_each(lm, [*sets.values()], max_tokens), strict=True))


def summaries(scores: Scores) -> dict[str, dict[str, Any]]:
    """Aggregates as plain numbers, for records; what a set does not have is left out."""
    found = {name: asdict(aggregate(rows)) for name, rows in scores.items()}
    return {name: {k: v for k, v in of_set.items() if v is not None} for name, of_set in found.items()}


def show_sets(title: str, named: Sequence[tuple[str, Scores]], *, to_stdout: bool = False) -> None:
    """One line per set and measure, one column per model (before, after, merged, …)."""
    columns = [Column("", right=False), Column("", right=False), *(Column(name) for name, _ in named)]
    rows: list[list[str]] = []
    for name in named[0][1]:
        scores = [aggregate(sets[name]) for _, sets in named]
        label = f"{name} ({scores[0].n})"
        measures = _MEASURES | (_OF_SPECIFIC if all(s.specific_probability is not None for s in scores) else {})
        for measure, text in measures.items():
            rows.append([label, measure, *(text(score) for score in scores)])
            label = ""
    table(title, columns, rows, to_stdout=to_stdout)


def show_samples(prompts: Sequence[str], before: Sequence[RowScore], after: Sequence[RowScore]) -> None:
    """A few answers side by side, each with its verdict."""
    for prompt, old, new in zip(prompts, before, after, strict=True):
        say(f"  {shortened(prompt)}")
        say(f"    before  {shortened(old.output)}", style="dim")
        say(f"    after   {shortened(new.output) or '(nothing)'}   [{new.verdict}]")


def verdicts(rows: Sequence[RowScore]) -> dict[str, int]:
    """Return how many rows are forgotten, refused, gibberish, or still leak."""
    counts = dict.fromkeys(VERDICTS, 0)
    for row in rows:
        counts[row.verdict] += 1
    return counts


def _perplexity(score: SetScore) -> str:
    return f"{score.perplexity:.2f}" if score.perplexity < 1e5 else f"{score.perplexity:.1e}"


_MEASURES: dict[str, Callable[[SetScore], str]] = {
    "exact match": lambda score: f"{100 * score.exact_match:.1f} %",
    "probability": lambda score: f"{score.probability:.4f}",
    "perplexity": _perplexity,
    "sentences": lambda score: f"{100 * score.sentences:.1f} %",
}
_OF_SPECIFIC: dict[str, Callable[[SetScore], str]] = {
    "specific tokens": lambda score: f"{score.specific_probability:.4f}",
    "extraction": lambda score: f"{score.extraction_strength:.4f}",
}
