"""Train the embedded gate: which layer, the network's weights, its calibration, and the threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qunlearn.errors import DataError, GateError
from qunlearn.guard.gate import Gate, Network, StateReader, pool
from qunlearn.guard.prompts import Prompts

_UNITS, _STEPS, _LR, _DECAY = 48, 240, 8e-3, 0.02
_BATCH = 256
_MEMBERS, _NOISE = 3, 0.3  # networks of a gate; noise on standardised states while they learn
_HELD = 0.3  # share of groups that the threshold and the layer are chosen on
_DEPTHS = (0.05, 0.2, 0.5)  # of the blocks, whose states are tried: low ones cost least
_TIE = 0.002  # of AUC, within which the lower layer is taken
_MISSES = 0.02  # share of bad prompts that the threshold may miss where both kinds lie apart
LEAST_AUC = 0.9


@dataclass(frozen=True)
class Threshold:
    """How the threshold is set: by a target rate of false alarms on held-out normal prompts, or `conformal`."""

    false_alarms: float = 0.01
    conformal: bool = False


@dataclass(frozen=True)
class Held:
    """What the gate did on prompts it had not learnt from."""

    auc: float
    layer: int
    by_layer: dict[str, float]
    bad: int
    normal: int
    missed: int
    false_alarms: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def train_gate(reader: StateReader, prompts: Prompts, rule: Threshold, seed: int) -> tuple[Gate, Held]:
    """Return the gate and how it did on what was held out.

    Layer, calibration and the figures come from networks that never saw the held-out prompts: other wordings of the
    bad ones, and normal ones that share nothing with those learnt from. The final ones learn from every bad prompt; the
    held-out normal ones, which the threshold rests on, are never learnt from.
    Raises GateError where the two kinds cannot be told apart, DataError where there are too few normal prompts.
    """
    data = _Data(reader, prompts, seed)
    by_layer: dict[int, float] = {}
    best = data.layers[0]
    for layer in data.layers:
        network = _fit(data.rows(layer, data.bad_train), data.rows(layer, data.normal_train), seed)
        bad, normal = (_scores(network, data.rows(layer, rows)) for rows in (data.bad_held, data.normal_held))
        by_layer[layer] = auc(bad.numpy(), normal.numpy())
        best = layer if by_layer[layer] > by_layer[best] + _TIE else best
    layer = best
    if by_layer[layer] < LEAST_AUC:
        message = f"held-out prompts to forget and others are not told apart: AUC {by_layer[layer]:.3f}"
        hint = f"at least {LEAST_AUC} is needed; give --normal rows that are near the bad ones, or more bad rows"
        raise GateError(message, where="gate", hint=hint)
    network = _fit_several(data.rows(layer, data.bad_train), data.rows(layer, data.normal_train), seed)
    bad, normal = (_scores(network, data.rows(layer, rows)) for rows in (data.bad_held, data.normal_held))
    slope, offset = _calibrated(bad, normal)
    final = _fit_several(data.rows(layer, data.bad_train + data.bad_held), data.rows(layer, data.normal_train), seed)
    passed = torch.sigmoid(slope * _scores(final, data.rows(layer, data.normal_held)) + offset)
    flagged = torch.sigmoid(slope * bad + offset)
    threshold = choose_threshold(flagged.tolist(), passed.tolist(), rule)
    gate = Gate(final, layer, slope, offset, threshold)
    held = Held(
        auc(bad.numpy(), normal.numpy()),
        layer,
        {str(n): value for n, value in by_layer.items()},
        len(flagged),
        len(passed),
        int((flagged < threshold).sum()),
        int((passed >= threshold).sum()),
    )
    return gate, held


def choose_threshold(bad: Sequence[float], normal: Sequence[float], rule: Threshold) -> float:
    """Return the probability from which a prompt is flagged, from held-out ones.

    By rate: the least that lets at most the wanted share of normal prompts through as false alarms; where the bad ones
    lie above it, half way up to the 2 % lowest of them (in log-odds), so that neither kind is close to the edge.
    Conformal (split): just above the ceil((n + 1)(1 - a))-th smallest of n normal probabilities; of prompts
    exchangeable with those, at most a share a is flagged, on average over the held-out sets.
    Raises DataError for fewer than 1/a - 1 of them.
    """
    n, a = len(normal), rule.false_alarms
    ordered = sorted(normal)
    if rule.conformal:
        rank = math.ceil((n + 1) * (1 - a))
        if rank > n:
            needed = math.ceil(1 / a) - 1
            message = f"{n} held-out normal prompts promise no rate of {100 * a:g} %: {needed} are needed"
            raise DataError(message, where="--conformal", hint="more --normal rows, or a higher --false-alarms")
        return math.nextafter(ordered[rank - 1], 2.0)
    edge = math.nextafter(ordered[max(0, n - 1 - math.floor(a * n))], 2.0)
    low = sorted(bad)[math.floor(_MISSES * len(bad))]
    if low <= edge:
        return edge
    middle = (_logit(edge) + _logit(low)) / 2
    return max(edge, 1 / (1 + math.exp(-middle)))


def auc(bad: Any, normal: Any) -> float:
    """Return the probability that a bad prompt scores above a normal one, ties counting half (Mann-Whitney U)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([bad, normal]))[: len(bad)]
    return float((ranks.sum() - len(bad) * (len(bad) + 1) / 2) / (len(bad) * len(normal)))


