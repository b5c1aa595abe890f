"""Fit the embedded gate: both views, the layer of the states, how they are joined, and the threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qunlearn.data.tokenize import vocabulary_words
from qunlearn.evaluation.metrics.logistic import Vector, balanced, logistic
from qunlearn.evaluation.metrics.membership import auc
from qunlearn.guard.calibrate import (
    FOLDS,
    LEAST_AUC,
    Fold,
    Threshold,
    check_separation,
    choose_threshold,
    fold_of,
    spared,
)
from qunlearn.guard.gate import Gate, StateReader, TokenScorer
from qunlearn.guard.lexicon import Lexicon, Vocabulary, fit_lexicon, quotes_of
from qunlearn.guard.prompts import Prompts

_DEPTHS = (0.25, 0.5)  # of the blocks, whose states are tried
_FEWEST_NEAR = 8  # prompts to pass in the bad rows' forms, which tell whether the states let others pass
_TIE = 0.002  # of AUC, within which the lower layer is taken
_ROUNDS = 3  # of choosing each bad text's highest token, and fitting again
_HARD = 4  # highest tokens of a text to pass that are learnt from
_MOST_TOKENS, _MOST_NUMBERS = 12_000, 16_000_000  # of a fit to tokens: rows, and float64 numbers
_DECAY, _JOINED_DECAY = 1e-3, 1e-3


@dataclass(frozen=True)
class Held:
    """How the gate did on prompts that a fold of it had not learnt from.

    auc, missed: of bad rows in wordings that were not learnt from; `unseen` ones: of rows in no wording learnt from.
    A wording that quotes its row's answer is not missed, whatever its words weigh.
    lexical, by_layer: the AUC of either view alone, on both. near_auc: of the chosen layer's states alone, unseen rows
    against prompts to pass in the bad rows' forms; None where fewer than 8 are there.
    """

    auc: float
    unseen_auc: float
    layer: int
    lexical: float
    by_layer: dict[str, float]
    near_auc: float | None
    bad: int
    unseen: int
    normal: int
    missed: int
    unseen_missed: int
    false_alarms: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def train_gate(reader: StateReader, prompts: Prompts, rule: Threshold) -> tuple[Gate, Held]:
    """Return the gate and how it did on what was held out.

    Everything that is chosen rests on scores of cross-validation: folds of rows to pass, each with all that was made
    from them, of wordings of the bad rows, and of whole bad rows. The gate itself learns from all prompts. For a
    conformal threshold every second row to pass is learnt from by nothing.
    Raises GateError where the two kinds cannot be told apart, DataError where there are too few prompts.
    """
    prompts, calibration = spared(prompts, rule)
    data = _Data(prompts, Vocabulary.of(vocabulary_words(reader.tokenizer), [s.text for s in prompts.bad]))
    folds = [fold_of(prompts, n) for n in range(FOLDS)]
    words, states = _Scores.of(data, folds, _words(data)), _states(reader, data, folds)
    joined = _Joined.of(words, states)
    known, unseen, normal = joined.of_scores(words, states)
    separation = auc(known, normal)
    check_separation(separation)
    both = (range(len(data.bad)), range(len(data.normal)))
    # What a conformal threshold rests on tells nothing of what is a quote, nor do the answers, some of which are its.
    passing = (*(s.text for s in prompts.normal), *(() if rule.conformal else prompts.normal_answers))
    lexicon = replace(data.lexicon(*both), quotes=quotes_of(prompts.bad_answers, passing))
    scorer = TokenScorer(torch.zeros(reader.width), 0.0, joined.low, joined.high)
    if joined.state:
        scorer = replace(fit_tokens(*data.tokens(states.layer, *both)), low=joined.low, high=joined.high)
    gate = Gate(lexicon, scorer, states.layer, joined.lexical, joined.state, joined.intercept, 1.0)
    passed = gate.judge(reader, [s.text for s in calibration]) if rule.conformal else normal.tolist()
    gate = replace(gate, threshold=choose_threshold(known.tolist(), passed, rule))
    at = gate.threshold
    held = [prompts.bad[i].text for fold in folds if fold.bad and fold.normal for i in fold.held[0]]
    missed = sum(p < at and (lexicon.score(text) < math.inf or at > 1) for p, text in zip(known, held, strict=True))
    counts = (len(known), len(unseen), len(normal), missed, int((unseen < at).sum()))
    near_auc = states.scores.near_auc if states.scores is not None else None
    told = (states.layer, words.auc, states.by_layer, near_auc)
    return gate, Held(separation, auc(unseen, normal), *told, *counts, int((normal >= at).sum()))


_View = Callable[[Fold], tuple[Callable[[int], float], Callable[[int], float]]]


class _Data:
    """The samples, and once they are read the states of all their windows by layer."""

    def __init__(self, prompts: Prompts, vocabulary: Vocabulary) -> None:
        self.bad, self.normal = prompts.bad, prompts.normal
        self._vocabulary = vocabulary
        near = sum(s.near and s.measured for s in self.normal)
        self.near_enough = not prompts.formed or near >= _FEWEST_NEAR
        self.layers: list[int] = []
        self._states: dict[int, list[Tensor]] = {}

    def read(self, reader: StateReader) -> None:
        """Read the states."""
        windows = [reader.windows(s.text) for s in (*self.bad, *self.normal)]
        self.layers = sorted({round(share * (reader.blocks - 1)) for share in _DEPTHS})
        read = reader.states([w for found in windows for w in found], self.layers)
        for layer in self.layers:
            each = iter(read[layer])
            self._states[layer] = [torch.cat([next(each).half() for _ in found]) for found in windows]

    def lexicon(self, bad: Sequence[int], normal: Sequence[int]) -> Lexicon:
        """Fit the lexical view: to bad texts that stand alone, for it looks for words of no other."""
        alone = [self.bad[i].text for i in bad if not self.bad[i].amid]
        return fit_lexicon(alone, [self.normal[i].text for i in normal], self._vocabulary)

    def tokens(self, layer: int, bad: Sequence[int], normal: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the states of texts behind a layer, each (T, D)."""
        states = self._states[layer]
        return [states[i] for i in bad], [states[len(self.bad) + i] for i in normal]


