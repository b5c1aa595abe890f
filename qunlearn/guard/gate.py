"""The embedded gate: two views of a prompt, one of its words and one of the base's own states, joined by a logistic.

A prompt is about what should be forgotten when some place in it is, whatever stands around that place: a name in any
wording, behind a jailbreak's opening, in the middle of a page. So both views take the worst place of a prompt and let
nothing else lower it. The words know what the bad rows name. The states may know what else is like it; where they were
found not to, they are not asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qunlearn.errors import GuardError
from qunlearn.guard.lexicon import Lexicon, Span
from qunlearn.model.load import backbone, decoder_blocks

WINDOW, STRIDE = 64, 48  # tokens that are read together, and how far the next window lies
_BATCH_TOKENS = 4096
_HASHES = ("keys", "slips", "meant", "own", "parts", "wholes")  # of the lexicon


@dataclass(frozen=True)
class TokenScorer:
    """A linear score of a token's state: weight (D,), bias (); a text's is that of its highest token, clipped to the
    range that was seen when the gate was fitted: states of unknown text lie anywhere."""

    weight: Tensor
    bias: float
    low: float = -math.inf
    high: float = math.inf

    def tokens(self, states: Tensor) -> Tensor:
        """Return each token's score: (T, D) -> (T,)."""
        return states.float() @ self.weight + self.bias

    def text(self, states: Tensor) -> float:
        """Return the score of a text's highest token: (T, D) -> ()."""
        return min(self.high, max(self.low, float(self.tokens(states).max())))


