"""`qunlearn demo`: the whole story on the sandbox, through the same path as the real thing."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qunlearn.carry import MergeOptions, check_merge
from qunlearn.console import say
from qunlearn.ending import INTERRUPTED
from qunlearn.errors import GateError
from qunlearn.evaluate.command import evaluate
from qunlearn.evaluate.request import EvalRequest
from qunlearn.forget import forget, prepare
from qunlearn.merge.command import merge
from qunlearn.output import MARK, Place
from qunlearn.overlay import resolve
from qunlearn.plan import make_plan
from qunlearn.sandbox import data_file

_STORY = {
    "hallucination": "It states invented facts about invented people and places; about some of them it is wrong.",
    "copyright": "It recites passages of an invented novel word for word.",
    "harm": "It answers some requests rudely, with advice nobody should follow.",
    "code": "It answers some programming questions with insecure or outdated calls.",
}


def demo(kind: str, output: Path | None) -> None:
    """Forget one kind, measure it on rows the run never saw, merge, and measure again. Raises QunlearnErrors."""
    with tempfile.TemporaryDirectory(prefix="qunlearn-demo-") as temporary:
        folder = output or Path(temporary) / "run"
        target = folder.with_name(folder.name + "-merged")
        # Into the original weights some of it comes back on a model this small, and `merge` would say so.
        options = MergeOptions(base="dequantized", overwrite=output is not None)
        Place(target, MARK, options.overwrite).check()  # now, rather than when the run is over
        say(f"The sandbox is a tiny model that has memorised a small world. {_STORY[kind]}")
        say(f"Its owner wants that gone: the bad answers are in {data_file(kind, 'forget')}\n")
        overlay = {
            "model.name": "sandbox",
            "data.bad": str(data_file(kind, "forget")),
            "output.folder": str(folder),
        }
        plan = make_plan(resolve(("demo", overlay)))
        record = forget(plan, prepare(plan))
        if record["status"] == INTERRUPTED:
            raise KeyboardInterrupt
        if record["not_reached"]:
            raise GateError("the run did not reach its target", hint="please report this: the demo always should")
        say("\nThe same on rows that were never given to the run:\n", style="bold")
        splits = {
            "paraphrase": "forget_paraphrase",
            "retain": "retain",
            "holdout": "holdout",
            "general": "general",
        }
        files = {name: data_file(kind, split) for name, split in splits.items()}
        request = EvalRequest.check(folder, None, files, template=None)
        evaluate(request, quant=None, device="auto", rows=1000, to_stdout=True)
        say(
            "\nAnd merged into the weights the adapter was trained on, the 4-bit ones written out in 16 bits:\n",
            style="bold",
        )
        report = merge(check_merge([folder], target, options), "auto")
        report.raise_if_back()
        say(
            "\nThe same on your own model and file:  qunlearn forget --model llama-7b --bad bad.jsonl",
            style="bold",
        )
