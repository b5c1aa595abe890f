"""Say what a report does not show, from what was and was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qunlearn.evaluation.results import RETRAINED, after, is_forget
from qunlearn.report.read import Story


def limits(story: Story) -> list[str]:
    """One sentence each, the general ones last."""
    result = story.main
    found = (
        _of_evaluation(result) if result else ["Nothing but the training's own rows was measured: run `qunlearn eval`."]
    )
    normal: Mapping[str, Any] = story.record.get("data", {}).get("normal", {})
    if normal.get("self_made"):
        found.append("The normal data was made by the model itself: what it did not think of was not protected.")
    if story.record.get("status") not in (None, "done"):
        why = "; ".join(map(str, story.record.get("not_reached") or ()))
        found.append(f"The run did not end as it should: {story.record['status']}{f' ({why})' if why else ''}.")
    return [
        *found,
        "Answers were greedy. Sampling many answers may bring back what the most probable one does not show.",
        *(
            []
            if story.audit
            else ["No attack was tried: no relearning from a few rows, no adversarial prompts, no other language."]
        ),
        "What was measured is suppression in the forms tested, no proof that the knowledge is gone from the weights.",
    ]


def _of_evaluation(result: Mapping[str, Any]) -> list[str]:
    splits, found = list(result["files"]), []
    for split in filter(is_forget, splits):
        found_leaks = result["measures"].get(split, {}).get("leaks", {})
        leaks = found_leaks.get(after(found_leaks))
        if leaks and leaks["mean"] == 0 and leaks["high"]:
            where = "the rows to forget" if split == "forget" else f"the rows of {split!r}"
            high = f"{100 * leaks['high']:.0f} %"
            found.append(f"None of {leaks['n']} leaks in {where}; of more such rows up to {high} still might.")
    absent = {
        "paraphrase": "The same was not asked in other words: forgetting may hang on the wording.",
        "holdout": "No neighbours that were never given were measured: the damage next to the forget rows is unknown.",
        "general": "Nothing general was measured: the damage far from the forget rows is unknown.",
    }
    found += [text for split, text in absent.items() if split not in splits]
    if RETRAINED not in result["scores"]:
        found.append("There was no model that never saw the data: how such a model would answer is unknown.")
    precision = result.get("quantization", "?")
    found.append(f"Measured as {precision}. In another precision, or merged, it may answer otherwise.")
    return found
