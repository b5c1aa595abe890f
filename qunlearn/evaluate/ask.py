"""`qunlearn ask`: one question to the base and to the adapter on it, side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qunlearn.carry import run_config
from qunlearn.console import clean, out, stage
from qunlearn.data.records import Dataset, Record
from qunlearn.data.tokenize import Template, choose_template, decode, encode_record
from qunlearn.errors import ConfigError
from qunlearn.evaluate.view import ADAPTER, BASE
from qunlearn.model.generate import Sampling, generate, stream
from qunlearn.model.load import Base, LanguageModel, LoadSpec, load_base
from qunlearn.model.policy import Policy
from qunlearn.plan import check_run_model
from qunlearn.run import Run, open_run


def ask(
    folder: Path,
    question: str,
    *,
    model: str | None,
    device: str,
    sampling: Sampling,
    to_stdout: bool,
    base_only: bool = False,
) -> dict[str, Any]:
    """Both answers, or with `base_only` the base's without the adapter being loaded, printed as they come on a
    terminal. Raises QunlearnErrors."""
    if not question.strip():
        raise ConfigError("the question is empty", where="ask", hint='qunlearn ask RUN "..."')
    run, config = open_run(folder), run_config(folder)
    checked = check_run_model(run, model)
    m = config.model
    with stage("loading the model"):
        base = load_base(checked.folder, LoadSpec(m.quant, m.double_quant, device, m.trust_remote_code))
        policy = None if base_only else Policy.load(base, run.adapter)
    prompt = _prompt(question, base, run, config.data.template)
    answers: dict[str, str] = {}
    if policy is None:
        answers[BASE] = _answer(base, prompt, sampling, BASE, to_stdout=to_stdout)
    else:
        with policy.reference():
            answers[BASE] = _answer(policy, prompt, sampling, BASE, to_stdout=to_stdout)
        answers[ADAPTER] = _answer(policy, prompt, sampling, ADAPTER, to_stdout=to_stdout)
    return {"question": question, "template": _template(base, run, config.data.template).name, "answers": answers}


def _answer(policy: LanguageModel, prompt: tuple[int, ...], sampling: Sampling, name: str, *, to_stdout: bool) -> str:
    console = out()
    if not to_stdout:
        return decode(generate(policy, [prompt], sampling)[0], policy.tokenizer)
    if not console.is_terminal:
        text = decode(generate(policy, [prompt], sampling)[0], policy.tokenizer)
        console.print(f"{name}: {clean(text)}", markup=False)
        return text
    console.print(name, style="bold")
    said: list[str] = []

    def hear(piece: str) -> None:
        said.append(piece)
        console.print(clean(piece), end="", markup=False)

    stream(policy, prompt, sampling, hear)
    console.print("\n")
    return "".join(said).strip()


def _prompt(question: str, base: Base, run: Run, asked: str) -> tuple[int, ...]:
    """The question as the run's template puts it, up to where the answer begins."""
    record = Record((("user", question),), "Yes", 0, {})
    example = encode_record(record, base.tokenizer, _template(base, run, asked))
    return example.input_ids[: example.start]


def _template(base: Base, run: Run, asked: str) -> Template:
    stored = run.record.get("data", {}).get("template")
    if stored:
        return replace(Template(**stored), why="as in the run")
    nothing = Dataset("", (), "question-answer", (), "", 0)
    return choose_template(base.tokenizer, asked, nothing)