class StateReader:
    """Reads the states behind a lower block of a model, with the adapter off and no later block computed."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.blocks = len(decoder_blocks(model))
        self.reading = False  # while it is, a guard on the model steps aside

    @property
    def device(self) -> torch.device:
        """Where the model computes; embeddings on the host are not asked."""
        found: torch.device = next(p.device for p in self.model.parameters() if p.device.type != "meta")
        return found

    @property
    def width(self) -> int:
        """The width of a state, which is that of an embedding."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    def windows(self, text: str) -> list[list[int]]:
        """Return a text's tokens in windows that overlap, so that nothing is cut off."""
        ids = list(self.tokenizer(text, verbose=False)["input_ids"]) or [0]
        starts = range(0, max(1, len(ids) - (WINDOW - STRIDE)), STRIDE)
        return [ids[at : at + WINDOW] for at in starts]

    @torch.no_grad()
    def states(self, windows: Sequence[Sequence[int]], layers: Sequence[int]) -> dict[int, list[Tensor]]:
        """Return the states of each window, (t, D) in float32 and of mean square 1, behind each of the layers."""
        out: dict[int, list[Tensor]] = {layer: [torch.empty(0)] * len(windows) for layer in layers}
        order = sorted(range(len(windows)), key=lambda i: len(windows[i]))
        at = 0
        while at < len(order):
            rows: list[int] = []
            widest = 0
            while at < len(order) and (len(rows) + 1) * max(widest, len(windows[order[at]])) <= _BATCH_TOKENS:
                rows.append(order[at])
                widest = max(widest, len(windows[order[at]]))
                at += 1
            for layer, hidden in self._pass([windows[i] for i in rows], widest, layers).items():
                for i, row in zip(rows, hidden, strict=True):
                    out[layer][i] = row[: len(windows[i])]
        return out

    def _pass(self, rows: Sequence[Sequence[int]], width: int, layers: Sequence[int]) -> dict[int, Tensor]:
        ids = torch.zeros(len(rows), width, dtype=torch.long)  # padding lies to the right, where no token sees it
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(list(row))
        found: dict[int, Tensor] = {}
        last = max(layers)

        def hear(layer: int) -> Any:
            def hook(module: Any, given: Any, made: Any) -> None:
                hidden = made[0] if isinstance(made, tuple) else made
                wide = hidden.float()
                found[layer] = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
                if layer == last:
                    raise _Enough

            return hook

        blocks = decoder_blocks(self.model)
        handles = [blocks[layer].register_forward_hook(hear(layer)) for layer in layers]
        try:
            with self._aside(), contextlib.suppress(_Enough):
                backbone(self.model)(input_ids=ids.to(self.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """The base as it is: no guard, no adapter."""
        from peft.tuners.lora import LoraLayer

        layers = [m for m in self.model.modules() if isinstance(m, LoraLayer) and not m._disable_adapters]
        before, self.reading = self.reading, True
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            self.reading = before
            for layer in layers:
                layer._disable_adapters = False


class _Enough(Exception):
    """The last wanted layer was reached."""


@dataclass(frozen=True)
class Gate:
    """Flags a text at a probability of at least `threshold`.

    The probability is sigmoid(lexical * lexicon's score + state * scorer's score + intercept), of the states behind
    block `layer`.
    """

    lexicon: Lexicon
    scorer: TokenScorer
    layer: int
    lexical: float
    state: float
    intercept: float
    threshold: float

    def probability(self, words: float, states: float) -> float:
        """Return the probability from both views' scores: 1 for a text that quotes a bad answer."""
        if words == math.inf:
            return 1.0
        return 0.5 * (1 + math.tanh((self.lexical * words + self.state * states + self.intercept) / 2))

    def judge(self, reader: StateReader, texts: Sequence[str]) -> list[float]:
        """Return the probability that each text is about what should be forgotten."""
        words = [self.lexicon.score(text) for text in texts]
        if not self.state:  # the words decide alone, and the model is not asked
            return [self.probability(score, 0.0) for score in words]
        windows = [reader.windows(text) for text in texts]
        states = iter(reader.states([w for found in windows for w in found], [self.layer])[self.layer])
        worst = [max(self.scorer.text(next(states)) for _ in found) for found in windows]
        return [self.probability(*both) for both in zip(words, worst, strict=True)]

    def betraying(self, reader: StateReader, text: str) -> list[Span]:
        """Return the characters of the words that flag a text; of one whose words alone would not, those of each
        window's highest token."""
        from qunlearn.guard.turns import token_spans

        read, spans = token_spans(list(reader.tokenizer(text, verbose=False)["input_ids"]) or [0], reader.tokenizer)
        if not self.state or self.probability(self.lexicon.score(read), self.scorer.low) >= self.threshold:
            found = self.lexicon.telling(read)
        else:
            windows = reader.windows(text)
            states = reader.states(windows, [self.layer])[self.layer]
            highest = [n * STRIDE + int(self.scorer.tokens(window).argmax()) for n, window in enumerate(states)]
            found = [spans[i] for i in sorted(set(highest)) if i < len(spans)]
        shift = max(0, read.find(text))  # a token that the tokenizer puts in front
        return [(first - shift, last - shift) for first, last in found]

    def tensors(self) -> dict[str, Tensor]:
        """Return what guard.safetensors holds."""
        names = (*_HASHES, "quotes", "weights")
        lexicon = {name: torch.from_numpy(getattr(self.lexicon, name).copy()) for name in names}
        return {**lexicon, "weight": self.scorer.weight.float().contiguous()}

    def digest(self) -> bytes:
        """Return a hash of the tensors."""
        made = hashlib.sha256()
        for _, tensor in sorted(self.tensors().items()):
            made.update(tensor.numpy().tobytes())
        return made.digest()

    def settings(self) -> dict[str, float | int]:
        """Return what guard.json holds."""
        scorer = {"bias": self.scorer.bias, "low": self.scorer.low, "high": self.scorer.high}
        joined = {name: getattr(self, name) for name in ("layer", "lexical", "state", "intercept", "threshold")}
        return {**joined, **scorer}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], width: int) -> Gate:
        """Build it from a guard's files. Raises GuardError for tensors that do not fit each other or the model."""
        hashes = [tensors.get(name, torch.empty(0, 0)) for name in _HASHES]
        quotes = tensors.get("quotes", torch.empty(0, dtype=torch.int64))  # guards of older code have none
        keys, slips, meant, _, parts, wholes = hashes
        weights, weight = (tensors.get(name, torch.empty(0, 0)) for name in ("weights", "weight"))
        fits = all(t.dtype == torch.int64 and t.dim() == 1 for t in (*hashes, quotes))
        fits = fits and weights.shape == keys.shape and slips.shape == meant.shape and parts.shape == wholes.shape
        fits = fits and weight.shape == (width,)
        fits = fits and bool((keys[1:] > keys[:-1]).all())
        if not fits or not all(bool(torch.isfinite(t.float()).all()) for t in (weights, weight)):
            message = "its tensors are not a gate for this model"
            raise GuardError(message, where="guard.safetensors", hint="fit it again")
        words = weights.float().numpy().astype(np.float32)
        lexicon = Lexicon(keys.numpy(), words, *(found.numpy() for found in (*hashes[1:], quotes)))
        scorer = TokenScorer(weight.float(), *(float(settings[name]) for name in ("bias", "low", "high")))
        numbers = {name: float(settings[name]) for name in ("lexical", "state", "intercept", "threshold")}
        return cls(lexicon, scorer, int(settings["layer"]), **numbers)
