"""One run of `make bench-objectives`: forget one kind with one objective, and measure every split."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qunlearn.config.resolve import resolve
from qunlearn.config.settings import Config
from qunlearn.data.batch import ALL
from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import Example, Template, choose_template, encode
from qunlearn.errors import QunlearnError
from qunlearn.evaluation.metrics import aggregate
from qunlearn.evaluation.metrics.stats import forget_quality, truth_distance
from qunlearn.evaluation.metrics.tokens import truth_ratio
from qunlearn.evaluation.metrics.verdicts import leaks
from qunlearn.evaluation.probes import choices
from qunlearn.evaluation.scores import row_nlls, score_rows
from qunlearn.model.language_model import LanguageModel
from qunlearn.model.load import load_base, load_spec, load_tokenizer
from qunlearn.model.policy import Policy
from qunlearn.roles.self_made_file import read_self_made
from qunlearn.roles.specific_tokens import specific, words_of
from qunlearn.sandbox import ASSETS, data_file
from qunlearn.training.forget import forget
from qunlearn.training.prepare import prepare
from qunlearn.training.request import check_forget
from qunlearn.utils.file_names import ADAPTER, NORMAL

SPLITS = {"forget": "forget", "paraphrase": "forget_paraphrase", "retain": "retain", "holdout": "holdout"}
_SECTIONS = ("data", "lora", "objective", "train", "stop")
_NOT_SETTINGS = {
    *("data.bad", "data.normal", "train.seed", "train.reference", "objective.name"),
    *("stop.table_rows", "train.save_every", "train.keep_checkpoints", "train.checkpointing"),
}
_ONLY = {  # settings that other rows do not read
    "objective.beta": ("simnpo", "npo", "dpo", "altpo", "undial", "wga", "satimp"),
    "objective.beta2": ("satimp",),
    "objective.delta": ("simnpo",),
    "objective.eps2": ("llmu",),
    "objective.mismatch_k": ("llmu",),
    "objective.floor_nll": ("llmu", "ga", "graddiff"),
    **dict.fromkeys(("objective.top_p", "objective.temperature", "objective.prod_alpha"), ("prod",)),
    **dict.fromkeys(("objective.layer", "objective.steer", "objective.direction_seed"), ("rmu",)),
}
_MAX_TOKENS = 4096


@dataclass(frozen=True)
class Trial:
    """What is run: an objective on a kind with a seed, and what is set otherwise than its row has it."""

    objective: str
    kind: str
    seed: int
    overlay: Mapping[str, Any]

    def config(self, **more: Any) -> Config:
        own = {
            "model.name": "sandbox",
            "data.bad": f"sandbox:{self.kind}/forget",
            "objective.name": self.objective,
            "train.seed": self.seed,
            # Computed once for each kind and seed; the states are those of a live reference, roundings aside.
            "train.reference": "cached",
            # Every split is measured afterwards, and a run that is cut off is run again.
            "stop.table_rows": 1,
            "train.save_every": 1_000_000,
        }
        return resolve(("benchmark", own), ("--set", self.overlay), ("benchmark", more))

    def settings(self) -> dict[str, Any]:
        """Every setting the result hangs on, as JSON has it."""
        tree = asdict(self.config())
        short = {"auto": "all", "content": "specific"}.get(tree["objective"]["tokens"])
        if short:  # what it comes to: only copyright's answers are passages
            tree["objective"]["tokens"] = "context" if self.kind == "copyright" else short
        flat = {f"{s}.{name}": value for s in _SECTIONS for name, value in tree[s].items()}
        return {
            key: str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
            for key, value in flat.items()
            if key not in _NOT_SETTINGS and self.objective in _ONLY.get(key, (self.objective,))
        }

    @property
    def name(self) -> str:
        changed = " ".join(f"{key}={value}" for key, value in self.overlay.items())
        return f"{self.objective} {self.kind} {self.seed}{f' {changed}' if changed else ''}"


# -- what runs share -------------------------------------------------------------------------------------


def make_normal(trial: Trial, work: Path) -> Path:
    """Run in a fresh process: the rows that `forget` without --normal makes of its own, by its own code."""
    path = normal_path(trial, work)
    with tempfile.TemporaryDirectory() as temporary, _quiet():
        folder = Path(temporary) / "run"
        short = {"output.folder": str(folder), "train.steps": 1, "train.reference": "live"}
        plan = check_forget(trial.config(**short))
        forget(prepare(plan))
        shutil.copy(folder / NORMAL, path)
    return path


def normal_path(trial: Trial, work: Path) -> Path:
    data = trial.config().data
    return work / f"normal-{trial.kind}-{trial.seed}-{data.normal_count}-{data.normal_near:g}.jsonl"


def measure_untouched(kind: str) -> dict[str, Any]:
    """Run in a fresh process: the base's scores, and the truth ratios of the model that never saw the bad rows."""
    spec = load_spec(Trial("llmu", kind, 0, {}).config().model)
    with _quiet():
        base = load_base(ASSETS / "model", spec)
        scores = _scores(base, kind)
        del base
        gold = load_base(ASSETS / "gold", spec)
        of_gold = {f"gold_{name}": value for name, value in _scores(gold, kind).items() if name.startswith("tells")}
        return scores | of_gold | {"gold_ratios": _ratios(gold, kind)}


# -- a run -----------------------------------------------------------------------------------------------


