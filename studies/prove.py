"""The proving ground's command: build worlds, forget on them, and say which runs meet what is promised.

    python studies/prove.py build --set development
    python studies/prove.py run --set development --seeds 0 1 2 --out FILE.jsonl -- --objective simnpo
    python studies/prove.py run --set validation --draw 1      worlds of the same kinds that nobody has seen yet
    python studies/prove.py table FILE.jsonl

What follows `--` goes to `qunlearn forget`. Worlds are kept in QUNLEARN_WORLDS, or in ~/.cache/qunlearn/worlds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import _path  # noqa: F401 - before what it makes importable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from worlds import DEVELOPMENT, VALIDATION, World, choose, world_named

Run = dict[str, Any]
_GATE_FAILED = 5
_KEPT, _KEPT_WITHOUT_NORMAL = 97.0, 95.0
_SPLITS = ("forget", "paraphrase", "retain", "holdout", "general")


def main() -> None:
    """Run one of the three commands."""
    arguments, extra = _arguments(sys.argv[1:])
    try:
        worlds = [] if arguments.command == "table" else choose(arguments.set, arguments.worlds, arguments.draw)
    except ValueError as error:
        sys.exit(str(error))
    if arguments.command == "build":
        build(worlds)
    elif arguments.command == "run":
        run(worlds, arguments.seeds, extra, arguments.out)
    else:
        print_table([json.loads(line) for line in arguments.file.read_text(encoding="utf-8").splitlines()])


def _arguments(given: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    own, extra = list(given), []
    if "--" in own:
        at = own.index("--")
        own, extra = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "run"):
        command = commands.add_parser(name)
        command.add_argument("--set", choices=(DEVELOPMENT, VALIDATION), required=True)
        command.add_argument("--worlds", help="names with commas; without them all that are not slow")
        command.add_argument(
            "--draw", type=int, default=0, help="the same kinds of worlds, drawn again from this number"
        )
        if name == "run":
            command.add_argument("--seeds", type=int, nargs="+", default=[0])
            command.add_argument("--out", type=Path, help="a file to which a JSON line is added for each run")
    commands.add_parser("table").add_argument("file", type=Path)
    return parser.parse_args(own), extra


# -- build and run ---------------------------------------------------------------------------------------


def build(worlds: Iterable[World]) -> None:
    """Build what is not there, and print what the base and the gold model know."""
    from _world_models import build_world, poorly_known
    from _world_run import untouched

    for world in worlds:
        build_world(world)
        for name in ("model", "gold"):
            known = untouched(world, name)
            told = "  ".join(f"{split} {known[split]:.1f}" for split in _SPLITS)
            weak = poorly_known(known) if name == "model" else []
            odd = f"  NOT MEMORISED: {', '.join(weak)}" if weak else ""
            _say(f"{world.name:12} {name:5} exact match %: {told}  p(forget) {known['p_forget']:.4f}{odd}")


def run(worlds: Iterable[World], seeds: Sequence[int], extra: Sequence[str], out: Path | None) -> None:
    """Run every world with every seed, print a line for each and add it to the file."""
    from _world_run import run_world

    runs: list[Run] = []
    for world in worlds:
        if not (world.folder / "gold" / "config.json").is_file():
            name, _, draw = world.name.partition(".")
            build = f"build --set {world.split} --worlds {name} --draw {draw or 0}"
            _say(f"{world.name}: not built yet, left out (python studies/prove.py {build})")
            continue
        for seed in seeds:
            found = run_world(world, seed, extra)
            runs.append(found)
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found, ensure_ascii=False) + "\n")
            _say(f"{_header()}\n{_line(found)}" if len(runs) == 1 else _line(found))
            _say_samples(found)
    if len(runs) > 1:
        print_table(runs)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the figures are this command's output


def _say_samples(found: Run) -> None:
    for prompt, answer, output in found.get("samples", []):
        _say(f"      {prompt[:60]!r} was {answer[:60]!r} is {output[:90]!r}")
    if "talk" in found and "forget" not in found:
        _say("      " + found["talk"][-400:].replace("\n", "\n      "))


# -- what is promised ------------------------------------------------------------------------------------


def promises(found: Run) -> dict[str, bool]:
    """Return which promises a run meets; without an adapter it meets none."""
    if "forget" not in found:
        return dict.fromkeys(("forget", "paraphrase", "holdout", "general", "perplexity", "sentences"), False)
    normal = world_named(found["world"]).normal
    sentences = [value for name, value in found.items() if name.startswith("sentences_kept_")]
    return {
        "forget": found["forget"] <= max(1, found["gold_forget"]),  # values that are shared can be guessed
        "paraphrase": found["paraphrase"] <= 3 + found["gold_paraphrase"],
        "holdout": found["kept_holdout"] >= (_KEPT_WITHOUT_NORMAL if normal == "none" else _KEPT),
        "general": found["kept_general"] >= _KEPT,
        "perplexity": found["perplexity_ratio"] <= 1.03,
        "sentences": min(sentences) >= 98,
    }


def print_table(runs: Sequence[Run]) -> None:
    """Print a line for each run, and for each set how many runs meet everything."""
    for name in (DEVELOPMENT, VALIDATION):
        own = [found for found in runs if found["set"] == name]
        if not own:
            continue
        _say(f"\n{name}: {_flags(own)}\n{_header()}")
        for found in sorted(own, key=lambda found: (found["world"], found["seed"])):
            _say(_line(found))
        _say(_summary(name, own))


def _flags(runs: Sequence[Run]) -> str:
    told = sorted({f"{r['commit']} (code {r.get('code', '?')}) {' '.join(r['extra'])}".strip() for r in runs})
    return "; ".join(told)


def _summary(name: str, runs: Sequence[Run]) -> str:
    met = [all(promises(found).values()) for found in runs]
    failing = [found for found, good in zip(runs, met, strict=True) if not good]
    told = sum(found["exit_code"] == _GATE_FAILED for found in failing)
    false_alarms = sum(found["exit_code"] != 0 for found, good in zip(runs, met, strict=True) if good)
    alike = [found["ks_p"] > 0.05 for found in runs if "ks_p" in found]
    by_promise = ", ".join(f"{key} {sum(promises(r)[key] for r in runs)}" for key in promises(runs[0]))
    seconds = sum(found["seconds"] for found in runs) / len(runs)
    return (
        f"{name}: {sum(met)} of {len(runs)} runs meet all ({100 * sum(met) / len(runs):.0f} %): {by_promise}\n"
        f"{name}: KS p > 0.05 in {sum(alike)} of {len(alike)}; of {len(failing)} failing runs {told} ended with exit "
        f"code {_GATE_FAILED}; {false_alarms} that meet all did not end with 0; {seconds:.0f} s a run"
    )


_COLUMNS: tuple[tuple[str, int, Callable[[Run], str]], ...] = (
    ("world", 12, lambda r: str(r["world"])),
    ("seed", 4, lambda r: str(r["seed"])),
    ("exit", 4, lambda r: str(r["exit_code"])),
    ("forget", 7, lambda r: f"{r['forget']:.1f}"),
    ("gold", 5, lambda r: f"{r['gold_forget']:.1f}"),
    ("para", 6, lambda r: f"{r['paraphrase']:.1f}"),
    ("gold", 5, lambda r: f"{r['gold_paraphrase']:.1f}"),
    ("leaks", 6, lambda r: f"{r['leaks_forget']:.1f}"),
    ("retain%", 7, lambda r: f"{r['kept_retain']:.1f}"),
    ("holdout%", 8, lambda r: f"{r['kept_holdout']:.1f}"),
    ("general%", 8, lambda r: f"{r['kept_general']:.1f}"),
    ("sibl%", 6, lambda r: f"{r['kept_siblings']:.0f}" if "kept_siblings" in r else "-"),
    ("ppl", 6, lambda r: f"{r['perplexity_ratio']:.3f}"),
    ("words: forget", 13, lambda r: f"{r['sentences_forget']:.0f}"),
    ("others", 6, lambda r: f"{min(r[f'sentences_kept_{s}'] for s in _SPLITS[1:]):.0f}"),
    ("KS p", 8, lambda r: f"{r['ks_p']:.1e}" if "ks_p" in r else "-"),
    ("KS D", 5, lambda r: f"{r['ks_d']:.2f}" if "ks_d" in r else "-"),
    ("drift", 6, lambda r: f"{r['drift']:.3f}" if r.get("drift") is not None else "-"),
    ("best", 5, lambda r: str(r.get("best_step", "-"))),
    ("steps", 5, lambda r: str(r.get("steps", "-"))),
    ("s", 5, lambda r: f"{r['seconds']:.0f}"),
)


def _header() -> str:
    return " ".join(f"{name:>{width}}" for name, width, _ in _COLUMNS) + "  misses"


def _line(found: Run) -> str:
    cells = []
    for _, width, show in _COLUMNS:
        try:
            cells.append(f"{show(found):>{width}}")
        except KeyError:  # a run that left no adapter
            cells.append("-".rjust(width))
    missed = [name for name, met in promises(found).items() if not met]
    return " ".join(cells) + "  " + (", ".join(missed) or "none")


if __name__ == "__main__":
    main()
