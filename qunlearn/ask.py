"""Ask the base model and the adapter on it the same questions: `qunlearn ask` and `chat`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from qunlearn.config.settings import Config
from qunlearn.data.paths import fields_of
from qunlearn.data.records import Dataset, Record, asking, read_dataset
from qunlearn.data.template import drops_system
from qunlearn.data.tokenize import Template, choose_template, decode, open_prompt
from qunlearn.errors import ConfigError, DataError, QunlearnError
from qunlearn.evaluation.results import ADAPTER, BASE
from qunlearn.guard.attach import Attachment, attached
from qunlearn.guard.guard import Guard
from qunlearn.hub.checked import check_model
from qunlearn.hub.download import resolve_model
from qunlearn.hub.positions import positions_of
from qunlearn.model.generate import Sampling, generate, stream
from qunlearn.model.language_model import LanguageModel
from qunlearn.model.load import Base, LoadSpec, load_base, load_spec
from qunlearn.model.policy import Policy
from qunlearn.runs.base_model import check_run_model, run_config
from qunlearn.runs.folder import Run, is_adapter_folder, open_run
from qunlearn.runs.recorded_files import recorded
from qunlearn.utils.console import clean, emit_json_line, out, say, stage, write_out
from qunlearn.utils.signals import answered


@dataclass(frozen=True)
class Asked:
    """Who is asked and how: the base, with its adapter unless the base is asked alone, as the run put its questions.

    system: the system prompt before every question. It may be the forget set's own, so it is never written anywhere.
    """

    base: Base
    policy: Policy | None
    template: Template
    sampling: Sampling
    to_stdout: bool
    system: str = ""
    guard: Attachment | None = None

    def answers(self, question: str) -> dict[str, str]:
        """The answer of each, printed as it comes on a terminal. Raises QunlearnErrors."""
        if not question.strip():
            raise ConfigError("the question is empty", where="ask", hint='qunlearn ask RUN "..."')
        prompt = self._prompt(question)
        if self.policy is None:
            with self._guarded():
                return {BASE: self._answer(self.base, prompt, BASE)}
        with self.policy.reference():
            before = self._answer(self.policy, prompt, BASE)
        with self._guarded():
            return {BASE: before, ADAPTER: self._answer(self.policy, prompt, ADAPTER)}

    def _guarded(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.guard is None else attached(self.guard)

    def _prompt(self, question: str) -> tuple[int, ...]:
        """The question as the run's template puts it, up to where the answer begins."""
        record = Record(asking(question, self.system), "Yes", 0, {})
        prompt = open_prompt(record, self.base.tokenizer, self.template)
        most = positions_of(self.base.model.config)
        if len(prompt) >= most:
            message = f"the question has {len(prompt)} tokens with its template; the model's positions end at {most}"
            raise ConfigError(message, where="ask", hint="ask something shorter")
        return prompt

    def _sampling(self, prompt: tuple[int, ...]) -> Sampling:
        """As asked for, as far as the model has positions: behind the last one it would talk nonsense."""
        left = positions_of(self.base.model.config) - len(prompt)
        return replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, left))

    def _answer(self, lm: LanguageModel, prompt: tuple[int, ...], name: str) -> str:
        console, sampling = out(), self._sampling(prompt)
        if not self.to_stdout:
            return decode(generate(lm, [prompt], sampling)[0], lm.tokenizer)
        if not console.is_terminal:
            text = decode(generate(lm, [prompt], sampling)[0], lm.tokenizer)
            write_out(f"{name}: {text}")
            return text
        console.print(name, style="bold")
        said: list[str] = []

        def hear(piece: str) -> None:
            said.append(piece)
            console.print(clean(piece), end="", markup=False)

        try:
            stream(lm, prompt, sampling, hear)
        finally:
            console.print("\n")
        return "".join(said).strip()


@dataclass(frozen=True)
class Asking:
    """How to ask. `system`: a system prompt, "" for none; None for the one that all bad rows of the run have.

    guard: the folder of a guard that stands before the adapter, or before the base asked alone.
    """

    sampling: Sampling
    device: str = "auto"
    to_stdout: bool = True
    base_only: bool = False
    trust: bool = False
    system: str | None = None
    guard: Path | None = None


def open_asked(folder: Path, model: str | None, how: Asking) -> Asked:
    """Load a run's base, and its adapter unless the base is asked alone; or the model that a guard stands before alone.

    Raises QunlearnErrors.
    """
    if how.guard is not None and _is_model(folder):
        if model is not None:
            raise ConfigError("two models were named", where="--model", hint="give a RUN folder, or one model")
        return _open_guarded(str(folder), how.guard, how)
    run, config = open_run(folder), run_config(folder, trust=how.trust)
    opened = None if how.guard is None else Guard.open(how.guard)
    checked = check_run_model(run, model, trust=how.trust)
    with stage("loading the model"):
        base = load_base(checked.folder, load_spec(config.model, device=how.device))
        policy = None if how.base_only else Policy.load(base, run.adapter)
    guard = None if opened is None else opened.attachment(base.model, base.tokenizer)
    template = _template(base, run, config.data.template)
    is_left_out = drops_system(template, base.tokenizer)
    if how.system is None and not is_left_out:
        system = rows_system(run, config)
    else:
        system = _given_system(how, is_left_out=is_left_out)
    return Asked(base, policy, template, how.sampling, how.to_stdout, system, guard)


