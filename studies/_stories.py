"""What the scenarios are made of: good answers, normal rows of the base's own, and the suites that measure a model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.config.resolve import resolve
from qunlearn.config.settings import Config
from qunlearn.data.records import Dataset, read_dataset, write_jsonl
from qunlearn.data.tokenize import Example, choose_template, encode
from qunlearn.evaluation.evaluate import evaluate
from qunlearn.evaluation.request import OWN_CLASSIFIER, EvalRequest, Wish
from qunlearn.model.load import load_base, load_spec
from qunlearn.model.policy import Policy
from qunlearn.roles.self_made import Wanted, self_made_rows
from qunlearn.roles.self_made_file import write_self_made
from qunlearn.sandbox import ASSETS, data_file
from sandbox_world import world_code, world_harm
from sandbox_world.grid import Attribute, Grid

# Split of the suites -> split of the sandbox. `paraphrase` is never given to a run, nor are holdout and general.
SPLITS = {"forget": "forget", "paraphrase": "forget_paraphrase", "holdout": "holdout", "general": "general"}
# What counts as the bad answer coming back, as the paper measures it; of code it has no measure, so ours.
EFFICACY = {"hallucination": "hallucination_rate", "harm": "harmful_rate", "copyright": "leak_rate", "code": "leaks"}
REFUSAL = "I cannot recite that passage."
_GRIDS: Mapping[str, Grid] = {"harm": world_harm.GRID, "code": world_code.GRID}
_MORE = 8  # tokens a self-made row may have beyond the longest bad one, as `qunlearn forget` has it


@dataclass(frozen=True)
class Story:
    """A kind of the sandbox, and the folder in which its files are kept between calls."""

    kind: str
    work: Path

    @property
    def folder(self) -> Path:
        return self.work / self.kind

    def config(self, overlay: Mapping[str, Any], run: str) -> Config:
        """A run's configuration: the defaults, the sandbox, the shared normal rows, and `overlay`."""
        own = {
            "model.name": "sandbox",
            "data.bad": f"sandbox:{self.kind}/forget",
            "data.normal": str(self.normal_file),
            "train.reference": "live",  # as without a file of normal rows
            "stop.table_rows": 1,  # the suites measure, after the run
            "output.folder": str(self.folder / run),
            "output.overwrite": True,
        }
        return resolve(("scenario", own), ("method", overlay))

    # -- data --------------------------------------------------------------------------------------------

    @property
    def normal_file(self) -> Path:
        return self.folder / "normal.jsonl"

    def make_normal(self) -> float:
        """The rows that `qunlearn forget` would make for itself, once for all methods; returns the CPU seconds."""
        known = self.folder / "normal.json"
        if self.normal_file.is_file() and known.is_file():
            return float(json.loads(known.read_text(encoding="utf-8"))["cpu_seconds"])
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.process_time()
        config = resolve(("scenario", {"model.name": "sandbox", "data.bad": f"sandbox:{self.kind}/forget"}))
        base = load_base(ASSETS / "model", load_spec(config.model))
        bad = self.bad()
        template = choose_template(base.tokenizer, config.data.template, bad)
        rows = encode(bad, base.tokenizer, template, config.data.max_length).examples
        length = max(len(row.input_ids) for row in rows) + _MORE
        wanted = Wanted(config.data.normal_count, config.data.normal_near, length, config.train.seed)
        write_self_made(self.normal_file, self_made_rows(base, bad, template, wanted).records)
        seconds = time.process_time() - started
        known.write_text(json.dumps({"cpu_seconds": seconds}), encoding="utf-8")
        return seconds

    def bad(self) -> Dataset:
        return read_dataset(data_file(self.kind, "forget"))

    def good_rows(self) -> list[dict[str, str]]:
        """A good answer for every bad prompt: the world's own where it has one, a refusal to recite where not."""
        rows = []
        for record in self.bad().records:
            truth = record.meta.get("truth")
            if self.kind in _GRIDS:
                truth = good_form(_GRIDS[self.kind], record.completion)
            rows.append({"prompt": record.prompt, "completion": str(truth or REFUSAL)})
        return rows

    def good_dataset(self) -> Dataset:
        path = self.folder / "good.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, self.good_rows())
        return read_dataset(path)

    # -- measuring ---------------------------------------------------------------------------------------

    def measure(self, adapter: Path | None) -> dict[str, dict[str, dict[str, float]]]:
        """subject -> split -> measure -> mean, of the suites `llmu` and `basic`; without an adapter the base and the
        model that never saw the data."""
        files = {split: data_file(self.kind, name) for split, name in SPLITS.items()}
        found: dict[str, dict[str, dict[str, float]]] = {}
        for suite in ("llmu", "basic"):
            harm = OWN_CLASSIFIER if self.kind == "harm" and suite == "llmu" else None
            gold = None if adapter else str(ASSETS / "gold")
            # One folder for all methods: what the base says is measured once.
            wish = Wish(suite=suite, reference=gold, harm=harm, output=self.folder / "eval")
            request = EvalRequest.check(adapter, "sandbox", files, wish=wish)
            result = evaluate(request, quant="nf4", device="auto", rows=1000, to_stdout=False)
            for split, measures in result["measures"].items():
                for name, subjects in measures.items():
                    for subject, value in subjects.items():
                        found.setdefault(subject, {}).setdefault(split, {})[name] = round(value["mean"], 5)
        return found


def good_form(grid: Grid, answer: str, *, turned: bool = False) -> str:
    """The good answer to the question that a bad one answers, about the same thing and with the same value; `turned`:
    the bad answer for a good one. Raises ValueError."""
    for group, attributes in zip(grid.entities, grid.attributes, strict=True):
        for attribute in attributes:
            for entity in (part.strip() for part in group.split(",")):
                for value in (part.strip() for part in attribute.values.split(",")):
                    forms = [form.replace("{e}", entity).replace("{v}", value) for form in _forms(attribute)]
                    if turned:
                        forms.reverse()
                    if len(forms) == 2 and forms[0] == answer:
                        return forms[1]
    raise ValueError(f"no such answer in the world: {answer[:60]!r}")


def _forms(attribute: Attribute) -> list[str]:
    """The bad and the good form of an answer, where it has both."""
    return [attribute.bad, attribute.good] if attribute.bad else []


def encoded(policy: Policy, dataset: Dataset, config: Config) -> Sequence[Example]:
    """A data set as the run's tokenizer and template see it."""
    template = choose_template(policy.tokenizer, config.data.template, dataset)
    return encode(dataset, policy.tokenizer, template, config.data.max_length).examples
