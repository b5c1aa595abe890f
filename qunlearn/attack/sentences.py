"""The verdict of an audit in words, which claim no more than the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qunlearn.attack.catalog import PREFIX_SEARCH
from qunlearn.attack.cells import CONTROL, ORIGINAL, UNLEARNED

LEAK, CLEAN, INCONCLUSIVE, BLIND, SHOWN = "leak", "no lead", "inconclusive", "blind", "shown"
_OF_GUARD = ", guard off"


def sentences(
    rows: Sequence[Mapping[str, Any]],
    baseline: str,
    missing: Mapping[str, str],
    off: Sequence[Mapping[str, Any]] = (),
    merged: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """Return the verdict in words. None of them says that anything is erased: no attack can show that.

    `off`: the rows of the model with its guard off; `merged`: of what `merge` made of it.
    """
    of: dict[str, list[str]] = {v: [r["title"] for r in rows if r["verdict"] == v] for v in (LEAK, INCONCLUSIVE)}
    asked = [r for r in rows if r["family"] in ("formats", "prompts")]
    suppressed = [r for r in asked if r["verdict"] == CLEAN]
    blind = [r["title"] for r in asked if r["verdict"] == BLIND]
    said = []
    if of[LEAK]:
        worst = max((r for r in rows if r["verdict"] == LEAK), key=lambda r: r["lead"]["mean"])
        lead = 100 * worst["lead"]["mean"]
        said.append(
            f"Found out by: {', '.join(of[LEAK])}. The worst, {worst['title']}, is {lead:.0f} points above its control."
        )
    else:
        led = [r for r in rows if r["lead"] and r["verdict"] == CLEAN]
        most = max(led, key=lambda r: r["lead"]["mean"], default=None)
        largest = "" if most is None else f"; the largest lead, {most['title']}, is {_points(most['lead'])}"
        said.append(f"No attack that was run beats its control by more than chance{largest}.")
    if suppressed:
        ns = sorted({r["lead"]["n"] for r in suppressed})
        told = f"{ns[0]} to {ns[-1]}" if len(ns) > 1 else f"{ns[0]}"
        said.append(f"Suppressed, as far as {told} facts tell, in: {', '.join(r['title'] for r in suppressed)}.")
    if blind:
        said.append(f"Says nothing, for the original answers no more there than the control: {', '.join(blind)}.")
    for row in rows:
        if curve := row.get("leak_at"):
            told = ", ".join(f"leak@{k} {_percent(found)}" for k, found in curve.items())
            said.append(f"Of answers drawn at temperature 1: {told}.")
        if "privacy_leakage" in row:
            said.append(f"Privacy leakage, by {row['title']}: {100 * row['privacy_leakage']:.0f} %.")
    by_format = next((r for r in rows if (r["family"], r["format"]) == ("relearning", "format") and r["lead"]), None)
    said += [_of_arm(r, by_format) for r in rows if r.get("sizes")]
    said += _of_cost(rows)
    rounded = [r for r in rows if r["family"] == "weights" and r["format"].startswith("nf4") and r["lead"]]
    if rounded:
        back = [r["title"] for r in rounded if r["verdict"] == LEAK]
        most = max(100 * r["lead"]["high"] for r in rounded)
        told = (
            f"Merged and rounded to nf4: no return told from chance; up to {max(0.0, most):.0f} points not ruled out."
        )
        said.append(f"Comes back: {', '.join(back)}." if back else told)
    if power := smallest_leads(rows):
        told = ", ".join(f"{family} {100 * lead:.0f}" for family, lead in power.items())
        said.append(f"At 80 % power a leak of so many points would have been found, by family: {told}.")
    if off:
        said.append(_of_guard(off))
    if merged:
        back = [row["title"] for row in merged if row["verdict"] == LEAK]
        said.append(f"Merged, found out by: {', '.join(back)}." if back else "Merged, no attack beats its control.")
    if baseline != CONTROL:
        said.append(
            "The control is a surrogate, placebo facts that no model was taught: these claims are weaker than beside a "
            "model that never saw the data (--control)."
        )
    searched = any(row["format"] == PREFIX_SEARCH for row in rows)
    if missing:
        said.append("Not tested: " + "; ".join(f"{name} ({why})" for name, why in missing.items()) + ".")
    return [
        *said,
        *([] if searched else ["Not tested: prefix search (--only prefix-search)."]),
        "Not tested in this version: GGUF files but that of --merged.",
        "Suppression is no proof of removal.",
    ]


def _percent(found: Mapping[str, Any]) -> str:
    """Return a share in percent, with its interval where there is one."""
    text = f"{100 * found['mean']:.0f} %"
    return text if found["low"] is None else f"{text} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def _points(found: Mapping[str, Any]) -> str:
    return _percent(found).replace(" %", " points", 1)


def _of_cost(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what it cost, against the original: answers to keep, refusals, and how likely the rows are."""
    told = []
    for row in rows:
        if row["family"] != "collateral":
            continue
        answers, refused, perplexity = row["shares"], row.get("refused", {}), row.get("perplexity", {})
        parts = []
        if answers.get(UNLEARNED) and answers.get(ORIGINAL):
            parts.append(f"{100 * answers[UNLEARNED]['mean']:.0f} % ({100 * answers[ORIGINAL]['mean']:.0f})")
        if {UNLEARNED, ORIGINAL} <= refused.keys() and max(refused[UNLEARNED], refused[ORIGINAL]) > 0:
            parts.append(f"refused {100 * refused[UNLEARNED]:.0f} % ({100 * refused[ORIGINAL]:.0f})")
        if {UNLEARNED, ORIGINAL} <= perplexity.keys():
            parts.append(f"perplexity x {perplexity[UNLEARNED] / perplexity[ORIGINAL]:.3f}")
        if parts:
            told.append(f"{row['title']} {', '.join(parts)}")
    return [f"Answers that should stay (the original's): {'; '.join(told)}."] if told else []


