"""Convert the rows of published data sets to prompts and completions.

A converter yields rows, or a text: why there is none. What is no row of the format at all is a ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qunlearn.utils.text import is_clean

BAD, NORMAL, PARAPHRASE = "bad", "normal", "paraphrase"
Row = Mapping[str, Any]
Made = Iterator["dict[str, Any] | str"]


@dataclass(frozen=True)
class Format:
    """`sides`: what can be taken of a row, the default first. `hub`: where it is published, with subset and part."""

    about: str
    sides: tuple[str, ...]
    convert: Callable[[Row, str], Made]
    hub: str = ""
    bare_text: bool = False  # a text in a list is a row


def _pair(prompt: str, completion: str, **meta: Any) -> Made:
    """A row, or what is missing in it."""
    if not prompt.strip():
        yield "the prompt is empty"
    elif not completion.strip():
        yield "the answer is empty"
    elif not (is_clean(prompt) and is_clean(completion)):
        yield "a NUL or half of a surrogate pair"
    else:
        yield {"prompt": prompt, "completion": completion, **{k: v for k, v in meta.items() if v}}


def _text(row: Row, *names: str) -> str:
    """The first of the fields that is there. Raises ValueError."""
    name = next((n for n in names if n in row), None)
    if name is None:
        there = ", ".join(repr(str(n)[:30]) for n in list(row)[:12]) or "none"
        raise ValueError(f"no field {' or '.join(map(repr, names))}; its fields are {there}")
    value = row[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is not a text")
    return value


def _has(row: Row, *names: str) -> bool:
    return all(name in row for name in names)


def _truth(row: Row, name: str) -> bool:
    """A yes or no in any of the spellings of JSON, CSV and the data sets. Raises ValueError."""
    value = row.get(name)
    words = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
    if isinstance(value, bool):
        return value
    known = words.get(str(value).strip().lower())
    if known is None:
        raise ValueError(f"{name!r} is neither yes nor no")
    return known


def _list(row: Row, *names: str) -> list[str]:
    """Texts of a list, or of a text with semicolons between them. Raises ValueError."""
    value = next((row[n] for n in names if n in row), None)
    if value is None:
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(";") if part.strip()]
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{names[0]!r} is neither a text nor a list of texts")
    return [text for text in value if text.strip()]


# -- HaluEval (arXiv 2305.11747) -------------------------------------------------------------------------

# qa_data, dialogue_data, summarization_data: prompt, right answer, hallucinated answer.
_TASKS = (
    ("question", "right_answer", "hallucinated_answer"),
    ("dialogue_history", "right_response", "hallucinated_response"),
    ("document", "right_summary", "hallucinated_summary"),
)


def _halueval(row: Row, side: str) -> Made:
    for prompt, right, wrong in _TASKS:
        if _has(row, right, wrong):
            good, bad = _text(row, right), _text(row, wrong)
            if good.strip() == bad.strip():
                yield "the hallucinated answer is the right one"
            elif side == BAD:
                yield from _pair(_text(row, prompt), bad, truth=good)
            else:
                yield from _pair(_text(row, prompt), good, perturbed=[bad] if bad.strip() else [])
            return
    # general_data, and the judged samples: one answer, and whether it is hallucinated.
    invented = _truth(row, "hallucination")
    if invented != (side == BAD):
        yield "not hallucinated" if side == BAD else "hallucinated"
        return
    yield from _pair(_text(row, "user_query", "question"), _text(row, "chatgpt_response", "answer"))


# -- TruthfulQA (arXiv 2109.07958) -----------------------------------------------------------------------


def _truthfulqa(row: Row, side: str) -> Made:
    question, best = _text(row, "Question", "question"), _text(row, "Best Answer", "best_answer")
    wrong = _list(row, "Incorrect Answers", "incorrect_answers")
    if side == NORMAL:
        yield from _pair(question, best, perturbed=wrong)
        return
    if not wrong:
        yield "no incorrect answer"
    for answer in wrong:
        yield from _pair(question, answer, truth=best)


# -- PKU-SafeRLHF (arXiv 2406.15513) ---------------------------------------------------------------------


def _saferlhf(row: Row, side: str) -> Made:
    prompt = _text(row, "prompt")
    if not _has(row, "response_0", "response_1"):  # the question-answer form: one response a row
        answers = [(_text(row, "response"), _truth(row, "is_safe"))]
    else:
        answers = [(_text(row, f"response_{i}"), _truth(row, f"is_response_{i}_safe")) for i in (0, 1)]
        if answers[0] == answers[1]:
            yield "both responses are the same"
            answers = answers[:1]
    for answer, safe in answers:
        if safe == (side == BAD):
            yield "a safe response" if safe else "an unsafe response"
        else:
            yield from _pair(prompt, answer)


# -- TOFU (arXiv 2401.06121), MUSE (arXiv 2407.06460) ----------------------------------------------------


def _tofu(row: Row, side: str) -> Made:
    names = ("paraphrased_question",) if side == PARAPHRASE else ("question",)
    wrong = _list(row, "perturbed_answer") if isinstance(row.get("perturbed_answer"), (list, tuple)) else []
    other = row.get("paraphrased_answer")
    yield from _pair(
        _text(row, *names),
        _text(row, "answer"),
        perturbed=wrong,
        paraphrased_answer=other if isinstance(other, str) else "",
    )


def _muse(row: Row, side: str) -> Made:
    if _has(row, "question", "answer"):
        yield from _pair(_text(row, "question"), _text(row, "answer"))
    elif _has(row, "prompt", "gt"):
        yield from _pair(_text(row, "prompt"), _text(row, "gt"))
    else:
        text = _text(row, "text")
        if not text.strip():
            yield "the text is empty"
        elif not is_clean(text):
            yield "a NUL or half of a surrogate pair"
        else:
            yield {"text": text}


# -- instructions and preferences ------------------------------------------------------------------------


def _alpaca(row: Row, side: str) -> Made:
    prompt = _text(row, "instruction")
    more = _text(row, "input", "context") if _has(row, "input") or _has(row, "context") else ""
    answer = _text(row, "output", "response")
    yield from _pair(f"{prompt}\n\n{more}" if more.strip() and prompt.strip() else prompt, answer)


def _preference(row: Row, side: str) -> Made:
    prompt = _text(row, "prompt", "question", "instruction")
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if chosen.strip() == rejected.strip():
        yield "chosen and rejected are the same"
    elif side == BAD:
        yield from _pair(prompt, rejected, truth=chosen)
    else:
        yield from _pair(prompt, chosen)


FORMATS: Mapping[str, Format] = {
    "halueval": Format(
        "HaluEval: hallucinated answers as bad, right ones as normal",
        (BAD, NORMAL),
        _halueval,
        "hub:pminervini/HaluEval --subset qa --part data",
    ),
    "truthfulqa": Format(
        "TruthfulQA: the best answer as normal, incorrect ones as bad",
        (NORMAL, BAD),
        _truthfulqa,
        "hub:truthfulqa/truthful_qa --subset generation --part validation",
    ),
    "saferlhf": Format(
        "PKU-SafeRLHF: each unsafe response as bad, each safe one as normal",
        (BAD, NORMAL),
        _saferlhf,
        "hub:PKU-Alignment/PKU-SafeRLHF",
    ),
    "tofu": Format(
        "TOFU: question and answer; paraphrase takes the question in other words",
        (BAD, NORMAL, PARAPHRASE),
        _tofu,
        "hub:locuslab/TOFU --subset forget10",
    ),
    "muse": Format(
        "MUSE: text, or question and answer, or prompt and its continuation",
        (BAD, NORMAL),
        _muse,
        "hub:muse-bench/MUSE-News --subset raw --part forget",
        bare_text=True,
    ),
    "alpaca": Format(
        "Alpaca or Dolly: instruction, input or context, output or response",
        (NORMAL, BAD),
        _alpaca,
        "hub:tatsu-lab/alpaca",
    ),
    "preference": Format(
        "prompt, chosen, rejected: the rejected answer as bad, the chosen one as normal", (BAD, NORMAL), _preference
    ),
}
