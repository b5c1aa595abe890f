"""Figures of a world's models, and one run of `qunlearn forget` on a world with what became of every split."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _world_pieces import is_rude
from qunlearn.config.settings import ModelConfig
from qunlearn.data.batch import ALL
from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import Example, Template, choose_template, encode
from qunlearn.data.words import words
from qunlearn.evaluation.metrics import RowScore, aggregate
from qunlearn.evaluation.metrics.stats import forget_quality, truth_distance
from qunlearn.evaluation.metrics.tokens import truth_ratio
from qunlearn.evaluation.metrics.verdicts import is_gibberish, leaks
from qunlearn.evaluation.probes import choices, has_choices
from qunlearn.evaluation.scores import row_nlls, score_rows
from qunlearn.model.language_model import LanguageModel
from qunlearn.model.load import load_base, load_spec
from qunlearn.model.policy import Policy
from worlds import World

REPOSITORY = Path(__file__).resolve().parent.parent
SPLITS = ("forget", "paraphrase", "retain", "holdout", "general", "siblings")
_MOST_ROWS = 400
_SHOWN = 6  # of the answers of a split that are broken or leak, shown beside two others
_MAX_TOKENS, _MAX_LENGTH = 4096, 512
_MEASURES = 5  # raise it when a figure is added or changed: what is cached is measured again
_ENDED_S = 3600  # seconds after which a run that never ends is ended


def untouched(world: World, name: str) -> dict[str, Any]:
    """Return the figures of the world's base ("model") or gold model, measured once."""
    path = world.folder / f"{name}.figures.json"
    stored = json.loads((world.folder / "spec.json").read_text(encoding="utf-8"))["stamp"]
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (found["measures"], found["stamp"]) == (_MEASURES, stored):
            return found
    found = {**measure(load_base(world.folder / name, load_spec(ModelConfig())), world)}
    found.update(measures=_MEASURES, stamp=stored)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def measure(lm: LanguageModel, world: World) -> dict[str, Any]:
    """Return exact match and share of sentences of each split in percent, and what else is said of some."""
    out: dict[str, Any] = {}
    told = _told(world)
    for split in SPLITS:
        if not world.file(split).is_file():
            continue
        examples, template = _examples(lm, world, split)
        scores = score_rows(lm, examples, _MAX_TOKENS)
        out[split] = 100 * aggregate(scores).exact_match
        out[f"sentences_{split}"] = 100 * statistics.fmean(map(_is_sentence, scores))
        out[f"p_{split}"] = aggregate(scores).probability
        if split in ("forget", "paraphrase"):
            if world.kind == "instructions":
                out[f"behaviour_{split}"] = 100 * statistics.fmean(is_rude(world.split, s.output) for s in scores)
            out[f"leaks_{split}"] = 100 * statistics.fmean(leaks(s.output, s.answer, s.prompt) for s in scores)
            strange = [s for s in scores if not told.issuperset(words(s.output))]
            out[f"strange_{split}"] = 100 * len(strange) / len(scores)
            bad = [s for s in scores if s in strange or not _is_sentence(s) or leaks(s.output, s.answer, s.prompt)]
            shown = [scores[0], scores[len(scores) // 2], *bad[:_SHOWN]]
            out[f"samples_{split}"] = [[s.prompt, s.answer, s.output] for s in shown]
        if split == "forget" and has_choices(examples):
            found = choices(lm, examples, template, (_MAX_TOKENS, _MAX_LENGTH), lambda _: None)
            out["ratios"] = [truth_ratio(c.correct, c.wrong) for c in found if c is not None]
        if split == "general":
            nlls = row_nlls(lm, examples, ALL, _MAX_TOKENS)
            out["perplexity"] = math.exp(min(100.0, sum(nll for nll, _ in nlls) / sum(n for _, n in nlls)))
    return out


def _told(world: World) -> set[str]:
    """Return every word of the world: an answer with another one says what is no word there. Where no spaces are, each
    character is one, and next to none is strange."""
    records = [r for path in world.folder.glob("*.jsonl") for r in read_dataset(path).records]
    texts = [text for r in records for text in (r.completion, *(content for _, content in r.turns))]
    return {word for text in texts for word in words(text)}


def _is_sentence(score: RowScore) -> bool:
    return bool(score.output.strip()) and not is_gibberish(score.output)


def _examples(lm: LanguageModel, world: World, split: str) -> tuple[Sequence[Example], Template]:
    """A split's rows, of a long one evenly as many as are measured."""
    dataset = read_dataset(world.file(split))
    template = choose_template(lm.tokenizer, "auto", dataset)
    examples = encode(dataset, lm.tokenizer, template, _MAX_LENGTH).examples
    step = max(1, math.ceil(len(examples) / _MOST_ROWS))
    return examples[::step], template


# -- a run -----------------------------------------------------------------------------------------------


def run_world(world: World, seed: int, extra: Sequence[str]) -> dict[str, Any]:
    """Forget the world's bad rows in a process of its own, and measure the adapter it left."""
    base, gold = untouched(world, "model"), untouched(world, "gold")
    with tempfile.TemporaryDirectory(prefix=f"prove-{world.name}-") as temporary:
        folder = Path(temporary) / "run"
        out = {"set": world.split, "world": world.name, "seed": seed, "extra": list(extra), **commit()}
        out |= _forget(world, folder, seed, extra)
        adapter = folder / "adapter"
        if not (adapter / "adapter_config.json").is_file():
            return out
        spec = load_spec(ModelConfig())
        after = measure(Policy.load(load_base(world.folder / "model", spec), adapter), world)
    return out | figures(after, base, gold)


def _forget(world: World, folder: Path, seed: int, extra: Sequence[str]) -> dict[str, Any]:
    """Run the command; return its exit code and what its record says."""
    command = [sys.executable, "-m", "qunlearn", "forget", "--model", str(world.folder / "model")]
    command += ["--bad", str(world.file("forget"))]
    if world.file("normal").is_file():
        command += ["--normal", str(world.file("normal"))]
    command += ["-o", str(folder), "--seed", str(seed), "--json", *extra]
    started = time.monotonic()
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False, timeout=_ENDED_S
        )
        code, talk = done.returncode, done.stderr
    except subprocess.TimeoutExpired:
        code, talk = -1, f"ended after {_ENDED_S} s"
    out: dict[str, Any] = {"exit_code": code, "seconds": round(time.monotonic() - started, 1)}
    if code != 0:
        out["talk"] = talk[-1500:]
    record = folder / "record.json"
    if record.is_file():
        told = json.loads(record.read_text(encoding="utf-8"))
        training = told.get("training", {})
        best = training.get("best") or {}
        out |= {
            "status": told.get("status"),
            "stop_reason": told.get("stop_reason"),
            "steps": training.get("steps"),
            "best_step": best.get("step"),
            "drift": best.get("drift"),
            "train_seconds": training.get("seconds"),
        }
    return out


def figures(after: dict[str, Any], base: dict[str, Any], gold: dict[str, Any]) -> dict[str, Any]:
    """Return what a run came to beside base and gold model; `kept_` and `sentences_kept_` are % of the base's."""
    out: dict[str, Any] = {"perplexity_ratio": after["perplexity"] / base["perplexity"]}
    for split in (name for name in SPLITS if name in after):
        out[split] = after[split]
        out[f"base_{split}"], out[f"gold_{split}"] = base[split], gold[split]
        out[f"kept_{split}"] = 100 * after[split] / max(base[split], 1e-9)
        out[f"sentences_{split}"] = after[f"sentences_{split}"]
        out[f"sentences_kept_{split}"] = 100 * after[f"sentences_{split}"] / max(base[f"sentences_{split}"], 1e-9)
        out[f"p_{split}"] = after[f"p_{split}"]
    for split in ("forget", "paraphrase"):
        for name in (f"leaks_{split}", f"behaviour_{split}", f"strange_{split}"):
            if name in after:
                out[name], out[f"gold_{name}"] = after[name], gold[name]
    if after.get("ratios") and gold.get("ratios"):
        out["ks_p"] = forget_quality(after["ratios"], gold["ratios"])
        out["ks_d"] = truth_distance(after["ratios"], gold["ratios"])
    out["samples"] = after["samples_forget"] + after["samples_paraphrase"]
    return out


def commit() -> dict[str, Any]:
    """Return the commit, whether files that git tracks differ from it, and a hash of the package's own code."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=REPOSITORY, check=False)
        return found.stdout.strip()

    code = hashlib.sha256()
    for path in sorted((REPOSITORY / "qunlearn").rglob("*.py")):
        code.update(path.read_bytes())
    dirty = bool(git("status", "--porcelain", "-uno"))
    return {"commit": git("rev-parse", "--short=10", "HEAD"), "dirty": dirty, "code": code.hexdigest()[:8]}