def _words(data: _Data) -> _View:
    def view(fold: Fold) -> tuple[Callable[[int], float], Callable[[int], float]]:
        lexicon = data.lexicon(fold.bad, fold.normal)
        return (lambda i: lexicon.score(data.bad[i].text)), (lambda i: lexicon.score(data.normal[i].text))

    return view


def _of_layer(data: _Data, layer: int) -> _View:
    def view(fold: Fold) -> tuple[Callable[[int], float], Callable[[int], float]]:
        scorer = fit_tokens(*data.tokens(layer, fold.bad, fold.normal))
        bad, normal = data.tokens(layer, range(len(data.bad)), range(len(data.normal)))
        return (lambda i: scorer.text(bad[i])), (lambda i: scorer.text(normal[i]))

    return view


@dataclass(frozen=True)
class _Scores:
    """A view's scores of held-out texts: known bad rows in other wordings, unseen bad rows, and rows to pass, of which
    `near` says which ask in the bad rows' forms."""

    known: Vector
    unseen: Vector
    normal: Vector
    near: NDArray[np.bool_]

    @classmethod
    def of(cls, data: _Data, folds: Sequence[Fold], view: _View) -> _Scores:
        found: tuple[list[float], list[float], list[float]] = ([], [], [])
        for fold in folds:
            if not fold.bad or not fold.normal:
                continue
            bad, normal = view(fold)
            for out, score, places in zip(found, (bad, bad, normal), fold.held, strict=True):
                out += [score(i) for i in places]
        near = [data.normal[i].near for fold in folds if fold.bad and fold.normal for i in fold.held[2]]
        known, unseen, passed = (np.array(part) for part in found)
        return cls(known, unseen, passed, np.array(near, bool))

    @property
    def near_auc(self) -> float | None:
        """Return how it tells them from other subjects in the same forms; None where too few are there."""
        return auc(self.unseen, self.normal[self.near]) if self.near.sum() >= _FEWEST_NEAR else None

    @property
    def auc(self) -> float:
        return auc(np.concatenate([self.known, self.unseen]), self.normal)


@dataclass(frozen=True)
class _States:
    """The layer whose states tell most, its scores, and the AUC of each; without scores the states are not asked."""

    layer: int
    scores: _Scores | None
    by_layer: dict[str, float]
    telling: bool


