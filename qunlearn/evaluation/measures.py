"""Compute measures from what was found: per row where a measure has rows, and one estimate per split and model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qunlearn.data.words import words
from qunlearn.evaluation.catalog import MEASURES
from qunlearn.evaluation.metrics import TokenStats, membership, stats, texts, tokens, verdicts
from qunlearn.evaluation.metrics.rows import MEMBERSHIP
from qunlearn.evaluation.metrics.stats import Estimate, estimate
from qunlearn.evaluation.results import BASE, KEPT, RETRAINED, ChoiceScores, Fluency, Item, View, is_forget
from qunlearn.evaluation.scores import Output

Values = list[float | None]
NOT_MEANINGFUL = 0.8  # share of one-character outputs above which the paper withholds fluency


def row_values(name: str, view: View, subject: str, split: str) -> Values | None:
    """One value per item, None for an item it does not apply to; None where the measure has no rows."""
    if name in _OUTPUT:
        function = _OUTPUT[name]
        pairs = zip(view.items[split], view.get(subject, split, "outputs"), strict=True)
        return [function(item, output) for item, output in pairs]
    if name in _TOKEN:
        return [_TOKEN[name](row) for row in view.get(subject, split, "tokens")]
    if name in _CHOICE:
        return [None if c is None else _CHOICE[name](c) for c in view.get(subject, split, "choices")]
    return _ROWS[name](view, subject, split) if name in _ROWS else None


def measure(name: str, view: View, subject: str, split: str, values: Values | None) -> Estimate | None:
    """The estimate of a measure for a split, from its row values where it has any; None where it cannot be had."""
    if name in _WHOLE:
        return _WHOLE[name](view, subject, split)
    known = [value for value in values or () if value is not None]
    return estimate(known) if known else None


def can_measure(name: str, view: View, subject: str, split: str) -> bool:
    """Return whether every probe a measure needs was run on the split; over all splits each term asks for itself."""
    return split == KEPT or view.has(subject, split, *MEASURES[name].needs)


# -- per row ---------------------------------------------------------------------------------------------


def _hallucinated(item: Item, output: Output) -> float | None:
    return None if item.truth is None else texts.hallucinated(output.text, item.answer, item.truth)


_OUTPUT: Mapping[str, Callable[[Item, Output], float | None]] = {
    "exact_match": lambda item, o: texts.exact_match(o.text, item.answer),
    "leaks": lambda item, o: float(verdicts.leaks(o.text, item.answer, item.prompt)),
    "refused": lambda item, o: float(verdicts.is_refusal(o.text)),
    "gibberish": lambda item, o: float(verdicts.is_gibberish(o.text)),
    "rouge_recall": lambda item, o: texts.rouge_l_recall(o.text, item.answer),
    "rouge_f1": lambda item, o: texts.rouge_l_f1(o.text, item.answer),
    "bleu": lambda item, o: texts.bleu(o.text, item.answer),
    "same_calls": lambda item, o: texts.same_calls(o.text, item.answer),
    "hallucination_rate": _hallucinated,
    "diversity": lambda item, o: o.distinct / o.tokens if o.tokens else 0.0,
    "repetition": lambda item, o: texts.repetition(words(o.text)),
    "ngram_entropy": lambda item, o: texts.ngram_entropy(words(o.text)),
}

_TOKEN: Mapping[str, Callable[[TokenStats], float]] = {
    "probability": lambda s: tokens.probability(s.nll, s.tokens),
    "extraction_strength": lambda s: s.extraction,
    "exact_memorisation": lambda s: s.memorised,
}


def _ratio(c: ChoiceScores) -> float:
    return tokens.truth_ratio(c.correct, c.wrong)


_CHOICE: Mapping[str, Callable[[ChoiceScores], float]] = {
    "truth_ratio": lambda c: tokens.truth_ratio_forget(_ratio(c)),
    "truth_utility": lambda c: tokens.truth_ratio_utility(_ratio(c)),
    "truth_share": lambda c: tokens.truth_share(_ratio(c)),
    "choice": lambda c: tokens.choice(c.correct, c.wrong),
}


def _leak_rate(view: View, subject: str, split: str, *, paper: bool) -> Values:
    answers = [item.answer for item in view.items[split]]
    if len(set(answers)) < 2:
        return [None] * len(answers)
    threshold = texts.leak_threshold(texts.random_bleu(answers), paper=paper)
    outputs = view.get(subject, split, "outputs")
    return [texts.leaked(o.text, answer, threshold) for o, answer in zip(outputs, answers, strict=True)]


def _similarity(view: View, subject: str, split: str) -> Values:
    if not view.has(BASE, split, "outputs"):
        return [None] * len(view.items[split])
    pairs = zip(view.get(subject, split, "outputs"), view.get(BASE, split, "outputs"), strict=True)
    return [texts.similarity_to(mine.text, original.text) for mine, original in pairs]


def fluency(spoken: Sequence[Fluency | None], outputs: Sequence[str]) -> Values:
    """Fluency: mean NLL of an output's tokens behind its prompt under the base, in nats per token; exp of it is the
    perplexity.

    Source: arXiv 2310.10683, whose printed values below 1 can only be log-perplexities. None for an output without
    words, and for all of a split where at least 80 % of the outputs are one character over and over (its "NM").
    """
    if outputs and sum(map(verdicts.is_one_character, outputs)) >= NOT_MEANINGFUL * len(outputs):
        return [None] * len(outputs)
    return [None if found is None else found.nll / found.tokens for found in spoken]


def _fluency(view: View, subject: str, split: str) -> Values:
    outputs = [output.text for output in view.get(subject, split, "outputs")]
    return fluency(view.get(subject, split, "fluency"), outputs)


def _judged(probe: str) -> Callable[[View, str, str], Values]:
    """A value that a classifier or reward model gave to each output."""

    def values(view: View, subject: str, split: str) -> Values:
        if not view.has(subject, split, probe):
            return [None] * len(view.items[split])
        return [score.value for score in view.get(subject, split, probe)]

    return values


_ROWS: Mapping[str, Callable[[View, str, str], Values]] = {
    "leak_rate": lambda view, subject, split: _leak_rate(view, subject, split, paper=False),
    "leak_rate_paper": lambda view, subject, split: _leak_rate(view, subject, split, paper=True),
    "similarity": _similarity,
    "fluency": _fluency,
    "harmful_rate": _judged("harm"),
    "reward": _judged("reward"),
}

# -- over a whole split ----------------------------------------------------------------------------------

_Whole = Callable[[View, str, str], Estimate | None]


def _perplexity(view: View, subject: str, split: str) -> Estimate:
    rows: Sequence[TokenStats] = view.get(subject, split, "tokens")
    return stats.bootstrap_perplexity([r.all_nll for r in rows], [r.all_tokens for r in rows])


def _ratios(view: View, subject: str, split: str) -> list[float]:
    if not view.has(subject, split, "choices"):
        return []
    return [_ratio(c) for c in view.get(subject, split, "choices") if c is not None]


def _against_retrained(compare: Callable[[Sequence[float], Sequence[float]], float]) -> _Whole:
    """Truth ratios against those of a model that never saw the data."""

    def distance(view: View, subject: str, split: str) -> Estimate | None:
        mine, theirs = _ratios(view, subject, split), _ratios(view, RETRAINED, split)
        return Estimate(len(mine), compare(mine, theirs)) if mine and theirs else None

    return distance


def _attack_scores(name: str, view: View, subject: str, split: str) -> list[float] | None:
    if not view.has(subject, split, "tokens"):
        return None
    rows: Sequence[TokenStats] = view.get(subject, split, "tokens")
    if name != "mia_reference":
        return [MEMBERSHIP[name](row) for row in rows]
    if subject == RETRAINED or not view.has(RETRAINED, split, "tokens"):
        return None
    theirs = view.get(RETRAINED, split, "tokens")
    return [membership.reference_score(s.nll, g.nll, s.tokens) for s, g in zip(rows, theirs, strict=True)]


def _membership(name: str) -> _Whole:
    def auc(view: View, subject: str, split: str) -> Estimate | None:
        members = _attack_scores(name, view, subject, split)
        others = _attack_scores(name, view, subject, "holdout")
        return membership.auc_estimate(members, others) if members and others else None

    return auc


def _privacy_leakage(view: View, subject: str, split: str) -> Estimate | None:
    """From the AUC of Min-K, against the retrained model's where there is one, else against 0.5."""
    mine = _membership("mia_min_k")(view, subject, split)
    theirs = _membership("mia_min_k")(view, RETRAINED, split) if RETRAINED in view.subjects else None
    expected = theirs.mean if theirs else 0.5
    if mine is None or expected >= 1.0:
        return None
    ends = [None if x is None else membership.privacy_leakage(x, expected) for x in (mine.high, mine.low)]
    return Estimate(mine.n, membership.privacy_leakage(mine.mean, expected), *ends)


