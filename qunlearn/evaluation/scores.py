"""Score rows under a model, with the adapter on or off: teacher-forced and greedy.

Memory is bounded by the token budget and the key-value cache: per row only a few numbers and a text are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qunlearn.data.batch import ALL, ANSWER, Span, collate, single_batches
from qunlearn.data.tokenize import MANY_TOKENS, Example, answer_text, decode
from qunlearn.evaluation.metrics import RowScore, TokenStats, membership, tokens
from qunlearn.evaluation.token_scores import TokenScores, token_scores
from qunlearn.model.generate import Asked, Sampling, generate_each
from qunlearn.model.head import token_kl, token_logps
from qunlearn.model.language_model import LanguageModel
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Live, Reference
from qunlearn.parallel.ranks import current

_FEW_TOKENS = 4  # watched tokens that are a value rather than a text
_CERTAIN, _TENTH = 0.5, 0.1
_MARGIN = 8  # tokens a greedy answer may run past the true one: enough to tell equal from longer
Observer = Callable[[int], None]


@dataclass(frozen=True)
class Output:
    """A greedy output: its text, its tokens, and how many of them are distinct."""

    text: str
    tokens: int
    distinct: int


def score_rows(lm: LanguageModel, examples: Sequence[Example], max_tokens: int) -> list[RowScore]:
    """One score per example, deterministic."""
    return score_each(lm, [examples], max_tokens)[0]


def score_each(lm: LanguageModel, sets: Sequence[Sequence[Example]], max_tokens: int) -> list[list[RowScore]]:
    """One score per example of each set, as they are alone."""
    stats = [token_stats(lm, examples, max_tokens) for examples in sets]
    return [
        [
            RowScore(s, example.record.prompt, answer_text(example, lm.tokenizer), output.text)
            for example, s, output in zip(*found, strict=True)
        ]
        for found in zip(sets, stats, outputs_each(lm, sets), strict=True)
    ]


def token_stats(
    lm: LanguageModel, examples: Sequence[Example], max_tokens: int, observe: Observer | None = None
) -> list[TokenStats]:
    """Everything teacher forcing tells about each row, in one pass. `observe` hears how many rows are done."""
    return current().divided(
        examples, lambda rows: _token_stats(lm, rows, max_tokens, observe), lambda found: TokenStats(**found)
    )


@torch.no_grad()
def _token_stats(
    lm: LanguageModel, examples: Sequence[Example], max_tokens: int, observe: Observer | None
) -> list[TokenStats]:
    out: dict[int, TokenStats] = {}
    for group in single_batches(examples, max_tokens):
        batch = collate([examples[i] for i in group], ALL, lm.tokenizer.pad_token_id).to(lm.device)
        scores = token_scores(batch.pick(lm.hidden(batch)), batch.labels, lm.head)
        at = 0
        for i in group:
            n = len(examples[i].input_ids) - 1
            out[i] = _reduce(scores, at, examples[i], answer_text(examples[i], lm.tokenizer))
            at += n
        if observe is not None:
            observe(len(out))
    return [out[i] for i in range(len(examples))]


def _reduce(scores: TokenScores, at: int, example: Example, text: str) -> TokenStats:
    """The numbers of the row whose first predicted token stands at `at`."""
    everything = scores.logps[at : at + len(example.input_ids) - 1]
    answer = slice(at + example.start - 1, at + example.end - 1)
    logps, hits = scores.logps[answer].numpy(), scores.hits[answer].numpy()
    specific = [weight > 0 for weight in example.weights]
    return TokenStats(
        nll=-float(logps.sum()),
        tokens=int(logps.size),
        all_nll=-float(everything.sum()),
        all_tokens=int(everything.numel()),
        memorised=tokens.exact_memorisation(hits),
        extraction=tokens.extraction_strength(hits),
        min_k=membership.min_k_score(logps),
        min_k_plus=membership.min_k_plus_score(logps, scores.means[answer].numpy(), scores.stds[answer].numpy()),
        zlib_bytes=membership.zlib_bytes(text),
        specific_nll=-float(logps[specific].sum()) if specific else 0.0,
        specific_tokens=sum(specific),
    )


def row_nlls(
    lm: LanguageModel,
    examples: Sequence[Example],
    span: Span,
    max_tokens: int,
    observe: Observer | None = None,
    most: Sequence[float] = (),
) -> list[tuple[float, int]]:
    """(summed NLL, tokens) of each row over a span, without logits of unsupervised positions.

    `most` is for each row, where it is given, the NLL that a token counts at most, in a row of many: few that are gone
    do not stand for the others.
    """
    rows = list(zip(examples, most or [math.inf] * len(examples), strict=True))

    def compute(some: Sequence[tuple[Example, float]]) -> list[tuple[float, int]]:
        return _row_nlls(lm, [e for e, _ in some], span, max_tokens, observe, [cap for _, cap in some])

    return current().divided(rows, compute, lambda found: (found[0], found[1]))


def prompt_nlls(lm: LanguageModel, examples: Sequence[Example], max_tokens: int, first: int = 1) -> list[float]:
    """Return the NLL of each row's prompt from its token `first` on, in nats per token."""
    prompts = [Example(e.input_ids[: e.start], first, e.start, first, e.record) for e in examples]
    return [nll / max(1, n) for nll, n in row_nlls(lm, prompts, ANSWER, max_tokens)]