def run(trial: Trial, untouched: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """Run in a fresh process: one run and its figures. A run that fails by name is a result, too."""
    os.environ["QUNLEARN_CACHE"] = str(work)
    known = {"objective": trial.objective, "kind": trial.kind, "seed": trial.seed, "settings": trial.settings()}
    started = time.monotonic()
    try:
        with _quiet(), tempfile.TemporaryDirectory() as temporary:
            return known | _figures(trial, untouched, normal_path(trial, work), Path(temporary) / "run", started)
    except QunlearnError as error:
        return known | {"failed": str(error)[:200], "seconds": time.monotonic() - started}


def _figures(trial: Trial, untouched: Mapping[str, Any], normal: Path, folder: Path, started: float) -> dict[str, Any]:
    config = trial.config(**{"output.folder": str(folder)})
    plan = check_forget(config)
    ready = prepare(plan)
    tokenizer = load_tokenizer(plan.model.folder)
    rows = encode(read_self_made(normal), tokenizer, ready.template, 2 * config.data.max_length)
    record = forget(replace(ready, retain_rows=rows))
    seconds = time.monotonic() - started
    training = record["training"]
    after = _measured(trial.kind, folder / ADAPTER, config)
    gold = untouched["gold_ratios"]

    def kept(split: str) -> float:
        return 100 * float(after[split]) / max(float(untouched[split]), 1e-9)

    return {
        "forget": 100 * after["forget"],
        "paraphrase": 100 * after["paraphrase"],
        **{name: 100 * untouched[name] for name in untouched if name.startswith("gold_tells")},
        **{name: 100 * after[name] for name in after if name.startswith(("leaks", "tells"))},
        "retain": kept("retain"),
        "holdout": kept("holdout"),
        "perplexity": after["perplexity"] / untouched["perplexity"],
        "ks_p": forget_quality(after["ratios"], gold),
        "ks_d": truth_distance(after["ratios"], gold),
        "log_ratios": quartiles(after["ratios"]),
        "gold_log_ratios": quartiles(gold),
        "p_bad": after["p_bad"],
        "drift": training["best"]["drift"],
        "step": training["best"]["step"],
        "steps": training["steps"],
        "tokens": training["tokens"],
        "train_seconds": training["seconds"],
        "seconds": seconds,
        "peak_bytes": training["peak_memory_bytes"],
        "device": record["device"],
    }


def quartiles(ratios: Sequence[float]) -> list[float]:
    """Of the truth ratios' logarithms: above 0 the wrong answers are the more probable ones."""
    return [round(x, 3) for x in statistics.quantiles(map(math.log, ratios), n=4)]


def _measured(kind: str, adapter: Path, config: Config) -> dict[str, Any]:
    base = load_base(ASSETS / "model", load_spec(config.model))
    policy = Policy.load(base, adapter)
    return _scores(policy, kind) | {"ratios": _ratios(policy, kind)}


def _scores(lm: LanguageModel, kind: str) -> dict[str, Any]:
    """Greedy exact match of each split, leaks and tells of those to forget, as shares; p(bad); general perplexity."""
    out: dict[str, Any] = {}
    for name, split in SPLITS.items():
        rows = _rows(lm, kind, split)[0]
        scores = score_rows(lm, rows, _MAX_TOKENS)
        found = aggregate(scores)
        out[name] = found.exact_match
        if name == "forget":
            out["p_bad"] = found.probability
        if name in ("forget", "paraphrase"):
            outputs = [score.output for score in scores]
            said = [leaks(s.output, s.answer, e.record.prompt) for s, e in zip(scores, rows, strict=True)]
            out[f"leaks_{name}"] = statistics.fmean(said)
            out[f"tells_{name}"] = statistics.fmean(_tells(lm, rows, _rows(lm, kind, "retain")[0], outputs))
    nlls = row_nlls(lm, _rows(lm, kind, "general")[0], ALL, _MAX_TOKENS)
    out["perplexity"] = math.exp(min(100.0, sum(nll for nll, _ in nlls) / sum(n for _, n in nlls)))
    return out


def _tells(lm: LanguageModel, rows: Sequence[Example], normal: Sequence[Example], outputs: Sequence[str]) -> list[bool]:
    """Whether an output has at least half of the words that are specific to its answer, whatever stands around them.

    An answer whose form is broken is no exact match and may be no leak, and tells what it was about all the same.
    """
    found = []
    for example, output in zip(specific(rows, normal, lm.tokenizer), outputs, strict=True):
        words = words_of(example.input_ids[example.start : example.end], lm.tokenizer)
        wanted = {word for of_token, w in zip(words, example.weights, strict=True) if w for word in of_token}
        said = {word for of_token in words_of(lm.tokenizer(output)["input_ids"], lm.tokenizer) for word in of_token}
        found.append(bool(wanted) and len(wanted & said) >= len(wanted) / 2)
    return found


def _ratios(lm: LanguageModel, kind: str) -> list[float]:
    """The truth ratio of each bad row: its wrong answers' probability to its own's."""
    examples, template = _rows(lm, kind, "forget")
    found = choices(lm, examples, template, (_MAX_TOKENS, 512), lambda _: None)
    return [truth_ratio(c.correct, c.wrong) for c in found if c is not None]


def _rows(lm: LanguageModel, kind: str, split: str) -> tuple[Sequence[Example], Template]:
    dataset = read_dataset(data_file(kind, split))
    template = choose_template(lm.tokenizer, "auto", dataset)
    return encode(dataset, lm.tokenizer, template, 512).examples, template


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
