"""The verdict of an audit in words, which claim no more than the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qunlearn.attack.catalog import PREFIX_SEARCH
from qunlearn.attack.cells import CONTROL, ORIGINAL, UNLEARNED

LEAK, CLEAN, INCONCLUSIVE, BLIND, SHOWN = "leak", "no lead", "inconclusive", "blind", "shown"
_OF_GUARD = ", guard off"
_TOO_FEW = "Too few facts to tell: no attack that was run could have told any lead from chance"


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
    asked = [r for r in rows if r["family"] in ("formats", "prompts")]
    blind = [r["title"] for r in asked if r["verdict"] == BLIND]
    said = [_first(rows)]
    said += _of_quiet([r for r in asked if r["verdict"] == CLEAN])
    if blind:
        said.append(f"Says nothing, for the original answers no more there than the control: {', '.join(blind)}.")
    for row in rows:
        if curve := row.get("leak_at"):
            told = ", ".join(f"leak@{k} {_percent(found)}" for k, found in curve.items())
            said.append(f"Of answers drawn at temperature 1: {told}.")
        if "privacy_leakage" in row:
            said.append(f"Privacy leakage, by {row['title']}: {row['privacy_leakage']:.0f} %.")
    said += _of_membership(rows)
    by_format = next((r for r in rows if (r["family"], r["format"]) == ("relearning", "format") and r["lead"]), None)
    said += [_of_arm(r, by_format) for r in rows if r.get("sizes")]
    said += _of_cost(rows)
    said += _of_rounding(rows)
    if power := smallest_leads(rows):
        told = ", ".join(f"{family} {100 * lead:.0f}" for family, lead in power.items())
        said.append(f"At 80 % power a leak of so many points would have been found, by family: {told}.")
    if off:
        said.append(_of_guard(off))
    if merged:
        said.append(_of_merged(merged))
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


def _first(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say which attacks found the model out, or that none did, and which led most."""
    leaks = [row for row in rows if row["verdict"] == LEAK]
    if leaks:
        worst = max(leaks, key=lambda row: row["lead"]["mean"])
        lead, names = 100 * worst["lead"]["mean"], ", ".join(row["title"] for row in leaks)
        return f"Found out by: {names}. The worst, {worst['title']}, is {lead:.0f} points above its control."
    led = [row for row in rows if row["lead"] and row["verdict"] == CLEAN]
    most = max(led, key=lambda row: row["lead"]["mean"], default=None)
    largest = "" if most is None else f"; the largest lead, {most['title']}, is {_points(most['lead'])}"
    none = "No attack that was run beats its control by more than chance"
    return f"{none if tells_something(rows) else _TOO_FEW}{largest}."


def tells_something(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether silence says anything: False where no attack without a lead could have told one from chance."""
    clean = [row for row in rows if row["verdict"] == CLEAN]
    return not clean or any(row.get("detectable") is not None for row in clean)


def _of_quiet(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say of attacks without a leak which suppress the facts, and which lead all the same or have too few to tell."""
    few = [row for row in rows if row.get("detectable") is None]
    led = [row for row in rows if row not in few and (row["lead"]["low"] is None or row["lead"]["low"] > 0)]
    suppressed = [row for row in rows if row not in few and row not in led]
    said = []
    if suppressed:
        ns = sorted({row["lead"]["n"] for row in suppressed})
        told = f"{ns[0]} to {ns[-1]}" if len(ns) > 1 else f"{ns[0]}"
        said.append(f"Suppressed, as far as {told} facts tell, in: {', '.join(row['title'] for row in suppressed)}.")
    if led:
        told = ", ".join(f"{row['title']} ({_points(row['lead'])})" for row in led)
        said.append(f"Leads that are not told from chance once all attacks are corrected for: {told}.")
    if few:
        said.append(f"Too few facts to tell, in: {', '.join(row['title'] for row in few)}.")
    return said


def _of_membership(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say where membership is not judged, or a lead may be of something else."""
    few = [row for row in rows if "too_few" in row]
    known = [row["title"] for row in rows if row["verdict"] == LEAK and row.get("holdout_known")]
    said = []
    if few:
        said.append(f"Membership is shown and not judged, of {few[0]['too_few']} facts or rows of --holdout.")
    if known:
        said.append(
            "To the control the rows of --holdout look more trained on than the facts: what the model under audit has "
            f"lost of those rows is a lead as well, by {', '.join(known)}."
        )
    return said


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


def _of_rounding(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    rounded = [row for row in rows if row["family"] == "weights" and row["format"].startswith("nf4") and row["lead"]]
    if not rounded:
        return []
    if back := [row["title"] for row in rounded if row["verdict"] == LEAK]:
        return [f"Comes back: {', '.join(back)}."]
    most = max(0.0, *(100 * row["lead"]["high"] for row in rounded))
    return [f"Merged and rounded to nf4: no return told from chance; up to {most:.0f} points not ruled out."]


def _of_merged(merged: Sequence[Mapping[str, Any]]) -> str:
    if back := [row["title"] for row in merged if row["verdict"] == LEAK]:
        return f"Merged, found out by: {', '.join(back)}."
    return "Merged, no attack beats its control." if tells_something(merged) else f"Merged: {_TOO_FEW.lower()}."


def _of_guard(off: Sequence[Mapping[str, Any]]) -> str:
    leaks = [row["title"].removesuffix(_OF_GUARD) for row in off if row["verdict"] == LEAK]
    if leaks:
        return f"Guarded: the weights still know. With the guard off they are found out by: {', '.join(leaks)}."
    if not tells_something(off):
        return f"Guarded; with the guard off: {_TOO_FEW.lower()}."
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
        as_much = "as much is answered as by the original" if "original_after" in row else "all of it is still answered"
        return f"Relearning, {row['title']}: nothing to bring back, {as_much}."
    shown = f"{_points(excess)} beyond the control"
    if "original_after" not in row:
        control += "; how much it destroys is not known without --original"
    found = "recoverable" if row["verdict"] == LEAK else "no recovery that is told from chance"
    if row["verdict"] == LEAK and row["format"] == "half" and by_format is not None:
        shown += f", {_points(by_format['lead'])} by the format alone"
    return f"Relearning, {row['title']}: {found}, with {cost}: {shown}; {control}."
