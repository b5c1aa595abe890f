"""A guard as it is kept and used: open a folder, put it on a model, take it off again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qunlearn.errors import GuardError, ModelError
from qunlearn.guard.attach import TOKENS, Attachment, attached
from qunlearn.guard.classifier import ClassifierGate
from qunlearn.guard.corrupt import CORRUPTIONS, Corruption, overflow
from qunlearn.guard.encoder import Encoder
from qunlearn.guard.entities import Tagger
from qunlearn.guard.gate import Gate, StateReader
from qunlearn.guard.lexicon import Span
from qunlearn.guard.turns import Frame
from qunlearn.hub.fingerprint import fingerprint
from qunlearn.hub.safetensors_file import read_tensors
from qunlearn.model.load import load_tokenizer
from qunlearn.utils.files import write_json
from qunlearn.utils.json_files import read_object

WEIGHTS, SETTINGS = "guard.safetensors", "guard.json"
CLASSIFIER, NER = "classifier", "ner"  # folders, of a guard that has them
FORMAT = 4
_ROWS, _WIDE = 64, 16  # numbers of the embedding table whose signs tell a base from others
_OTHER_SIGNS = 0.02  # share of them that another precision may change: what is next to 0 may round to it
_MOST_DRAWN = 6.0  # standard deviations that no draw will exceed
_ON = "_qunlearn_guard"
_SHAPE = {
    "format": int,
    "base": {
        "type": str,
        "width": int,
        "embeddings": str,
        "tokenizer": str,
        "template": str,
        "weights?": (str, type(None)),
    },
    "frame": {"opening": str, "closing": str, "between": str, "fixed": [str]},
    "gate?": {
        "layer": int,
        **dict.fromkeys(("lexical", "state", "intercept", "threshold", "bias", "low", "high"), float),
    },
    "classifier?": dict.fromkeys(("scale", "intercept", "threshold"), float),
    "digest?": str,
    "ner?": bool,
    "corruption": {"name": str, "strength": (float, int), "dims": int, "seed": int},
    "tokens": str,
    "report": {"*": None},
}


@dataclass(frozen=True)
class BaseFacts:
    """What tells the base of a guard from others; `weights` is the fingerprint of its files, where it has any."""

    type: str
    width: int
    embeddings: str
    tokenizer: str
    template: str
    weights: str | None = None

    @classmethod
    def of(cls, model: Any, tokenizer: Any, weights: str | None = None) -> BaseFacts:
        """Read them from a loaded model: the signs of the embeddings are the same in every precision."""
        table = model.get_input_embeddings().weight
        rows = torch.linspace(0, len(table) - 1, min(_ROWS, len(table))).long().to(table.device)
        signs = np.packbits((table.detach()[rows, :_WIDE] > 0).cpu().numpy())
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
        return cls(
            str(model.config.model_type),
            int(table.shape[1]),
            signs.tobytes().hex(),
            hashlib.sha256(vocabulary.encode()).hexdigest(),
            hashlib.sha256(str(getattr(tokenizer, "chat_template", None)).encode()).hexdigest(),
            weights,
        )

    def check(self, other: BaseFacts) -> None:
        """Raises GuardError naming what differs."""
        same = (self.type, self.width) == (other.type, other.width) and _alike(self.embeddings, other.embeddings)
        if not same or (self.weights and other.weights and self.weights != other.weights):
            raise GuardError(
                "belongs to another base", where="guard", hint="give the model it was fitted on, or fit again"
            )
        for name, called in (("tokenizer", "tokenizer"), ("template", "chat template")):
            if getattr(self, name) != getattr(other, name):
                hint = f"use the {called} it was fitted with, or fit again"
                raise GuardError(f"belongs to another {called}", where="guard", hint=hint)


def _alike(signs: str, others: str) -> bool:
    """Return whether two strings of hexadecimal digits have nearly the same bits."""
    if len(signs) != len(others):
        return False
    found, other = (np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8)) for digits in (signs, others))
    return bool((found != other).mean() <= _OTHER_SIGNS)


@dataclass(frozen=True)
class Guard:
    """A gate, the corruption of what it flags, and the base they were fitted on.

    tokens: which tokens of a flagged prompt are corrupted: `all` but the last, the flagged `turn`s, or the `subject`.
    ner: what tells the tokens of a subject where it is given; else the embedded gate's rule.
    """

    base: BaseFacts
    frame: Frame
    gate: Gate | ClassifierGate
    corruption: Corruption
    tokens: str
    report: Mapping[str, Any]
    ner: Tagger | None = None

    # -- on a model ----------------------------------------------------------------------------------

    def wrap(self, model: Any, tokenizer: Any = None) -> Any:
        """Put the guard on a transformers causal model (or a peft model around one) and return that model.

        Its `generate` then works as usual. tokenizer: the model's own; left out, it is read from the model's folder.
        Raises GuardError where the guard belongs to another base, or the model has a guard already.
        """
        inner = inner_model(model)
        if getattr(inner, _ON, None) is not None:
            raise GuardError("the model has a guard already", where="guard", hint="Guard.unwrap(model) takes it off")
        attachment = self.attachment(model, tokenizer)
        setattr(inner, _ON, (attachment, attachment.put_on()))
        return model

    @staticmethod
    def unwrap(model: Any) -> Any:
        """Take the guard off a model, and nothing else; returns the model."""
        inner = inner_model(model)
        found = getattr(inner, _ON, None)
        if found is not None:
            for handle in found[1]:
                handle.remove()
            delattr(inner, _ON)
        return model

    @contextlib.contextmanager
    def on(self, model: Any, tokenizer: Any = None) -> Iterator[Attachment]:
        """Guard a model while the block runs; yields what counts its flagged prompts. Raises GuardError."""
        with attached(self.attachment(model, tokenizer)) as attachment:
            yield attachment

    def attachment(self, model: Any, tokenizer: Any = None) -> Attachment:
        """Check that the model is the guard's, and return the guard ready to be put on it. Raises GuardError."""
        inner = inner_model(model)
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(Path(str(inner.config._name_or_path)))
        self.base.check(BaseFacts.of(inner, tokenizer, _weights(inner)))
        row, dtype = CORRUPTIONS[self.corruption.name], inner.get_input_embeddings().weight.dtype
        if row.strength and _MOST_DRAWN * self.corruption.strength > torch.finfo(dtype).max:
            raise overflow(self.corruption.strength, dtype)
        reader = StateReader(inner, tokenizer)
        if isinstance(self.gate, Gate) and self.gate.layer >= reader.blocks:
            raise GuardError("reads a block that the model does not have", where="guard", hint="was it edited?")

        def judge(texts: Sequence[str]) -> list[float]:
            return self.gate.judge(reader, texts)

        return Attachment(
            inner, reader, self.frame, self.corruption, self.tokens, self.gate.threshold, judge, self._telling(reader)
        )

    def _telling(self, reader: StateReader) -> Callable[[str], list[Span]] | None:
        """What tells which characters of a turn betray its subject; None where nothing does."""
        tagger, gate = self.ner, self.gate
        if tagger is not None:
            return lambda text: tagger.names(text, reader.device)
        return (lambda text: gate.betraying(reader, text)) if isinstance(gate, Gate) else None

    @property
    def identity(self) -> str:
        """Return what changes with whatever changes an answer: for caches."""
        made = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        made.update(self.gate.digest())
        if self.ner is not None:
            made.update(self.ner.encoder.digest())
        return made.hexdigest()

    # -- on disk -------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write guard.json and guard.safetensors, or the folder of the classifier, and that of the tagger where there
        is one, for their owner's eyes only; no text of any row is in them."""
        for name in (WEIGHTS, SETTINGS) if isinstance(self.gate, Gate) else (SETTINGS,):
            (folder / name).touch(mode=0o600)
        if isinstance(self.gate, Gate):
            save_file(self.gate.tensors(), folder / WEIGHTS, metadata={"format": "pt"})
            (folder / WEIGHTS).chmod(0o600)
        else:
            self.gate.encoder.save(folder / CLASSIFIER)
        if self.ner is not None:
            self.ner.encoder.save(folder / NER)
        write_json(folder / SETTINGS, {**self._settings(), "report": dict(self.report)})

    def _settings(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "base": asdict(self.base),
            "frame": self.frame.as_dict(),
            "gate" if isinstance(self.gate, Gate) else CLASSIFIER: self.gate.settings(),
            "corruption": asdict(self.corruption),
            "tokens": self.tokens,
            **({"digest": self.gate.digest().hex()} if isinstance(self.gate, Gate) else {}),
            **({NER: True} if self.ner is not None else {}),
        }

    @classmethod
    def open(cls, folder: str | Path) -> Guard:
        """Read a guard folder. Raises GuardError for what is none, or damaged."""
        path = Path(folder)
        hint = "give the folder that `qunlearn guard fit` wrote"
        if not (path / SETTINGS).is_file():
            raise GuardError(f"no {SETTINGS} in the folder", where=str(path), hint=hint)
        stored = read_object(path / SETTINGS, GuardError, hint=hint)
        if stored.get("format") != FORMAT:
            message = f"of format {str(stored.get('format'))[:20]}, and this version reads {FORMAT}"
            raise GuardError(message, where=str(path / SETTINGS), hint="fit it again")
        stored = read_object(path / SETTINGS, GuardError, hint=hint, shape=_SHAPE)
        named = stored["corruption"]["name"] in CORRUPTIONS and stored["tokens"] in TOKENS
        named = named and re.fullmatch(r"(?:[0-9a-f]{2})+", stored["base"]["embeddings"]) is not None
        one = ("gate" in stored) != (CLASSIFIER in stored)
        if not named or not one:
            raise GuardError("names what is not known", where=str(path / SETTINGS), hint="was it edited?")
        if not _is_sound(stored.get("gate") or stored[CLASSIFIER], stored["corruption"]):
            raise GuardError("holds numbers that no fit writes", where=str(path / SETTINGS), hint="was it edited?")
        base = BaseFacts(**stored["base"])
        ner = Tagger(Encoder.load(path / NER, labels=None)) if stored.get(NER) else None
        corruption, frame = Corruption(**stored["corruption"]), Frame.of(stored["frame"])
        return cls(base, frame, _gate(path, stored, base), corruption, stored["tokens"], stored["report"], ner)