@torch.no_grad()
def _row_nlls(
    lm: LanguageModel,
    examples: Sequence[Example],
    span: Span,
    max_tokens: int,
    observe: Observer | None,
    most: Sequence[float],
) -> list[tuple[float, int]]:
    out: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    done = 0
    for group in single_batches(examples, max_tokens):
        batch = collate([examples[i] for i in group], span, lm.tokenizer.pad_token_id).to(lm.device)
        logps = token_logps(batch.pick(lm.hidden(batch)), batch.labels, lm.head).double()
        counts = torch.bincount(batch.rows, minlength=len(group))
        caps = torch.tensor([most[i] for i in group], dtype=torch.float64, device=logps.device)[batch.rows]
        logps = torch.where(counts[batch.rows] > MANY_TOKENS, torch.maximum(logps, -caps), logps)
        sums = torch.zeros(len(group), dtype=torch.float64, device=logps.device).index_add_(0, batch.rows, logps)
        for i, total, n in zip(group, sums.tolist(), counts.tolist(), strict=True):
            out[i] = (-total, n)
        done += len(group)
        if observe is not None:
            observe(done)
    return out


def row_target(tokens: int, target: float) -> float:
    """Return the probability per token at which a row of so many watched tokens is forgotten: `target` for a few, its
    square root for many, since a long text needs less per token for no part of it to come back."""
    return float(target ** max(0.5, min(1.0, math.sqrt(_FEW_TOKENS / max(1, tokens)))))


def row_goal(tokens: int, known: float, target: float) -> float:
    """Return the probability per token at which a row is forgotten: that of `row_target`, but where the base is not
    certain of the answer, at most a tenth of what it gives or `target`: one in words of its own is still what a model
    says first at a third."""
    goal = row_target(tokens, target)
    return min(goal, max(target, _TENTH * known)) if known < _CERTAIN else goal


def row_probabilities(lm: LanguageModel, examples: Sequence[Example], max_tokens: int) -> list[float]:
    """Return each answer's probability, per token, over those of its tokens that weigh something."""
    return [tokens.probability(nll, max(1, n)) for nll, n in row_nlls(lm, examples, ANSWER, max_tokens)]


@torch.no_grad()
def answer_logps(policy: Policy, examples: Sequence[Example], max_tokens: int) -> list[Tensor]:
    """Return the log probability (nats) of each answer token under the untouched model, whatever it weighs; CPU."""
    if not examples:
        return []
    bare = [replace(example, weights=()) for example in examples]
    found: dict[int, Tensor] = {}
    # The states of all rows would be gigabytes: those of a pass are let go before the next.
    for batch, h in Live(policy, max_tokens).passes(bare, [ANSWER] * len(bare)):
        logps = token_logps(h, batch.labels, policy.head).cpu()
        sizes = [ANSWER.count(bare[i]) for i in batch.examples]
        found.update(zip(batch.examples, torch.split(logps, sizes), strict=True))
    return [found[i] for i in range(len(bare))]


def mean_kl(policy: Policy, reference: Reference, examples: Sequence[Example], max_tokens: int) -> float:
    """Drift: KL(base || policy) in nats per token, over all tokens of the rows."""
    parts = current().each(examples, lambda rows: _summed_kl(policy, reference, rows, max_tokens))
    return sum(total for total, _ in parts) / max(1, sum(tokens for _, tokens in parts))


@torch.no_grad()
def _summed_kl(policy: Policy, reference: Reference, examples: Sequence[Example], max_tokens: int) -> tuple[float, int]:
    """(KL in nats, tokens) of all the rows."""
    total, tokens = 0.0, 0
    for group in single_batches(examples, max_tokens):
        rows = [examples[i] for i in group]
        batch = collate(rows, ALL, policy.tokenizer.pad_token_id).to(policy.device)
        h_ref = torch.cat(reference.states(rows, [ALL] * len(rows)))
        total += float(token_kl(batch.pick(policy.hidden(batch)), h_ref, policy.head).double().sum())
        tokens += batch.supervised_tokens
    return total, tokens


def greedy_outputs(lm: LanguageModel, examples: Sequence[Example], observe: Observer | None = None) -> list[Output]:
    """Greedy continuations from each row's probe point, batched.

    How far a row may run hangs on its own answer alone, so that no row's output depends on the others; rows of
    like length share a batch, for one long answer would keep all the others waiting.
    """
    return outputs_each(lm, [examples], observe)[0]


def outputs_each(
    lm: LanguageModel, sets: Sequence[Sequence[Example]], observe: Observer | None = None
) -> list[list[Output]]:
    """The same of several sets, none of which shares a batch with another; several processes divide the batches."""
    places: list[list[tuple[int, int]]] = []
    asked: list[Asked] = []
    for n, examples in enumerate(sets):
        buckets: dict[int, list[int]] = {}
        for i, example in enumerate(examples):
            buckets.setdefault(_room(example.end - example.probe + _MARGIN), []).append(i)
        for room, rows in sorted(buckets.items(), reverse=True):
            places.append([(n, i) for i in rows])
            asked.append(Asked([examples[i].input_ids[: examples[i].probe] for i in rows], Sampling(room)))
    out: dict[tuple[int, int], Output] = {}
    for of_bucket, continued in zip(places, generate_each(lm, asked, observe), strict=True):
        for (n, i), ids in zip(of_bucket, continued, strict=True):
            example = sets[n][i]
            # Plain text has no end of its own: compare as many tokens as the answer has.
            own = ids if example.record.turns else ids[: example.end - example.probe]
            out[n, i] = Output(decode(own, lm.tokenizer), len(own), len(set(own)))
    return [[out[n, i] for i in range(len(examples))] for n, examples in enumerate(sets)]


def _room(wanted: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128 … new tokens: few different batches, little waste."""
    size = 16
    while size < wanted:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size