def smallest_leads(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the smallest lead that each family could have seen, by its most sensitive attack; without those families
    that could have seen none."""
    found: dict[str, float] = {}
    for row in rows:
        lead = row.get("detectable")
        if lead is not None:
            found[row["family"]] = min(lead, found.get(row["family"], lead))
    return found


def _of_guard(off: Sequence[Mapping[str, Any]]) -> str:
    leaks = [row["title"].removesuffix(_OF_GUARD) for row in off if row["verdict"] == LEAK]
    if leaks:
        return f"Guarded: the weights still know. With the guard off they are found out by: {', '.join(leaks)}."
    return "Guarded; with the guard off no attack on the weights that was run beats its control by more than chance."


def _of_arm(row: Mapping[str, Any], by_format: Mapping[str, Any] | None) -> str:
    """Say what came of a relearning arm: by the size that stands for it; of one that is not judged, by every size.

    `by_format`: the arm that teaches the format alone. What that brings back, half of the facts need not.
    """
    if "n" not in row:
        sizes = (f"{s['n']}: {100 * s['after']:.0f} % ({100 * s['control_after']:.0f})" for s in row["sizes"])
        return f"Relearning, {row['title']}, answers given after so many examples (the control): {', '.join(sizes)}."
    size = next(s for s in row["sizes"] if s["n"] == row["n"])
    cost = f"{size['n']} examples ({size['tokens']} tokens, {size['bits']:.0f} bits)"
    excess, control = size["excess"], f"the control gains {100 * size['control_gain']:.0f} points"
    if row["verdict"] == INCONCLUSIVE:
        return f"Relearning, {row['title']}: inconclusive, for {control} of a gap of {100 * row['gap']:.0f}."
    if row["verdict"] == BLIND:
        kept = f"{100 * row['original_after']:.0f} %"
        return (
            f"Relearning, {row['title']}: says nothing, for the original itself gives only {kept} of the answers then."
        )
    if row["verdict"] == SHOWN:
        return f"Relearning, {row['title']}: nothing to bring back, all of it is still answered."
    shown = f"{_points(excess)} beyond the control"
    if "original_after" not in row:
        control += "; how much it destroys is not known without --original"
    found = "recoverable" if row["verdict"] == LEAK else "no recovery that is told from chance"
    if row["verdict"] == LEAK and row["format"] == "half" and by_format is not None:
        shown += f", {_points(by_format['lead'])} by the format alone"
    return f"Relearning, {row['title']}: {found}, with {cost}: {shown}; {control}."
