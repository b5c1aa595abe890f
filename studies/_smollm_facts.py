"""Facts of SmolLM2-135M-Instruct to audit: the first sentences of its own greedy answers about people.

An attack asks whether most words of a fact come back, and what a small model says freely is never said alike beyond its
first sentence. Nothing was chosen on the people of the set that is audited.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import _smollm_data as data
import _smollm_model as smollm
from _smollm_data import FORGET, GENERAL, NEIGHBOURS, REWORDED, Question
from qunlearn.attack.facts import new_words
from qunlearn.data.records import write_jsonl
from qunlearn.data.tokenize import decode
from qunlearn.evaluation.metrics.verdicts import is_gibberish
from qunlearn.model.load import LoadSpec, load_base

SET = "validation"
_SENTENCE = re.compile(r".+?\w{2}[.!?](?=\s|$)", re.DOTALL)
_FEWEST_NEWS, _MOST_TOKENS = 3, 32  # words that the question does not have; what is asked costs as the longest answer
_ASKED_ALIKE = {"explain": "who", "year": "born", "famous": "known", "short": "life"}  # a rewording, and of what


def facts_folder() -> Path | None:
    """Return the folder with a file of rows a split, made once; None where SmolLM2 is not installed."""
    model, folder = smollm.model_folder(), smollm.worlds_folder() / f"{smollm.NAME}-facts"
    if model is None:
        return None
    if not (folder / "general.jsonl").is_file():
        _write(model, folder)
    return folder


def _write(model: Path, folder: Path) -> None:
    """Ask the base in nf4, as it is audited, and keep what it answers with a sentence."""
    base, asked = load_base(model, LoadSpec("nf4")), data.questions("people", SET)

    def told(questions: Sequence[Question]) -> list[tuple[Question, str]]:
        texts = [decode(ids, base.tokenizer) for ids in smollm.said(base, questions)]
        found = [(q, _SENTENCE.match(text)) for q, text in zip(questions, texts, strict=True)]
        kept = [(q, m.group()) for q, m in found if m is not None and not is_gibberish(m.group())]
        return [(q, text) for q, text in kept if len(new_words(text, q.prompt)) >= _FEWEST_NEWS and is_short(text)]

    def is_short(text: str) -> bool:
        return len(base.tokenizer(text, add_special_tokens=False)["input_ids"]) <= _MOST_TOKENS

    forget = told(asked[FORGET])
    of_form = {(q.topic, q.form): text for q, text in forget}
    kept = told(data.own_questions())
    wanted = [(q, (q.topic, _ASKED_ALIKE[q.form])) for q in asked[REWORDED]]
    splits = {
        "forget": forget,
        "paraphrase": [(q, of_form[key]) for q, key in wanted if key in of_form],
        "normal": kept,
        "retain": kept,
        "holdout": told(asked[NEIGHBOURS]),
        "general": told(asked[GENERAL]),  # the last: what is there is whole
    }
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for split, rows in splits.items():
        write_jsonl(folder / f"{split}.jsonl", [{"prompt": q.prompt, "completion": text} for q, text in rows])