class _Data:
    """States of all prompts' windows by layer, and which groups are held out."""

    def __init__(self, reader: StateReader, prompts: Prompts, seed: int) -> None:
        rng = np.random.default_rng(seed)
        texts = [*prompts.bad, *prompts.normal, *prompts.strangers]
        windows = [reader.windows(text) for text in texts]
        # A bad prompt's place in a long text is not known: it is learnt from its first window alone.
        self.layers = sorted({min(reader.blocks - 1, round(share * (reader.blocks - 1))) for share in _DEPTHS})
        self.states = reader.states([found[0] for found in windows], self.layers)
        bad, normal = range(len(prompts.bad)), range(len(prompts.bad), len(prompts.bad) + len(prompts.normal))
        self.bad_train, self.bad_held = _split(list(bad), bad, rng)  # other wordings of what was learnt
        self.normal_train, self.normal_held = _split(list(normal), prompts.normal_groups, rng)
        self.normal_train += range(len(prompts.bad) + len(prompts.normal), len(texts))

    def rows(self, layer: int, rows: Sequence[int]) -> list[Tensor]:
        return [self.states[layer][i] for i in rows]


def _split(rows: list[int], groups: Sequence[int], rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """(to learn from, held out): whole groups; at least one group on each side. Raises DataError."""
    names = sorted(set(groups))
    if len(names) < 2:
        raise DataError("a gate needs at least two rows of each kind", where="gate", hint="more --bad or --normal rows")
    held = set(rng.permutation(names)[: max(1, round(_HELD * len(names)))].tolist())
    return (
        [row for row, group in zip(rows, groups, strict=True) if group not in held],
        [row for row, group in zip(rows, groups, strict=True) if group in held],
    )


def _fit_several(bad: Sequence[Tensor], normal: Sequence[Tensor], seed: int) -> Network:
    """Train several networks and set them side by side, so that their units score a token by their mean: what one of
    them took for a topic by chance counts a third."""
    made = [_fit(bad, normal, seed + n) for n in range(_MEMBERS)]
    return Network(
        made[0].mean,
        made[0].scale,
        torch.cat([n.w1 for n in made], 1),
        torch.cat([n.b1 for n in made]),
        torch.cat([n.w2 for n in made]) / _MEMBERS,
        torch.stack([n.b2 for n in made]).mean(),
    )


def _fit(bad: Sequence[Tensor], normal: Sequence[Tensor], seed: int) -> Network:
    """Minimise class-weighted cross-entropy with AdamW; as many rows of each kind in every batch."""
    rng = torch.Generator().manual_seed(seed)
    everything = torch.cat([*bad, *normal])
    mean, scale = everything.mean(0), everything.std(0).clamp(min=1e-4).reciprocal()
    width = everything.shape[1]
    w1 = torch.randn(width, _UNITS, generator=rng) / math.sqrt(width)
    network = Network(
        mean, scale, w1, torch.zeros(_UNITS), torch.randn(_UNITS, generator=rng) / math.sqrt(_UNITS), torch.tensor(-2.0)
    )
    trained = [network.w1, network.b1, network.w2, network.b2]
    for tensor in trained:
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=_LR, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=_STEPS)
    half = _BATCH // 2
    for _ in range(_STEPS):
        rows = [bad[i] for i in torch.randint(len(bad), (half,), generator=rng).tolist()]
        rows += [normal[i] for i in torch.randint(len(normal), (half,), generator=rng).tolist()]
        labels = torch.tensor([1.0] * half + [0.0] * half)
        padded, mask = _padded(rows)
        noisy = padded + _NOISE / scale * torch.randn(padded.shape, generator=rng)
        scores = pool(network.tokens(noisy), mask)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return Network.of(network.tensors(), width)


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


@torch.no_grad()
def _scores(network: Network, rows: Sequence[Tensor]) -> Tensor:
    out = []
    for at in range(0, len(rows), _BATCH):
        padded, mask = _padded(rows[at : at + _BATCH])
        out.append(pool(network.tokens(padded), mask))
    return torch.cat(out)


def _calibrated(bad: Tensor, normal: Tensor) -> tuple[float, float]:
    """Return slope and offset of the sigmoid that makes held-out scores probabilities (Platt, smoothed labels)."""
    from scipy.optimize import minimize

    x = torch.cat([bad, normal]).double().numpy()
    y = np.concatenate([np.full(len(bad), 1 - 1 / (len(bad) + 2)), np.full(len(normal), 1 / (len(normal) + 2))])
    weights = np.concatenate([np.full(len(bad), 0.5 / len(bad)), np.full(len(normal), 0.5 / len(normal))])

    def loss(p: Any) -> float:
        z = np.exp(p[0]) * x + p[1]
        return float((weights * (np.logaddexp(0, z) - y * z)).sum())

    found = minimize(loss, np.zeros(2), method="Nelder-Mead")
    return float(np.exp(found.x[0])), float(found.x[1])


def _logit(p: float) -> float:
    p = min(max(p, 1e-9), 1 - 1e-9)
    return math.log(p / (1 - p))
