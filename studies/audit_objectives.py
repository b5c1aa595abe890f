"""Which objectives hide and which forget: each trained on a world by its own defaults, then audited.

    python studies/audit_objectives.py run --work FOLDER [--world NAME] [--objectives NAME …] [--seed N] [--budget NAME]
    python studies/audit_objectives.py table

The control is the world's gold model, which never saw the facts. `smollm2` is SmolLM2-135M-Instruct and what it says of
people, with short runs that a CPU can make; beside it are placebo facts. "nothing" is the base itself, audited as if it
had unlearned them: what an audit finds where everything is left. A finished audit is a line of
studies/audit_objectives.jsonl and is not run again; the runs and their audits stay in the work folder. What one of
these audits found out about the original is not asked again for another objective.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401 - before what it makes importable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import _smollm_facts as smollm_facts
import _smollm_model as smollm
from _report import say
from _world_run import REPOSITORY, commit
from qunlearn.config.objective import OBJECTIVE_NAMES
from qunlearn.utils.file_names import ADAPTER
from qunlearn.utils.files import sha256_of
from qunlearn.utils.output import CONTENTS, MARK
from qunlearn.utils.staging import staging_folder
from worlds import world_named

RESULTS = Path(__file__).with_name("audit_objectives.jsonl")
NOTHING, SMOLLM = "nothing", "smollm2"
_SHORT_RUN = (
    *("--own-share", "0", "--reworded", "12"),
    *("--steps", "80", "--batch-size", "4", "--normal-batch-size", "4"),
)
_JUDGED = ("leak", "no lead")
_FURTHER = ("layers.lens", "layers.probe", "weights.nf4", "weights.nf4-original")
_ENDED_S = 2 * 3600  # seconds after which a command that never ends is ended


@dataclass(frozen=True)
class Ground:
    """What is trained and audited: a model, its rows by split, a model that never saw the facts or None, and further
    flags of `forget`."""

    name: str
    model: Path
    control: Path | None
    folder: Path
    further: Sequence[str] = ()

    def given(self, *splits: str) -> list[object]:
        """Return a flag and its file for each split that there is."""
        there = [(split, self.folder / f"{split}.jsonl") for split in splits]
        return [x for split, file in there if file.is_file() for x in (f"--{split}", file)]


def ground_of(name: str) -> Ground:
    """Return a world of the proving ground, drawn again where its name ends with a number, or SmolLM2. Raises KeyError,
    and FileNotFoundError where SmolLM2 is not installed."""
    if name != SMOLLM:
        folder = world_named(name).folder
        return Ground(name, folder / "model", folder / "gold", folder)
    model, folder = smollm.model_folder(), smollm_facts.facts_folder()
    if model is None or folder is None:
        raise FileNotFoundError(smollm.INSTALL)
    return Ground(name, model, None, folder, _SHORT_RUN)


def run_all(ground: Ground, names: Sequence[str], seed: int, budget: str, work: Path, path: Path) -> None:
    """Train and audit what has no line yet, one after the other."""
    for number, name in enumerate(names, 1):
        if is_done(read_results(path), ground.name, name, seed, budget):
            continue
        found = measure(ground, name, seed, budget, work)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found, separators=(",", ":")) + "\n")
        say(f"{number}/{len(names)} {name}: {found.get('run', '')}, {', '.join(found['leaks']) or 'no leak'}")


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the finished audits."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def is_done(results: Sequence[Mapping[str, Any]], world: str, name: str, seed: int, budget: str) -> bool:
    """Return whether an objective has been audited on a world with a seed and a budget."""
    asked = (world, name, seed, budget)
    return any((r["world"], r["objective"], r["seed"], r["budget"]) == asked for r in results)


def measure(ground: Ground, name: str, seed: int, budget: str, work: Path) -> dict[str, Any]:
    """Return what became of one objective: how its run ended, and every attack of its audit."""
    folder = work / f"{ground.name}-{name}-{seed}"
    out: dict[str, Any] = {"world": ground.name, "objective": name, "seed": seed, "budget": budget, **commit()}
    if name == NOTHING:
        subject: list[object] = [ground.model, "--original", ground.model]
    else:
        out |= _train(ground, name, seed, folder)
        subject = [folder]
    result = _audit(ground, subject, budget, work / f"{folder.name}-{budget}")
    kept = ("family", "format", "verdict", "shares", "lead", "p_corrected", "sizes", "gap", "layers", "n",
            "rate", "control_layers", "perplexity", "refused")  # fmt: skip
    rows = [{key: row[key] for key in kept if key in row} for row in result["rows"]]
    for row in rows:
        if row.get("p_corrected", 0) is None:  # not tested
            del row["p_corrected"]
    if name != NOTHING:  # what the original says is in the line of `nothing`, once
        for row in rows:
            row["shares"] = {of: share for of, share in row["shares"].items() if of != "original"}
    return out | {
        "facts": result["facts"],
        "units": result["units"],
        "audit_seconds": result["seconds"],
        "leaks": [f"{row['family']}.{row['format']}" for row in rows if row["verdict"] == "leak"],
        "rows": _rounded(rows),
    }


def _rounded(value: Any) -> Any:
    """Return what a JSON value holds, its numbers to three digits: the records are kept with the code."""
    if isinstance(value, Mapping):
        return {key: _rounded(found) for key, found in value.items()}
    if isinstance(value, list):
        return [_rounded(found) for found in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _train(ground: Ground, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Run `forget` with the objective's own defaults; what is there from a call that was cut off is taken."""
    record = folder / "record.json"
    if not record.is_file():
        how = ["--model", ground.model, *ground.given("forget", "normal"), *ground.further, "--objective", name]
        _call("forget", *how, "-o", folder, "--seed", seed)
    told = json.loads(record.read_text(encoding="utf-8"))
    return {"run": told["status"], "steps": told["training"]["steps"], "not_reached": told["not_reached"]}


