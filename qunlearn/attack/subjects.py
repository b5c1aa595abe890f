"""Subjects: the original, the unlearned and the control, of which one checkpoint at a time is in memory."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qunlearn.attack.bench import Bench
from qunlearn.attack.cells import CONTROL, MERGED, ORIGINAL, PLACEBO, UNGUARDED, UNLEARNED, Cells, Place
from qunlearn.attack.request import AuditRequest
from qunlearn.attack.weights import scaled
from qunlearn.config.settings import LoraConfig
from qunlearn.data.tokenize import Template, choose_template
from qunlearn.evaluation.request import GuardLike
from qunlearn.hub.checked import CheckedModel
from qunlearn.hub.positions import positions_of
from qunlearn.merging.gguf import read_back_as
from qunlearn.model.load import Base, load_base, load_spec
from qunlearn.model.policy import Policy
from qunlearn.utils.console import stage, warn


@dataclass(frozen=True)
class Checkpoint:
    """A model on the disk and the subjects that it stands for; `gguf`: the file that it is read from."""

    model: CheckedModel
    adapter: Path | None
    subjects: tuple[str, ...]
    gguf: Path | None = None


def checkpoints(request: AuditRequest) -> list[Checkpoint]:
    """Return what is loaded, in this order: the original first, for it says which rewordings ask the same."""
    run, control = request.given.run, request.given.retrained
    own = (UNLEARNED, *([UNGUARDED] if request.given.guard else []), *([] if control else [PLACEBO]))
    here = run is not None or (request.given.guard is not None and request.original is None)
    found = [Checkpoint(request.original, None, (ORIGINAL,))] if request.original else []
    found.append(Checkpoint(request.given.model, run.adapter if run else None, (ORIGINAL, *own) if here else own))
    found += [Checkpoint(request.merged, None, (MERGED,), request.gguf)] if request.merged else []
    return [*found, *([Checkpoint(control, None, (CONTROL,))] if control else [])]


class Loaded:
    """A checkpoint, loaded when first asked for and released at the end."""

    def __init__(self, request: AuditRequest, checkpoint: Checkpoint) -> None:
        self.request, self.checkpoint = request, checkpoint
        self._policy: Policy | None = None
        self._closing = contextlib.ExitStack()
        self._checked: set[str] = set()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        self._policy = None
        self._closing.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def policy(self) -> Policy:
        """The model with the adapter under audit, or with one that changes nothing."""
        if self._policy is None:
            folder, quant = self._folder()
            spec = load_spec(self.request.config.model, quant=quant)
            with stage(f"loading the model: {' and '.join(self.checkpoint.subjects)}"):
                base = load_base(folder, spec)
                for note in base.notes:
                    warn(note)
                self._policy = self._with_adapter(base)
        return self._policy

    def _folder(self) -> tuple[Path, str | None]:
        """The folder to load, and in which quantisation: a GGUF file is read into one that lasts as long as this."""
        model, file = self.checkpoint.model, self.checkpoint.gguf
        if file is None:
            return model.folder, self.request.quant
        folder = Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="qunlearn-gguf-")))
        read_back_as(file, model.folder, folder, trust=self.request.config.model.trust_remote_code)
        return folder, "none"

    def _with_adapter(self, base: Base) -> Policy:
        recomputes = self.request.config.train.recomputes and base.device.type == "cuda"
        if self.checkpoint.adapter is None:
            return Policy.new(base, LoraConfig(), seed=0, checkpointing=recomputes)
        return Policy.load(base, self.checkpoint.adapter)

    @contextlib.contextmanager
    def bench(self, place: Place, cells: Cells) -> Iterator[Bench]:
        """The bench of an attack on a subject: the adapter is off for the original, a guard on for the unlearned model
        alone."""
        policy, request, subject = self.policy, self.request, place.subject
        guard = request.given.guard if subject == UNLEARNED else None
        facts = request.inputs.placebo if subject == PLACEBO else request.inputs.facts
        length = min(request.config.data.max_length, positions_of(self.checkpoint.model.facts.config))
        made = Bench(
            subject, policy, policy, request.inputs, facts, self._template(), request.config, request.effort,
            cells, length,
        )  # fmt: skip
        policy.model.eval()
        off = scaled(policy, 0.0) if place.family == "relearning" else policy.reference()  # which is not trained
        with off if subject == ORIGINAL else contextlib.nullcontext():
            if subject not in self._checked:
                made.check_finite()
                self._checked.add(subject)
            if guard is None:
                yield made
                return
            with worn(guard, policy) as unguarded:
                yield replace(made, unguarded=unguarded)

    def _template(self) -> Template:
        """The run's own template, unless another one is asked for, or the checkpoint has no such."""
        request, tokenizer = self.request, self.policy.tokenizer
        stored = request.given.run.record.get("data", {}).get("template") if request.given.run else None
        if request.given.template is None and stored:  # plain texts are in none
            made = replace(Template(**stored), why="as in the run")
            if made.kind != "chat" or getattr(tokenizer, "chat_template", None):
                return made
        asked, sets = request.given.template or request.config.data.template, request.given.sets
        return choose_template(tokenizer, asked, sets["forget"], *sets.values())


class Loads:
    """The checkpoint that was last asked for, one at a time."""

    def __init__(self, request: AuditRequest) -> None:
        self._request, self._closing = request, contextlib.ExitStack()
        self._loaded: Loaded | None = None

    def __enter__(self) -> Loads:
        return self

    def __exit__(self, *error: object) -> None:
        self._loaded = None
        self._closing.close()

    def bench(self, checkpoint: Checkpoint, place: Place, cells: Cells) -> contextlib.AbstractContextManager[Bench]:
        """The bench of an attack, of the checkpoint that stands for its subject."""
        if self._loaded is None or self._loaded.checkpoint is not checkpoint:
            self._loaded = None
            self._closing.close()
            self._loaded = self._closing.enter_context(Loaded(self._request, checkpoint))
        return self._loaded.bench(place, cells)


@contextlib.contextmanager
def worn(guard: GuardLike, policy: Policy) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Guard a policy while the block runs; yields what takes the guard off in between. Raises GuardError."""
    with contextlib.ExitStack() as stack:

        @contextlib.contextmanager
        def off() -> Iterator[None]:
            stack.close()
            try:
                yield
            finally:
                stack.enter_context(guard.on(policy.model, policy.tokenizer))

        stack.enter_context(guard.on(policy.model, policy.tokenizer))
        yield off
