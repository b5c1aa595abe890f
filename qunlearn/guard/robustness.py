"""Attack the gate: prompts to forget dressed in ways that it was not trained on, and how many still are flagged."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from qunlearn.data.records import Dataset, Record
from qunlearn.evaluation.metrics.stats import wilson
from qunlearn.evaluation.results import is_forget
from qunlearn.guard.attach import Attachment
from qunlearn.guard.disguises import ATTACKS, asked_of
from qunlearn.guard.subjects import turns_of
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.language_model import LanguageModel
from qunlearn.utils.console import Column, table

_TIMED_TOKENS = 64


def gate_errors(attachment: Attachment, sets: Mapping[str, Dataset]) -> dict[str, dict[str, Any]]:
    """Return, of each split, how many prompts were judged wrongly, with Wilson's 95 % interval."""
    out = {}
    for name, dataset in sets.items():
        flagged, n = attachment.flags([turns_of(record) for record in dataset.records]), len(dataset.records)
        wrong = n - flagged if is_forget(name) else flagged
        out[name] = _share(wrong, n, "misses" if is_forget(name) else "false alarms")
    return out


def robustness(attachment: Attachment, bad: Sequence[Record], normal: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Return the misses under each attack on the bad prompts, and the false alarms where normal ones are so dressed:
    a gate that flags every long text would miss nothing. Last come bad prompts behind a normal one."""
    kinds = (("misses", asked_of(bad, normal)), ("false alarms", asked_of(normal, bad)))
    out = {}
    for name, attack in ATTACKS.items():
        for what, asked in kinds:
            if asked:
                flagged = attachment.flags([attack(one) for one in asked])
                wrong = len(asked) - flagged if what == "misses" else flagged
                out[name if what == "misses" else f"{name}, normal"] = _share(wrong, len(asked), what)
    other = kinds[1][1][0].prompt if normal else "How are you today?"
    behind = [(f"{other} {one.prompt}",) for one in kinds[0][1]]
    out["behind another question"] = _share(len(behind) - attachment.flags(behind), len(behind), "misses")
    return out


def cost(lm: LanguageModel, attachment: Attachment, prompt: Sequence[int], repeats: int = 5) -> dict[str, float]:
    """Return ms to judge a prompt, and to answer it with 64 tokens by the bare model; medians."""
    text = lm.tokenizer.decode(list(prompt), skip_special_tokens=True)
    judged, answered = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        attachment.judge([text])
        judged.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        generate(lm, [prompt], Sampling(_TIMED_TOKENS))
        answered.append(time.perf_counter() - begin)
    gate, answer = (1e3 * sorted(times)[repeats // 2] for times in (judged, answered))
    return {"prompt_tokens": len(prompt), "gate_ms": gate, "answer_ms": answer, "share": gate / answer}


def show_gate(errors: Mapping[str, Any], attacks: Mapping[str, Any], *, to_stdout: bool) -> None:
    """One line a split and attack, with its interval."""
    columns = [Column("", False), Column("", False), Column("of"), Column("share")]
    rows = [
        [name, found["what"], f"{found['wrong']} of {found['n']}", _shown(found)]
        for name, found in (*errors.items(), *attacks.items())
    ]
    table("The gate: errors [95 % interval]", columns, rows, to_stdout=to_stdout)


def _share(wrong: int, n: int, what: str) -> dict[str, Any]:
    found = wilson(wrong, n)
    return {"what": what, "wrong": wrong, "n": n, "share": found.mean, "low": found.low, "high": found.high}


def _shown(found: Mapping[str, Any]) -> str:
    share = f"{100 * found['share']:.1f} %"
    ends = (found["low"], found["high"])
    return share if None in ends else f"{share} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
