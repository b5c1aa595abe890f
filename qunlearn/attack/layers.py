"""Family D, layers: whether a linear read-out of the hidden states still tells right answers from wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qunlearn.attack.bench import Bench
from qunlearn.attack.cells import Cell
from qunlearn.data.batch import ANSWER, collate, single_batches
from qunlearn.data.tokenize import Example
from qunlearn.evaluation.metrics.logistic import logistic
from qunlearn.model.head import Head
from qunlearn.model.load import backbone, decoder_blocks

_RIDGE = 1.0  # of the logistic probe, a row and width, on standardised states
Floats = NDArray[np.float64]


def run(bench: Bench, name: str) -> Cell:
    """Return, per fact, the mean over layers of the share of wrong options that the read-out puts below the right one;
    `more` has the mean of each layer, from the lowest block."""
    rows, owners = _options(bench)
    if not rows:
        return Cell([None] * len(bench.facts), {})
    if name == "lens":
        scores = lens_scores(bench, rows)  # (layers, rows)
        wins = _wins(scores, owners, len(bench.facts))
    else:
        wins = _probed(last_states(bench, rows), owners, bench.inputs.units)
    asked = ~np.isnan(wins[0])
    outcomes = [float(wins[:, i].mean()) if asked[i] else None for i in range(len(bench.facts))]
    return Cell(outcomes, {"layers": [float(layer[asked].mean()) for layer in wins]})


def _options(bench: Bench) -> tuple[list[Example], list[tuple[int, bool]]]:
    rows, owners = [], []
    for i, fact in enumerate(bench.facts):
        for text, right in [(fact.record.completion, True), *((w, False) for w in fact.wrong)] if fact.wrong else []:
            rows.append(bench.encode(fact.record.answered(text)))
            owners.append((i, right))
    return rows, owners


def _wins(scores: Floats, owners: Sequence[tuple[int, bool]], facts: int) -> Floats:
    """(layers, rows) -> (layers, facts): share of wrong options below the right one; NaN for a fact without options."""
    out = np.full((scores.shape[0], facts), np.nan)
    for i in sorted({i for i, _ in owners}):
        right = next(n for n, owner in enumerate(owners) if owner == (i, True))
        wrong = [n for n, owner in enumerate(owners) if owner == (i, False)]
        above = scores[:, [right]] - scores[:, wrong]
        out[:, i] = ((above > 0) + 0.5 * (above == 0)).mean(axis=1)
    return out


# -- hidden states -----------------------------------------------------------------------------------------


@torch.no_grad()
def lens_scores(bench: Bench, rows: Sequence[Example]) -> Floats:
    """(layers, rows): mean log-probability of each answer's tokens, the states behind every block put through the
    final norm and the head (the logit lens)."""
    norm, head = _final_norm(bench.lm.model), bench.lm.head
    at: dict[int, int] = {}
    parts = []
    for group in single_batches(rows, bench.config.train.pass_tokens):
        batch = collate([rows[i] for i in group], ANSWER, bench.lm.tokenizer.pad_token_id).to(bench.lm.device)
        layers = []
        for states in _all_states(bench, batch.input_ids):
            logps = answer_logps(norm(batch.pick(states)), batch.labels, head)
            sums = torch.zeros(len(group), dtype=torch.float64, device=logps.device).index_add_(0, batch.rows, logps)
            layers.append((sums / torch.bincount(batch.rows, minlength=len(group))).cpu().numpy())
        for i in group:
            at[i] = len(at)
        parts.append(np.stack(layers))
    found: Floats = np.concatenate(parts, axis=1)[:, [at[i] for i in range(len(rows))]]
    return found


def answer_logps(h: Tensor, labels: Tensor, head: Head) -> Tensor:
    """(N, D), (N,) -> (N,): log-probability of each label, by tiles of logits."""
    size = max(1, (1 << 23) // head.vocabulary)  # 32 MiB of logits at a time
    tiles = zip(torch.split(h, size), torch.split(labels, size), strict=True)
    return torch.cat([head.logits(a).log_softmax(1).gather(1, b.unsqueeze(1)).squeeze(1).double() for a, b in tiles])


@torch.no_grad()
def last_states(bench: Bench, rows: Sequence[Example]) -> Floats:
    """(layers, rows, D): the state behind every block at each answer's last token."""
    found: dict[int, Floats] = {}
    for group in single_batches(rows, bench.config.train.pass_tokens):
        batch = collate([rows[i] for i in group], ANSWER, bench.lm.tokenizer.pad_token_id).to(bench.lm.device)
        places = torch.tensor([rows[i].end - 1 for i in group], device=bench.lm.device)
        line = torch.arange(len(group), device=bench.lm.device)
        layers = [states[line, places].float().cpu().numpy() for states in _all_states(bench, batch.input_ids)]
        for n, i in enumerate(group):
            found[i] = np.stack([layer[n] for layer in layers]).astype(np.float64)
    return np.stack([found[i] for i in range(len(rows))], axis=1)


def _all_states(bench: Bench, ids: Tensor) -> Sequence[Tensor]:
    """The states behind each block, (B, T, D), before the final norm; padding lies right, where no token sees it."""
    body, caught = backbone(bench.policy.base.model), []

    def hear(_: Any, __: Any, out: Any) -> None:
        caught.append(out[0] if isinstance(out, tuple) else out)

    hooks = [block.register_forward_hook(hear) for block in decoder_blocks(body)]
    try:
        body(input_ids=ids)
    finally:
        for hook in hooks:
            hook.remove()
    return caught


def _final_norm(model: Any) -> Any:
    """The module that stands between the last block and the head: the last one of the body with a norm's name."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = backbone(inner)
    named = [child for name, child in body.named_children() if "norm" in name.lower() or name == "ln_f"]
    return named[-1] if named else torch.nn.Identity()


# -- the probe ---------------------------------------------------------------------------------------------


def _probed(states: Floats, owners: Sequence[tuple[int, bool]], units: Sequence[int]) -> Floats:
    """(layers, facts): a logistic probe trained on one half of the facts, tested on the other, and the other way; all
    wordings of a fact are in one half."""
    right = np.array([r for _, r in owners], dtype=np.float64)
    half = np.array([units[i] % 2 for i, _ in owners])
    scores = np.empty(states.shape[:2])
    for layer, x in enumerate(states):
        for fold in (0, 1):
            train, test = half != fold, half == fold
            if train.any() and test.any():
                scores[layer, test] = _log_odds(x[train], right[train], x[test])
            else:
                scores[layer, test] = 0.0
    return _wins(scores, owners, len(units))


def _log_odds(x: Floats, y: Floats, test: Floats) -> Floats:
    """Fit a ridge logistic regression on standardised states (n, D), labels (n,); returns other rows' log odds (m,)."""
    mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
    decay = _RIDGE * x.shape[1] / len(y)
    weights, intercept = logistic((x - mean) / spread, y, np.full(len(y), 1 / len(y)), decay)
    odds: Floats = (test - mean) / spread @ weights + intercept
    return odds
