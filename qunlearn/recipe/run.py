"""`qunlearn recipe run`: run the stages in their order, each once."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from qunlearn.recipe.fetch import check_given
from qunlearn.recipe.progress import LEDGER, Ledger, key_of
from qunlearn.recipe.stages import FORGET, STAGES, Order
from qunlearn.utils.console import clean, out, say
from qunlearn.utils.lock import locked
from qunlearn.utils.output import real


def default_folder(recipe: str, model: str, bad: Path | None = None) -> Path:
    """Return runs/RECIPE-MODEL-BAD, of the recipe's own data without BAD, in letters that every file system takes."""
    parts = [Path(model).name, *([bad.name.split(".")[0]] if bad is not None else [])]
    plain = (re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-.")[:96] or "x" for part in parts)
    return Path("runs") / "-".join([recipe, *plain])


def run(order: Order, *, to_stdout: bool) -> dict[str, Any]:
    """Carry out what is not done yet; returns what the stages file holds. Raises QunlearnErrors."""
    # Results hold paths, and a later call may come from another folder.
    order = replace(order, folder=real(order.folder))
    check_given(order.given, order.folder)
    story = {"recipe": order.recipe.name, "model": order.settings.model.name}
    if order.given.bad is not None:  # another file's results would take the place of this one's
        story["bad"] = os.path.realpath(order.given.bad)
    Ledger.open(order.folder, story).begin()  # refuses a folder of something else, and makes a new one
    with locked(order.folder, order.folder):
        return _run(order, Ledger.open(order.folder, story), to_stdout=to_stdout)


def _run(order: Order, ledger: Ledger, *, to_stdout: bool) -> dict[str, Any]:
    key, going = "", False
    for i, stage in enumerate(STAGES, 1):
        key = key_of(key, stage.name, stage.inputs(order))
        title = f"[{i}/{len(STAGES)}] {stage.title}"
        if not going and ledger.done(stage.name, key, stage.outputs):
            say(f"{title}: done before, in {ledger.stages[stage.name]['seconds']:.1f} s", style="dim")
            continue
        if not going:
            ledger.begin()
            ledger.drop([later.name for later in STAGES[i - 1 :]])
            going = True
        say(f"\n{title}", style="bold")
        started = time.monotonic()
        result = stage.work(order)
        ledger.keep(stage.name, key, result, time.monotonic() - started)
    told = ledger.stages[STAGES[-1].name]["result"]
    total = sum(stage["seconds"] for stage in ledger.stages.values())
    say(f"\n{total:.0f} s in all stages, written down in {order.folder / LEDGER}")
    if to_stdout:
        out().print(clean(f"{told['line']}\n{told['audit']}\nreport: {told['report']}"), markup=False)
    result = {"status": told["verdict"]["level"], "folder": str(order.folder), "seconds": round(total, 1), **told}
    forgot = next((stage["result"] for name, stage in ledger.stages.items() if name == FORGET), None) or {}
    return {**result, "not_reached": forgot.get("not_reached") or []}
