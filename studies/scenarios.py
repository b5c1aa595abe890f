"""`make scenarios`: the paper's table in small, and its headline, on the sandbox; writes docs/scenarios.md with plots.

    python studies/scenarios.py [--kinds harm …] [--methods simnpo …] [--parts table] [--work DIR] [--render]

Every run that is finished is a line of studies/scenarios.jsonl and is not made again: an interrupted call goes on
where it was, and `--render` only writes the page. Times are CPU seconds of the process, all threads together.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import _path  # noqa: F401 - before what it makes importable
import _preference
from _report import machine, say
from _scenario_page import write_page
from _stories import Story, encoded
from _tuning import fine_tune
from qunlearn.model.load import load_base, load_spec
from qunlearn.model.policy import Policy, save_adapter
from qunlearn.roles.self_made_file import read_self_made
from qunlearn.sandbox import ASSETS
from qunlearn.training.forget import forget
from qunlearn.training.prepare import prepare
from qunlearn.training.request import check_forget

LINES = Path(__file__).with_name("scenarios.jsonl")
KINDS = ("hallucination", "harm", "copyright", "code")
_NO_END = {"stop.max_drift": float("inf")}  # nothing holds the rest, so nothing but the target ends the run
_AS_MEASURED = {"objective.eps3": 2.0}  # llmu's row has another one since
# In the order in which they are run. The paper's "GA" has the KL term, its "GA + mismatch" is the full objective.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "models": {},
    "wga": {"objective.name": "wga"},
    "simnpo": {"objective.name": "simnpo"},
    "llmu": {"objective.name": "llmu", **_AS_MEASURED},
    "tuned": {},
    "ascent": {"objective.name": "llmu", "objective.eps2": 0, "objective.eps3": 0, **_NO_END},
    "ascent+mismatch": {"objective.name": "llmu", "objective.eps3": 0, **_NO_END},
    "ascent+kl": {"objective.name": "llmu", "objective.eps2": 0, **_AS_MEASURED},
}
_LATER = ("ascent+kl",)


def known(path: Path = LINES) -> list[dict[str, Any]]:
    """The runs that are finished."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def finished(lines: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """(kind, method) of every run that is not made again: all but those that were broken off (`cut`)."""
    whole = [line for line in lines if "cut" not in line]
    return {(line["kind"], "models" if line["method"] == "original" else line["method"]) for line in whole}


def keep(line: Mapping[str, Any], path: Path = LINES) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, **machine(torch.device("cpu"))}) + "\n")


def run_one(story: Story, method: str) -> list[dict[str, Any]]:
    """One method on one kind: trained, measured, as lines."""
    begun = {"part": "table", "kind": story.kind, "seed": 0}
    if method == "models":
        found = story.measure(None)
        named = (("original", "base"), ("retrained", "reference"))
        return [{**begun, "method": name, "measures": found[subject]} for name, subject in named]
    normal_seconds = story.make_normal()
    started = time.process_time()
    adapter, training = (_tuned if method == "tuned" else _unlearned)(story, method)
    seconds = time.process_time() - started
    measures = story.measure(adapter)["adapter"]
    spent = {"cpu_seconds": round(seconds, 1), "normal_cpu_seconds": round(normal_seconds, 1)}
    return [{**begun, "method": method, **spent, "training": training, "measures": measures}]


def _unlearned(story: Story, method: str) -> tuple[Path, dict[str, Any]]:
    plan = check_forget(story.config(METHODS[method], method))
    training = forget(prepare(plan))["training"]
    names = ("steps", "tokens", "best", "stop_reason", "reason")
    return plan.output, {name: training[name] for name in names if name in training}


def _tuned(story: Story, method: str) -> tuple[Path, dict[str, Any]]:
    """Supervised fine-tuning on good answers to the bad prompts, and on the normal rows."""
    config = story.config({}, method)
    policy = Policy.new(load_base(ASSETS / "model", load_spec(config.model)), config.lora, seed=config.train.seed)
    good = encoded(policy, story.good_dataset(), config)
    normal = encoded(policy, read_self_made(story.normal_file), config)
    steps, tokens, found = fine_tune(policy, good, normal, config)
    folder = story.folder / method
    save_adapter(policy, folder)
    return folder, {"steps": steps, "tokens": tokens, "losses": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--parts", nargs="+", default=["table", "preference"], choices=["table", "preference"])
    parser.add_argument("--work", type=Path, default=Path("runs/scenarios"))
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    done = finished(known())
    if "table" in args.parts and not args.render:
        # What the paper has comes first, so that an interrupted call leaves tables that can be read.
        later = [(kind, method) for kind in args.kinds for method in args.methods if kind == "code" or method in _LATER]
        first = [(kind, method) for kind in args.kinds for method in args.methods if (kind, method) not in later]
        for kind, method in [*first, *later]:
            if (kind, method) not in done:
                say(f"{kind}, {method}")
                for line in run_one(Story(kind, args.work.absolute()), method):
                    keep(line)
                gc.collect()
    if "preference" in args.parts and not args.render:
        for line in _preference.lines(Story("harm", args.work.absolute()), {method for _, method in done}):
            keep(line)
    write_page(known())


if __name__ == "__main__":
    main()