def _audit(ground: Ground, subject: Sequence[object], budget: str, folder: Path) -> dict[str, Any]:
    how = ground.given("forget", "paraphrase", "retain", "holdout", "general")
    how += [] if ground.control is None else ["--control", ground.control]
    if not folder.is_dir():
        _take_original(ground, subject[0], folder)
        _call("audit", *subject, *how, "--budget", budget, "-o", folder)
    found: dict[str, Any] = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    return found


def _take_original(ground: Ground, run: object, folder: Path) -> None:
    """Begin the audit of a run with what another audit of the ground found out about the original: to both it is the
    base with its adapter off. What does not fit is thrown away by the audit itself."""
    adapter, stage = Path(str(run)) / ADAPTER / "adapter_model.safetensors", staging_folder(folder)
    done = sorted(folder.parent.glob(f"{ground.name}-*-{folder.name.rpartition('-')[2]}/{MARK}"))
    if not (adapter.is_file() and done) or stage.exists():
        return
    made = json.loads(done[0].read_text(encoding="utf-8"))
    files = {name: told for name, told in made.pop("files").items() if name.endswith(".original.json")}
    stage.mkdir(mode=0o700)
    for name in files:
        shutil.copy2(done[0].parent / name, stage)
    same = {key: value for key, value in made.items() if key not in ("made_by", CONTENTS)}
    now = {**same, "adapter": sha256_of(adapter), "original": None, "files": files}
    (stage / MARK).write_text(json.dumps(now), encoding="utf-8")


def _call(*arguments: object) -> None:
    """Run a command in a process of its own. Raises RuntimeError where it did not end with a result (0) or a gate's
    refusal (5)."""
    command = [sys.executable, "-m", "qunlearn", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False, timeout=_ENDED_S)
    if done.returncode not in (0, 5):
        raise RuntimeError(f"{' '.join(command[2:4])}: exit code {done.returncode}: {done.stderr[-800:]}")


# -- the table ---------------------------------------------------------------------------------------------


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a line an objective: how its run ended, what is found out, and the figures that tell hiding from
    forgetting, in percent, each beside the control's."""
    lines = [
        "| objective | run | leaks of judged | open | first 4 tokens | by text | half taught: E | logit lens | probe "
        "| nf4 | nf4, into 16 bits | retain kept | near kept | found out by |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in sorted(results, key=lambda r: (r["objective"] != NOTHING, len(r["leaks"]), r["objective"])):
        rows = {f"{row['family']}.{row['format']}": row for row in found["rows"]}
        judged = sum(row["verdict"] in _JUDGED for row in rows.values())
        pairs = [_pair(rows, name) for name in ("formats.open", "formats.prefix4", "formats.choice-text")]
        kept = [_share(rows, name, "unlearned") for name in ("collateral.retain", "collateral.near")]
        cells = [found["objective"], found.get("run", "–"), f"{len(found['leaks'])} of {judged}", *pairs]
        cells += [_excess(rows), *(_pair(rows, name) for name in _FURTHER), *kept, _families(found["leaks"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _families(leaks: Sequence[str]) -> str:
    """Return the families that find a model out, with the number of their attacks where it is more than one."""
    counts = Counter(leak.partition(".")[0] for leak in leaks)
    return ", ".join(f"{family} ({n})" if n > 1 else family for family, n in counts.items()) or "none"


def _pair(rows: Mapping[str, Any], name: str) -> str:
    """Return the share of the facts that come back, and the same of the retrained model or of placebo facts."""
    shares = rows.get(name, {}).get("shares", {})
    beside = "placebo" if "placebo" in shares else "control"
    return f"{_share(rows, name, 'unlearned')} / {_share(rows, name, beside)}"


def _share(rows: Mapping[str, Any], name: str, subject: str) -> str:
    found = rows.get(name, {}).get("shares", {}).get(subject)
    return "–" if found is None else f"{100 * found['mean']:.0f}"


def _excess(rows: Mapping[str, Any]) -> str:
    """Return the excess recovery of the arm that teaches half of the facts, with its interval."""
    row = rows.get("relearning.half", {})
    lead = row.get("lead")
    if lead is None:
        return "–"
    ends = f" [{100 * lead['low']:.0f}, {100 * lead['high']:.0f}]" if lead["low"] is not None else ""
    silent = row["verdict"] in ("inconclusive", "blind")
    return f"{100 * lead['mean']:.0f}{ends}" + (f" ({row['verdict']})" if silent else "")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--world", default="v-saturated", help="of the proving ground (v-saturated.4), or smollm2")
    parser.add_argument("--objectives", nargs="+", default=[NOTHING, *OBJECTIVE_NAMES])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", default="standard")
    parser.add_argument("--work", type=Path, help="runs and audits are kept here (run)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.command == "run":
        if args.work is None:
            parser.error("run needs --work")
        try:
            ground = ground_of(args.world)
        except (KeyError, ValueError):
            parser.error(f"no such world: {args.world}")
        except FileNotFoundError as missing:
            say(f"skipped: {missing}")
            return
        args.work.mkdir(parents=True, exist_ok=True, mode=0o700)
        run_all(ground, args.objectives, args.seed, args.budget, args.work, args.results)
    else:
        found = [r for r in read_results(args.results) if r["world"] == args.world]
        print(table(found))  # noqa: T201 - the figures are this command's output


if __name__ == "__main__":
    main()