def _states(reader: StateReader, data: _Data, folds: Sequence[Fold]) -> _States:
    """Read and score the states, where it can be known whether they let others pass who are asked about alike.

    They are telling where they know bad rows of which no wording was learnt from, beside all rows to pass and beside
    those near the bad ones.
    """
    if not data.near_enough:
        return _States(0, None, {}, False)
    data.read(reader)
    held = {layer: _Scores.of(data, folds, _of_layer(data, layer)) for layer in data.layers}
    best = data.layers[0]
    for layer, found in held.items():
        if found.auc > held[best].auc + _TIE:
            best = layer
    scores = held[best]
    lowest = min(auc(scores.unseen, scores.normal), 1.0 if scores.near_auc is None else scores.near_auc)
    return _States(best, scores, {str(layer): found.auc for layer, found in held.items()}, lowest >= LEAST_AUC)


@dataclass(frozen=True)
class _Joined:
    """The logistic that joins both views; scores of states are clipped to what was seen."""

    lexical: float
    state: float
    intercept: float
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def of(cls, words: _Scores, states: _States) -> _Joined:
        """Fit it to held-out scores. States that are not telling would only add noise: then their weight is 0, and
        unseen rows, of which the words know nothing, are not fitted to."""
        beside = states.scores if states.telling else None
        parts = ("known", "normal") if beside is None else ("known", "unseen", "normal")
        views = [words] if beside is None else [words, beside]
        x = np.stack([np.concatenate([getattr(s, part) for part in parts]) for s in views], 1)
        labels = np.concatenate([np.full(len(getattr(words, part)), float(part != "normal")) for part in parts])
        low, high = np.quantile(x[:, 1], [0.01, 0.99]).tolist() if beside is not None else (0.0, 0.0)
        x[:, 1:] = x[:, 1:].clip(low, high)
        scale = x.std(0).clip(min=1e-6)
        weights, intercept = logistic(x / scale, labels, balanced(labels), _JOINED_DECAY, nonnegative=True)
        lexical, state = [*(weights / scale).tolist(), 0.0][:2]
        return cls(lexical, state, intercept, low, high)

    def of_scores(self, words: _Scores, states: _States) -> tuple[Vector, Vector, Vector]:
        """Return the probabilities of known bad rows, unseen ones, and rows to pass."""

        def probability(part: str) -> Vector:
            z = self.lexical * getattr(words, part) + self.intercept
            if self.state:
                z = z + self.state * getattr(states.scores, part).clip(self.low, self.high)
            return np.asarray(0.5 * (1 + np.tanh(z / 2)))

        return probability("known"), probability("unseen"), probability("normal")


def fit_tokens(bad: Sequence[Tensor], normal: Sequence[Tensor]) -> TokenScorer:
    """Return a scorer under which the highest token of a bad text lies above all tokens of others.

    bad, normal: states of each text, (T, D). Multiple-instance learning with a convex step: first every token of a bad
    text is taken for one that betrays it, then the highest alone (mi-SVM, Andrews et al. 2003).
    """
    most = min(_MOST_TOKENS, _MOST_NUMBERS // bad[0].shape[1])
    flagged, passed = _thinned(torch.cat(list(bad)), most // 2), _thinned(torch.cat(list(normal)), most // 2)
    everything = torch.cat([flagged, passed]).double()
    mean, scale = everything.mean(0), everything.std(0).clamp(min=1e-4).reciprocal()
    for round_number in range(_ROUNDS):
        x = ((torch.cat([flagged, passed]).double() - mean) * scale).numpy()
        labels = np.repeat([1.0, 0.0], [len(flagged), len(passed)])
        fitted, intercept = logistic(x, labels, balanced(labels), _DECAY)
        weight = torch.from_numpy(fitted) * scale
        scorer = TokenScorer(weight.float(), intercept - float(mean @ weight))
        if round_number < _ROUNDS - 1:
            flagged, passed = (_highest(scorer, texts, n, most // 2) for texts, n in ((bad, 1), (normal, _HARD)))
    return scorer


def _highest(scorer: TokenScorer, texts: Sequence[Tensor], n: int, most: int) -> Tensor:
    """The states of each text's n highest tokens."""
    lengths = [len(text) for text in texts]
    scores = torch.split(scorer.tokens(torch.cat(list(texts))), lengths)
    return _thinned(torch.cat([t[s.topk(min(n, len(s))).indices] for t, s in zip(texts, scores, strict=True)]), most)


def _thinned(rows: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly spread."""
    return rows if len(rows) <= most else rows[torch.linspace(0, len(rows) - 1, most).long()]