def model_utility(view: View, subject: str, split: str) -> Estimate | None:
    """Model utility: harmonic mean of probability, ROUGE-L recall and max(0, 1 - R) over the splits to keep.

    TOFU (arXiv 2401.06121) takes retain, real authors and world facts; here it is whatever splits were given. 0 as
    soon as one term is 0. `n` is the number of terms, and there is no interval.
    """
    terms: list[float] = []
    for kept in (name for name in view.items if not is_forget(name)):
        for name in ("probability", "rouge_recall", "truth_utility"):
            if can_measure(name, view, subject, kept):
                known = [v for v in row_values(name, view, subject, kept) or () if v is not None]
                terms += [float(np.mean(known))] if known else []
    return Estimate(len(terms), stats.harmonic_mean(terms)) if terms else None


_WHOLE: Mapping[str, _Whole] = {
    "perplexity": _perplexity,
    "forget_quality": _against_retrained(stats.forget_quality),
    "truth_distance": _against_retrained(stats.truth_distance),
    **{name: _membership(name) for name in (*MEMBERSHIP, "mia_reference")},
    "privacy_leakage": _privacy_leakage,
    "model_utility": model_utility,
}


def verdict_of(item: Item, output: Output) -> str:
    """One word for an output: see `metrics.verdicts.verdict`."""
    return verdicts.verdict(output.text, item.answer, item.prompt)
