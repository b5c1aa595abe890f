"""Scores of rows under a policy, with the adapter on or off: teacher-forced and greedy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qunlearn.data.batch import ALL, ANSWER, Span, collate, single_batches
from qunlearn.data.tokenize import Example, answer_text, decode
from qunlearn.evaluate.metrics import RowScore
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.head import token_kl, token_logps
from qunlearn.model.load import LanguageModel
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Reference

_MARGIN = 8  # tokens a greedy answer may run past the true one: enough to tell equal from longer


def score_rows(lm: LanguageModel, examples: Sequence[Example], max_tokens: int) -> list[RowScore]:
    """One score per example, deterministic."""
    answers = row_nlls(lm, examples, ANSWER, max_tokens)
    everything = row_nlls(lm, examples, ALL, max_tokens)
    outputs = _greedy(lm, examples)
    texts = [answer_text(example, lm.tokenizer) for example in examples]
    return [RowScore(*a, *e, t, o) for a, e, t, o in zip(answers, everything, texts, outputs, strict=True)]


@torch.no_grad()
def row_nlls(lm: LanguageModel, examples: Sequence[Example], span: Span, max_tokens: int) -> list[tuple[float, int]]:
    """(summed NLL, tokens) of each row over a span, without logits of unsupervised positions."""
    out: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    for group in single_batches(examples, max_tokens):
        batch = collate([examples[i] for i in group], span, lm.tokenizer.pad_token_id).to(lm.device)
        logps = token_logps(batch.pick(lm.hidden(batch)), batch.labels, lm.head).double()
        sums = torch.zeros(len(group), dtype=torch.float64, device=logps.device).index_add_(0, batch.rows, logps)
        counts = torch.bincount(batch.rows, minlength=len(group))
        for i, total, n in zip(group, sums.tolist(), counts.tolist(), strict=True):
            out[i] = (-total, n)
    return out


def forget_probability(lm: LanguageModel, examples: Sequence[Example], max_tokens: int) -> float:
    """Mean over rows of the answer's probability, per token: exp(-NLL / tokens)."""
    rows = row_nlls(lm, examples, ANSWER, max_tokens)
    return sum(math.exp(-nll / n) for nll, n in rows) / len(rows)


@torch.no_grad()
def mean_kl(policy: Policy, reference: Reference, examples: Sequence[Example], max_tokens: int) -> float:
    """Drift: KL(base || policy) in nats per token, over all tokens of the rows."""
    total, tokens = 0.0, 0
    for group in single_batches(examples, max_tokens):
        rows = [examples[i] for i in group]
        batch = collate(rows, ALL, policy.tokenizer.pad_token_id).to(policy.device)
        h_ref = torch.cat(reference.states(rows, [ALL] * len(rows)))
        total += float(token_kl(batch.pick(policy.hidden(batch)), h_ref, policy.head).double().sum())
        tokens += batch.supervised_tokens
    return total / max(1, tokens)


def _greedy(lm: LanguageModel, examples: Sequence[Example]) -> list[str]:
    """Greedy continuations from each row's probe point."""
    if not examples:
        return []
    new = max(e.end - e.probe for e in examples) + _MARGIN
    prompts = [e.input_ids[: e.probe] for e in examples]
    out = generate(lm, prompts, Sampling(new))
    closings = [
        # Plain text has no end of its own: compare as many tokens as the answer has.
        ids if e.record.turns else ids[: e.end - e.probe]
        for e, ids in zip(examples, out, strict=True)
    ]
    return [decode(ids, lm.tokenizer) for ids in closings]
