"""A transformers text classifier as the gate, trained here with the published settings (ECO, arXiv 2406.07933)."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from qunlearn.evaluation.metrics.logistic import Vector, balanced, logistic
from qunlearn.evaluation.metrics.membership import auc
from qunlearn.guard.calibrate import Threshold, check_separation, choose_threshold, fold_of, spared
from qunlearn.guard.encoder import Encoder
from qunlearn.guard.gate import StateReader
from qunlearn.guard.prompts import Prompts, Sample

_FOLD = 1  # the one that is held out: the rows' own wordings, of which some have no other but one, are learnt from
_DECAY = 1e-3


@dataclass(frozen=True)
class Training:
    """The published settings of the classifier. warmup: the share of steps until the rate is full; it ends as a cosine.

    Both kinds of prompts weigh the same, and gradients are not clipped. Of all epochs the one with the highest AUC on
    held-out prompts is kept; published is the one with the fewest misses, of which one that flags everything has none.
    """

    lr: float = 2e-5
    epochs: int = 30
    batch: int = 16
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup: float = 0.1


@dataclass(frozen=True)
class ClassifierGate:
    """Flags a text at a probability of at least `threshold`: sigmoid(scale * margin + intercept), where the margin is
    the logit to flag less the logit to pass, of the text's worst window."""

    encoder: Encoder
    scale: float
    intercept: float
    threshold: float

    def judge(self, reader: StateReader, texts: Sequence[str]) -> list[float]:
        """Return the probability that each text is about what should be forgotten. The reader's model is not asked."""
        self.encoder.model.to(reader.device)
        return self.probabilities(margins(self.encoder, texts)).tolist()  # type: ignore[no-any-return]

    def probabilities(self, found: Vector) -> Vector:
        """Return the probabilities of margins, (N,)."""
        return np.asarray(0.5 * (1 + np.tanh((self.scale * found + self.intercept) / 2)))

    def settings(self) -> dict[str, float]:
        """Return what guard.json holds."""
        return {"scale": self.scale, "intercept": self.intercept, "threshold": self.threshold}

    def digest(self) -> bytes:
        """Return a hash of the weights."""
        return self.encoder.digest()

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> ClassifierGate:
        """Read it from a guard's files. Raises ModelError, GuardError."""
        return cls(Encoder.load(folder, labels=2), **{name: float(value) for name, value in settings.items()})


@torch.no_grad()
def margins(encoder: Encoder, texts: Sequence[str]) -> Vector:
    """Return the margin of each text's worst window, (N,)."""
    windows = encoder.windows(texts)
    found = np.full(len(texts), -math.inf)
    for places, batch in encoder.batches(windows):
        logits = encoder.model(**batch).logits.double().cpu().numpy()
        for at, margin in zip(places, logits[:, 1] - logits[:, 0], strict=True):
            text = windows["overflow_to_sample_mapping"][at]
            found[text] = max(found[text], margin)
    return found


def train_classifier(
    folder: Path, prompts: Prompts, rule: Threshold, training: Training, device: torch.device, seed: int
) -> tuple[ClassifierGate, dict[str, Any]]:
    """Return the gate, and how it did on prompts that it had not learnt from.

    One of the embedded gate's folds is left out of the training. Half of its rows choose the epoch; the others, on
    which nothing else rests, calibrate the probability and set the threshold by the same rule.
    Raises GateError where the two kinds are not told apart, DataError where there are too few prompts.
    """
    prompts, calibration = spared(prompts, rule)
    fold = fold_of(prompts, _FOLD)
    bad, normal = [prompts.bad[i] for i in fold.bad], [prompts.normal[i] for i in fold.normal]
    kinds = (prompts.bad, prompts.bad, prompts.normal)  # bad rows in other wordings, unseen ones, and rows to pass
    held = [[samples[i] for i in places] for samples, places in zip(kinds, fold.held, strict=True)]
    choosing, calibrating = zip(*map(_halves, held), strict=True)
    encoder, history = _trained(folder, (bad, normal), choosing, training, device, seed)
    known, unseen, passed = (margins(encoder, [s.text for s in samples]) for samples in calibrating)
    separation = auc(known, passed)
    check_separation(separation)
    labels = np.repeat([1.0, 0.0], [len(known), len(passed)])
    found = np.concatenate([known, passed])
    size = max(float(found.std()), 1e-6)
    weight, intercept = logistic((found / size)[:, None], labels, balanced(labels), _DECAY, nonnegative=True)
    gate = ClassifierGate(encoder, float(weight[0]) / size, intercept, 1.0)
    p_known, p_unseen, p_passed = (gate.probabilities(scores) for scores in (known, unseen, passed))
    trusted = gate.probabilities(margins(encoder, [s.text for s in calibration])) if rule.conformal else p_passed
    gate = replace(gate, threshold=choose_threshold(p_known.tolist(), trusted.tolist(), rule))
    counts = {"bad": len(known), "unseen": len(unseen), "normal": len(passed)}
    counts |= {"missed": int((p_known < gate.threshold).sum()), "unseen_missed": int((p_unseen < gate.threshold).sum())}
    counts["false_alarms"] = int((p_passed >= gate.threshold).sum())
    told = {"auc": separation, "unseen_auc": auc(unseen, passed) if len(unseen) else None}
    return gate, {**told, "learnt_from": len(bad) + len(normal), "epochs": history, **counts}


