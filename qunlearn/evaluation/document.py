"""Write docs/evaluation.md from the catalogue and the docstrings: `python -m qunlearn.evaluation.document`."""

from __future__ import annotations

import importlib
import inspect
import sys

from qunlearn.evaluation.catalog import MEASURES, SUITES
from qunlearn.evaluation.conclusion import conclude
from qunlearn.evaluation.metrics import membership, stats, tokens, verdicts

_UNITS = {
    "%": "share of rows, in %",
    "p": "0 to 1",
    "nats": "nats per token",
    "ppl": "perplexity",
    "bits": "bits",
    "score": "the judge's own unit",
    "%point": "in %",
}
_ARROWS = {"down": "down", "up": "up", "retrained": "as the retrained model", "": "–"}

_INTRO = """# What `qunlearn eval` measures

Made by `make docs` from the docstrings; a test compares the two.

```
qunlearn eval RUN --data FOLDER                      # forget, paraphrase, retain, holdout, general: what is there
qunlearn eval RUN --forget f.jsonl --holdout h.jsonl --suite tofu --retrained-model NEVER_SAW_IT
qunlearn eval MODEL --adapter A --data sandbox:harm --suite llmu --harm-classifier sandbox -o results
```

Five kinds of rows are told apart. `forget` is what was to be forgotten, `paraphrase` the same asked in other words and
never given to the run; `retain` is data that was given to keep, `holdout` its neighbours that were never given, and
`general` anything else. Without a model that never saw the data, `paraphrase` and `holdout` are the controls; with one
(`--retrained-model`), the distance to it is the measure that counts: it answers neither right nor strangely.

Every row is asked twice: its true answer is scored token by token behind its prompt (one pass), and the prompt is
continued greedily up to the end of the text or of the turn: by the likeliest tokens, without the repetition penalty and
the like that the `generation_config.json` of many chat models asks for. Rows may carry more than prompt and answer:
wrong answers (`perturbed`, `perturbed_answer`), the answer in other words (`paraphrased_answer`), what is true where
the answer is false (`truth`, `right_answer`).

What a model says is kept in the run (or in `-o FOLDER`): `eval.json` with every row, its texts, values and verdicts,
and `eval-cache`, one file per model, adapter, data and pass, so that a second call measures only what is new. Both are
readable by their owner alone. What is printed, and `--json`, holds no text of any row.

## While training

```
qunlearn forget --model M --bad bad.jsonl --holdout neighbours.jsonl --eval-every 20
```

Every so many steps, before the first, and where all steps are done after the last, exact match, still leaks,
probability and extraction strength (all as below) are measured on at most 128 rows (`stop.probe_rows`) of the bad
file and of the `--holdout` file; without one, of the normal rows held back. They go into `metrics.jsonl`
(`measured`), the progress line and the report's picture of what comes back and what stays. None by default. It is
done between two steps; nothing of the training hangs on it: the adapter is the same, bit for bit, and so are a
resumed run's measures.

The holdout is never trained on. A row that is in it and in the bad or normal file is an error; rows that the base makes
of its own are dropped where they ask what the holdout asks, which is the one way in which `--holdout` changes a run.
`qunlearn eval RUN` measures the bad and the holdout file unless it is told of others.

## Side by side

```
qunlearn ask RUN "..."                               # one question to the base and to the adapter on it
qunlearn chat RUN                                    # line after line, typed or piped; --json: an object a line
```

Both put the question as the run put its own, and stream at a terminal. In a chat each line stands by itself, for two
models would soon talk of different things. Control characters in an answer are shown, not obeyed.

## Time and memory

Answers come in batches of like length: as many rows as the key-value cache admits (1 GiB),
256 at most on a CPU, 2,048 on a GPU; token scores in passes of at most `--max-tokens`, with tiles of logits. What
grows with the data are its texts and a few numbers a row. `make bench-eval` measures it: benchmarks/RESULTS.md.
"""


def document() -> str:
    """The whole page."""
    parts = [_INTRO, "## Intervals", _text(stats.estimate), "## Verdicts", _verdicts(), "## Suites", _suites()]
    parts += [_judgement(), "## Measures", _how_to_read()]
    parts += [_measure(name) for name in MEASURES]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _verdicts() -> str:
    return f"{_text(verdicts.verdict)}\n\n{_text(verdicts).split(chr(10) * 2, 1)[-1]}"


def _judgement() -> str:
    return "The conclusion printed last has one of seven levels.\n\n" + _text(conclude)


def _suites() -> str:
    blocks = []
    for name, suite in SUITES.items():
        lines = [f"**`{name}`** {suite.about}", ""]
        for side, measures in (("to forget", suite.forget), ("to keep", suite.keep), ("over all to keep", suite.whole)):
            if measures:
                lines.append(f"- {side}: " + "; ".join(MEASURES[m].title for m in measures))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _how_to_read() -> str:
    return (
        '"Forget" and "keep" say where a measure should go on rows to forget and rows to keep. The membership measures '
        "are AUCs of `forget` against `holdout`. " + _text(membership.auc).split("\n\n")[0] + " They mean membership\n"
        "only where the model never saw the holdout rows; where it did, as in the sandbox, the retrained model's tell."
        "\n\nMeasures of right against wrong answers start from one number. " + _text(tokens.truth_ratio)
    )


def _measure(name: str) -> str:
    m = MEASURES[name]
    module, _, function = m.definition.rpartition(".")
    found = getattr(importlib.import_module(f"qunlearn.evaluation.{module}"), function)
    facts = f"{_UNITS[m.unit]}; forget: {_ARROWS[m.forget]}, keep: {_ARROWS[m.keep]}"
    facts += f"; needs {m.asks}" if m.asks else "; needs rows with wrong answers" if "choices" in m.needs else ""
    within = ", ".join(suite for suite, s in SUITES.items() if name in (*s.forget, *s.keep, *s.whole))
    return f"### {m.title}\n\n`{name}`; {facts}; in {within}.\n\n{_text(found)}"


def _text(thing: object) -> str:
    return inspect.getdoc(thing) or ""


if __name__ == "__main__":
    sys.stdout.write(document())