def _gate(path: Path, stored: Mapping[str, Any], base: BaseFacts) -> Gate | ClassifierGate:
    """The gate of a guard folder, of either kind. Raises GuardError, ModelError for files that are damaged."""
    if CLASSIFIER in stored:
        return ClassifierGate.open(path / CLASSIFIER, stored[CLASSIFIER])
    if not (path / WEIGHTS).is_file():
        hint = "copy the whole folder, or fit it again"
        raise GuardError(f"no {WEIGHTS} in the folder", where=str(path), hint=hint)
    read_tensors(path / WEIGHTS)  # refuses a damaged file by name
    gate = Gate.of(load_file(path / WEIGHTS), stored["gate"], base.width)
    if stored.get("digest", gate.digest().hex()) != gate.digest().hex():  # guards of older code have none
        hint = "copy the whole folder, or fit it again"
        raise GuardError(f"not the {WEIGHTS} that {SETTINGS} was written with", where=str(path), hint=hint)
    return gate


def _is_sound(gate: Mapping[str, float], corruption: Mapping[str, Any]) -> bool:
    """Whether the numbers are such as a fit writes. With NaN, or a threshold above 1, nothing would be flagged."""
    finite = all(map(math.isfinite, (*gate.values(), corruption["strength"])))
    signed = all(gate.get(name, 0) >= 0 for name in ("layer", "lexical", "state", "scale"))
    ranges = 0 < gate["threshold"] <= 1 and gate.get("low", 0) <= gate.get("high", 0)
    return finite and signed and ranges and corruption["strength"] > 0 and corruption["dims"] >= 1


def _weights(model: Any) -> str | None:
    """The fingerprint of the folder that a model was read from; None where it came from no folder of weights."""
    folder = Path(str(getattr(model.config, "_name_or_path", "")))
    if not (folder / "config.json").is_file():
        return None
    try:
        return fingerprint(folder)
    except ModelError:
        return None


def inner_model(model: Any) -> Any:
    """Return the transformers model itself, where an adapter is around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


__all__ = ["BaseFacts", "Guard", "inner_model"]