def _halves(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Every second row, and the others; of a single row both."""
    rows = sorted({s.row for s in samples})
    halves = (set(rows[::2]), set(rows[1::2] or rows))
    first, second = ([s for s in samples if s.row in half] for half in halves)
    return first, second


def _trained(
    folder: Path,
    learnt: tuple[list[Sample], list[Sample]],
    choosing: Sequence[Sequence[Sample]],
    training: Training,
    device: torch.device,
    seed: int,
) -> tuple[Encoder, list[dict[str, float]]]:
    """Train, and return the weights of the epoch with the highest AUC, the last of several."""
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # of the new head, and of dropout
        encoder = Encoder.load(folder, labels=2)
        encoder.model.to(device)
        windows, labels = _rows(encoder, learnt)
        weights = (len(labels) / (2 * torch.bincount(labels, minlength=2).clamp(min=1))).to(device)
        optimizer, schedule = _optimizer(encoder.model, training, -(-len(labels) // training.batch))
        history: list[dict[str, float]] = []
        best, kept = -math.inf, encoder.model.state_dict()
        bad, normal = [*choosing[0], *choosing[1]], choosing[2]
        for _ in range(training.epochs):
            encoder.model.train()
            total = 0.0
            for part in torch.split(torch.randperm(len(labels), generator=rng), training.batch):
                logits = encoder.model(**encoder.batch([windows[i] for i in part.tolist()])).logits
                loss = cross_entropy(logits, labels[part].to(device), weights)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += float(loss.detach()) * len(part)
            encoder.model.eval()
            flagged, passed = (margins(encoder, [s.text for s in samples]) for samples in (bad, normal))
            history.append({"loss": total / len(labels), "auc": auc(flagged, passed)})
            if history[-1]["auc"] >= best:
                best, kept = history[-1]["auc"], copy.deepcopy(encoder.model.state_dict())
        encoder.model.load_state_dict(kept)
    return encoder, history


def _rows(encoder: Encoder, learnt: tuple[list[Sample], list[Sample]]) -> tuple[list[list[int]], Tensor]:
    """Token ids of windows to learn from, and their labels. Bad texts of several windows are left out: which of the
    windows betrays them is not known."""
    rows: list[list[int]] = []
    labels: list[int] = []
    for label, samples in ((1, learnt[0]), (0, learnt[1])):
        windows = encoder.windows([s.text for s in samples])
        whole = Counter(windows["overflow_to_sample_mapping"])
        for ids, text in zip(windows["input_ids"], windows["overflow_to_sample_mapping"], strict=True):
            if label == 0 or whole[text] == 1:
                rows.append(ids)
                labels.append(label)
    return rows, torch.tensor(labels)


def _optimizer(model: Any, training: Training, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and its schedule: a linear warm-up, then half a cosine down to 0."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.lr, weight_decay=training.weight_decay, betas=training.betas, eps=training.eps
    )
    total = steps * training.epochs
    return optimizer, get_cosine_schedule_with_warmup(optimizer, round(training.warmup * total), total)