def _is_model(folder: Path) -> bool:
    """Return whether a folder is a model's, or the name of none is one."""
    return not folder.exists() or ((folder / "config.json").is_file() and not is_adapter_folder(folder))


def _open_guarded(model: str, folder: Path, how: Asking) -> Asked:
    """Load a model and a guard that was fitted on it, and ask with the template of the guard's bad rows."""
    guard = Guard.open(folder)
    checked = check_model(resolve_model(model), how.trust)
    with stage("loading the model"):
        base = load_base(checked.folder, LoadSpec("nf4", device=how.device, trust_remote_code=how.trust))
    name = str(guard.report.get("template"))
    template = _chosen(base, name if name in ("chat", "qa", "raw") else "auto")
    system = _given_system(how, is_left_out=drops_system(template, base.tokenizer))
    attachment = guard.attachment(base.model, base.tokenizer)
    return Asked(base, None, template, how.sampling, how.to_stdout, system, attachment)


def _given_system(how: Asking, *, is_left_out: bool) -> str:
    """Return the system prompt that was asked for, "" for none and where the template leaves it out, which is said."""
    if how.system and is_left_out:
        say("asked without the system prompt: the model's chat template leaves it out")
        return ""
    return _as_text(how.system or "")


def rows_system(run: Run, config: Config) -> str:
    """Return the system prompt that all bad rows of a run have, "" where they have none or several, and say which.

    Such a model was trained behind it, and answers otherwise without.
    """
    count = run.record.get("data", {}).get("bad", {}).get("systems")
    if count == 0:
        return ""
    found, why = recorded(run, "bad"), ""
    systems: set[str] = set()
    if found.usable is None:
        why = f"the file of bad answers {found.why}" if count and found.path is not None else ""
    else:
        try:
            systems = {record.system for record in read_dataset(found.usable, fields_of(config.data)).records}
        except DataError:  # a row that is refused today; what is wrong with it is no matter of a question
            why = "the file of bad answers cannot be read"
    if len(systems) > 1:
        why = "the bad rows have several system prompts, or some have none"
    if why:
        say(f"asked without a system prompt: {why} (--system TEXT gives one)")
        return ""
    system = next(iter(systems), "")
    if system:
        say("asked behind the system prompt that every bad row of the run has (--system '' leaves it out)")
    return system


def _as_text(typed: str) -> str:
    """From a shell that does not speak UTF-8: bytes that are no text are asked all the same, as those of a pipe are."""
    return typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def ask(asked: Asked, question: str) -> dict[str, Any]:
    """One question, and what it was put as. Raises QunlearnErrors."""
    question, answers = _as_text(question), asked.answers(_as_text(question))
    return {"question": question, "template": asked.template.name, "system": bool(asked.system), "answers": answers}


def chat(asked: Asked, lines: TextIO) -> int:
    """Answer line after line until they end; each on its own, for two models would soon talk of different things.

    At a terminal a fault or Ctrl-C ends an answer, not the talk; elsewhere a fault ends it. Returns how many were
    answered. Raises QunlearnErrors.
    """
    count, person = 0, lines.isatty()
    if person:
        say("Each line is asked by itself; Ctrl-C stops an answer, Ctrl-D ends.", style="dim")
    for line in _typed() if person else lines:
        if not line.strip():
            continue
        with _forgiving(person):
            found = ask(asked, line.strip())
            count += 1
            if not asked.to_stdout:
                emit_json_line(found)
    return count


@contextlib.contextmanager
def _forgiving(person: bool) -> Iterator[None]:
    try:
        yield
    except QunlearnError as error:
        if not person:
            raise
        say(f"error: {error}", style="bold red")
    except KeyboardInterrupt:
        if not person:
            raise
        answered()
        say("(stopped)", style="dim")


def _typed() -> Iterator[str]:
    """Lines from a person, with editing where the system has it. Ends with Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it once it is there
    while True:
        try:
            yield input("> ")
        except EOFError:
            say()
            return


def _template(base: Base, run: Run, asked: str) -> Template:
    stored = run.record.get("data", {}).get("template")
    if stored:
        return replace(Template(**stored), why="as in the run")
    return _chosen(base, asked)


def _chosen(base: Base, asked: str) -> Template:
    return choose_template(base.tokenizer, asked, Dataset("", (), "question-answer", (), "", 0))
