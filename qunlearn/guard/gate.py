"""The embedded gate: a small classifier on the base's lower states, which asks each token if it betrays a topic.

A prompt is about what should be forgotten when some place in it is, whatever stands around that place: a name in any
wording, behind a jailbreak's opening, in the middle of a page. So every token's state is scored by a network of one
hidden layer, and the scores of a window are pooled by a smooth maximum, as in multiple-instance learning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qunlearn.errors import GuardError
from qunlearn.model.load import backbone, decoder_blocks

WINDOW, STRIDE = 64, 48  # tokens that are judged together, and how far the next window lies
SHARP = 2.0  # of the smooth maximum over a window's tokens
_BATCH_TOKENS = 4096
_TENSORS = ("mean", "scale", "w1", "b1", "w2", "b2")


@dataclass(frozen=True)
class Network:
    """Weights of the token scorer: states (T, D) are standardised by `mean` and `scale`, and pass through H units.

    w1 (D, H), b1 (H,), w2 (H,), b2 ().
    """

    mean: Tensor
    scale: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def tokens(self, states: Tensor) -> Tensor:
        """Return each token's score: (..., T, D) -> (..., T)."""
        x = (states - self.mean) * self.scale
        return torch.nn.functional.gelu(x @ self.w1 + self.b1) @ self.w2 + self.b2

    def to(self, device: torch.device) -> Network:
        return Network(*(getattr(self, name).to(device) for name in _TENSORS))

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).detach().float().cpu().contiguous() for name in _TENSORS}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], width: int) -> Network:
        """Build it from a file's tensors. Raises GuardError for shapes that do not fit each other or the model."""
        try:
            made = cls(*(tensors[name].float() for name in _TENSORS))
            fits = made.w1.shape == (width, len(made.b1)) and made.w2.shape == made.b1.shape and made.b2.shape == ()
            fits = fits and made.mean.shape == made.scale.shape == (width,)
        except (KeyError, TypeError):
            fits = False
        if not fits or not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
            raise GuardError(
                "its tensors are not a gate for this model", where="guard.safetensors", hint="fit it again"
            )
        return made


def pool(scores: Tensor, mask: Tensor) -> Tensor:
    """Smooth maximum over tokens: log(sum exp(s x)) / s, (..., T) -> (...,); `mask` is True at tokens."""
    return torch.logsumexp((SHARP * scores).masked_fill(~mask, -torch.inf), -1) / SHARP


class StateReader:
    """Reads the states behind a lower block of a model, with the adapter off and no later block computed."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.blocks = len(decoder_blocks(model))
        self.reading = False  # while it is, a guard on the model steps aside

    def windows(self, text: str) -> list[list[int]]:
        """Return a text's tokens in windows that overlap, so that nothing is cut off."""
        ids = list(self.tokenizer(text)["input_ids"]) or [0]
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
        device = next(p for p in self.model.parameters() if p.device.type != "meta").device
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
                backbone(self.model)(input_ids=ids.to(device), use_cache=False)
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
    """The network on the states behind block `layer`; a text is flagged at a probability of at least `threshold`.

    `slope` and `offset` calibrate a score to a probability: sigmoid(slope * score + offset).
    """

    network: Network
    layer: int
    slope: float
    offset: float
    threshold: float

    def probability(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(self.slope * scores + self.offset)

    def judge(self, reader: StateReader, texts: Sequence[str]) -> list[float]:
        """Return the probability that each text is about what should be forgotten: that of its worst window."""
        windows = [reader.windows(text) for text in texts]
        flat = [window for found in windows for window in found]
        states = reader.states(flat, [self.layer])[self.layer]
        scores = torch.stack([window_score(self.network, s) for s in states]) if states else torch.zeros(0)
        found = iter(self.probability(scores).tolist())
        return [max(next(found) for _ in of_text) for of_text in windows]

    def betraying(self, reader: StateReader, text: str) -> tuple[str, list[tuple[int, int]]]:
        """Return a text as its tokenizer reads it back, and the characters of the tokens that alone would flag it.

        The worst token is always among them.
        """
        from qunlearn.guard.turns import token_spans

        ids = list(reader.tokenizer(text)["input_ids"]) or [0]
        read, spans = token_spans(ids, reader.tokenizer)
        at, chosen = 0, []
        for window in reader.windows(text):
            states = reader.states([window], [self.layer])[self.layer][0]
            p = self.probability(self.network.tokens(states))
            worst = int(p.argmax())
            chosen += [at + i for i in range(len(window)) if float(p[i]) >= self.threshold or (i == worst)]
            at += STRIDE
        return read, [spans[i] for i in sorted(set(chosen)) if i < len(spans)]


def window_score(network: Network, states: Tensor) -> Tensor:
    """(t, D) -> (): a window's score."""
    scores = network.tokens(states)
    return pool(scores, torch.ones_like(scores, dtype=torch.bool))
