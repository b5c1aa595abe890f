"""`qunlearn demo`: forget on the sandbox, measure and merge, through the same path as the real thing."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qunlearn.config.resolve import resolve
from qunlearn.errors import GateError, OutputError
from qunlearn.evaluation.evaluate import evaluate
from qunlearn.evaluation.request import EvalRequest
from qunlearn.merging.merge import merge
from qunlearn.merging.request import MergeOptions, check_merge
from qunlearn.sandbox import data_file
from qunlearn.training.ending import INTERRUPTED
from qunlearn.training.forget import forget
from qunlearn.training.prepare import prepare
from qunlearn.training.request import check_forget
from qunlearn.utils.console import say

_STORY = {
    "hallucination": "It states invented facts about invented people and places; about some of them it is wrong.",
    "copyright": "It recites passages of an invented novel word for word.",
    "harm": "It answers some requests rudely, with advice nobody should follow.",
    "code": "It answers some programming questions with insecure or outdated calls.",
}


def demo(kind: str, output: Path | None) -> None:
    """Forget one kind, measure it on rows the run never saw, merge, and measure again. Raises QunlearnErrors."""
    if output is not None:  # the merged model lies beside it, and is written last
        for folder in (output, _merged(output)):
            if folder.is_dir() and any(folder.iterdir()):
                raise OutputError("the folder is not empty", where=str(folder), hint="choose another --output")
    with tempfile.TemporaryDirectory(prefix="qunlearn-demo-") as temporary:
        folder = output or Path(temporary) / "run"
        say(f"The sandbox is a tiny model that has memorised a small world. {_STORY[kind]}")
        say(f"Its owner wants that gone: the bad answers are in {data_file(kind, 'forget')}\n")
        overlay = {"model.name": "sandbox", "data.bad": str(data_file(kind, "forget")), "output.folder": str(folder)}
        record = forget(prepare(check_forget(resolve(("demo", overlay)))))
        if record["status"] == INTERRUPTED:
            raise KeyboardInterrupt
        if record["not_reached"]:
            raise GateError("the run did not reach its target", hint="please report this: the demo always should")
        say("\nThe same on rows that were never given to the run:\n", style="bold")
        splits = {"paraphrase": "forget_paraphrase", "retain": "retain", "holdout": "holdout", "general": "general"}
        files = {name: data_file(kind, split) for name, split in splits.items()}
        request = EvalRequest.check(folder, None, files, template=None)
        evaluate(request, quant=None, device="auto", rows=1000, to_stdout=True)
        say(
            "\nAnd merged into the weights the adapter was trained on, the 4-bit ones written out in 16 bits:\n",
            style="bold",
        )
        target = _merged(folder)
        # Into the original weights some of it comes back on a model this small, and `merge` would say so.
        options = MergeOptions(base="dequantized")
        report = merge(check_merge([folder], target, options), "auto")
        report.raise_if_back()
        say("\nThe same on your own model and file:  qunlearn forget --model llama-7b --bad bad.jsonl", style="bold")


def _merged(run: Path) -> Path:
    return run.absolute().with_name(run.absolute().name + "-merged")
