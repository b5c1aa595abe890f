"""What of the forgotten answers comes back when a merged model is quantised again: by objective, and by learning rate.

    python studies/requantize.py [--rows NAME …] [--kinds KIND …] [--work FOLDER] [--results FILE] [--render]

Each run is merged into both bases and measured there and at nf4, as `qunlearn merge` does. The normal data is the
base's own, the same for all rows of a kind. A finished run is a line of studies/requantize.jsonl and is not run
again; at the end (`--render`: nothing else) the table in docs/robustness.md is written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import _path  # noqa: F401 - before what it makes importable
from _meter import in_fresh_process
from _report import machine, say, table, write_section
from _trials import Trial, make_normal, normal_path
from objectives import VERSION, append, read_results
from qunlearn.sandbox import ASSETS, KINDS

RESULTS = Path(__file__).with_name("requantize.jsonl")
PAGE = Path(__file__).parents[1] / "docs" / "robustness.md"
_CPU = torch.device("cpu")
BASES = ("original", "dequantized")


@dataclass(frozen=True)
class Row:
    """What is run, and with what set otherwise. The smaller the steps, the more of them: as far as it takes."""

    objective: str
    overlay: Mapping[str, Any]

    @property
    def name(self) -> str:
        return " ".join(
            [self.objective, *(f"{key.partition('.')[2]} {value:g}" for key, value in self.overlay.items())]
        )


ROWS = [Row(name, {}) for name in ("wga", "llmu", "npo", "rmu", "prod", "mollm")]
ROWS += [Row("wga", {"train.lr": lr, "train.steps": steps}) for lr, steps in ((5e-4, 440), (2e-4, 880))]
ROWS += [Row("wga", {"train.lr": 2e-4, "train.steps": 880, "lora.r": 64, "lora.alpha": 128})]


def qunlearn(*args: object) -> dict[str, Any]:
    """What a command prints with --json; a gate that failed is a result."""
    command = [sys.executable, "-m", "qunlearn.cli.app", *map(str, args), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode not in (0, 5):
        raise SystemExit(f"{' '.join(command)}\n{ran.stderr}")
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def change(run: Path) -> float:
    """The merged update over the weight's length, the median of all layers."""
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    with (
        safe_open(run / "adapter" / "adapter_model.safetensors", "pt") as adapter,
        safe_open(ASSETS / "model" / "model.safetensors", "pt") as base,
    ):
        found = []
        for name in adapter.keys():  # noqa: SIM118 - not a dictionary
            if ".lora_A." in name:
                a, b = adapter.get_tensor(name), adapter.get_tensor(name.replace("lora_A", "lora_B"))
                weight = base.get_tensor(name.removeprefix("base_model.model.").replace(".lora_A", "")).float()
                update = config["lora_alpha"] / config["r"] * b.float() @ a.float()
                found.append(float(update.norm() / weight.norm()))
    return statistics.median(found)


def measure(row: Row, kind: str, work: Path) -> dict[str, Any]:
    """One run, merged into both bases."""
    trial = Trial(row.objective, kind, 0, {})
    if not normal_path(trial, work).is_file():
        in_fresh_process(make_normal, trial, work, device=_CPU)
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        asked = [part for key, value in row.overlay.items() for part in ("--set", f"{key}={value}")]
        given = ["--bad", f"sandbox:{kind}/forget", "--normal", normal_path(trial, work), "--objective", row.objective]
        record = qunlearn("forget", "--model", "sandbox", *given, "-o", run, "--device", "cpu", *asked)
        found = {"row": row.name, "kind": kind, "step": record["training"]["best"]["step"], "change": change(run)}
        for base in BASES:
            merged = qunlearn("merge", run, "-o", Path(temporary) / base, "--base", base, "--device", "cpu")
            for column, sets in merged["scores"].items():
                name = column if column in ("base", "adapter") else f"{column}, {base}"
                found[name] = {key: sets["bad answers"][key] for key in ("probability", "exact_match")}
            found[f"back, {base}"] = merged["back"]
    return found


FORMS = ("adapter", *(f"{column}, {base}" for base in BASES for column in ("merged", "nf4")))


def text(results: Sequence[Mapping[str, Any]]) -> str:
    header = ["run", "kind", "step kept", "change / weight", *FORMS, "came back"]
    rows = []
    for r in sorted(results, key=lambda r: ([row.name for row in ROWS].index(r["row"]), r["kind"])):
        back = [f"{form}, {base}" for base in BASES for form in r[f"back, {base}"]]
        cells = [f"{r[form]['probability']:.4f} ({100 * r[form]['exact_match']:.0f})" for form in FORMS]
        rows.append([f"`{r['row']}`", r["kind"], str(r["step"]), f"{r['change']:.3f}", *cells, "; ".join(back) or "–"])
    m = results[0]["machine"]
    where = f"{m['date']}, {m['device']}, torch {m['torch']}, bitsandbytes {m['bitsandbytes']}"
    return f"{where}; `python studies/requantize.py`\n\n{table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[row.name for row in ROWS], help="some of the rows, by name")
    parser.add_argument("--kinds", nargs="+", default=["hallucination", "code"], choices=KINDS)
    parser.add_argument("--work", type=Path, help="keep normal data here, for the next call")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for row in () if args.render else ROWS:
            for kind in args.kinds:
                known = {(r["row"], r["kind"]) for r in read_results(args.results)}
                if row.name not in args.rows or (row.name, kind) in known:
                    continue
                found = measure(row, kind, args.work or Path(temporary))
                append({"version": VERSION, **found, "machine": machine(_CPU)}, args.results)
                said = ", ".join(f"{form} {found[form]['probability']:.4f}" for form in FORMS)
                say(f"{row.name}, {kind}: {said}, change {found['change']:.3f}")
    results = read_results(args.results)
    if results and args.results == RESULTS:
        write_section("requantize", text(results), PAGE)


if __name__ == "__main__":
    main()
