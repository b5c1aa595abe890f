"""The measures of the before/after table, each from per-row scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qunlearn.evaluation.metrics import texts
from qunlearn.evaluation.metrics.membership import loss_score, zlib_score
from qunlearn.evaluation.metrics.tokens import perplexity, probability
from qunlearn.evaluation.metrics.verdicts import is_gibberish, verdict


@dataclass(frozen=True)
class TokenStats:
    """One row's teacher-forced tokens, as numbers that measures need (metrics/tokens.py defines each).

    NLLs in nats, summed; `tokens` are the answer's, `all_tokens` every token with one before it, `specific_tokens`
    those of the answer that weigh something, where the example has weights.
    """

    nll: float
    tokens: int
    all_nll: float
    all_tokens: int
    memorised: float
    extraction: float
    min_k: float
    min_k_plus: float
    zlib_bytes: int
    specific_nll: float = 0.0
    specific_tokens: int = 0


MEMBERSHIP: Mapping[str, Callable[[TokenStats], float]] = {
    "mia_loss": lambda s: loss_score(s.nll, s.tokens),
    "mia_zlib": lambda s: zlib_score(s.nll, s.zlib_bytes),
    "mia_min_k": lambda s: s.min_k,
    "mia_min_k_plus": lambda s: s.min_k_plus,
}


@dataclass(frozen=True)
class RowScore:
    """One row under one model: its tokens, and its texts, `output` greedy."""

    stats: TokenStats
    prompt: str
    answer: str
    output: str

    @property
    def probability(self) -> float:
        """Geometric mean of the answer tokens' probabilities: exp(-NLL / tokens) (TOFU's answer probability)."""
        return probability(self.stats.nll, self.stats.tokens)

    @property
    def verdict(self) -> str:
        """One word for the output: see `verdicts.verdict`."""
        return verdict(self.output, self.answer, self.prompt)

    @property
    def specific_probability(self) -> float | None:
        """The same of the specific tokens alone: form that stays probable does not hide them. None without any."""
        s = self.stats
        return probability(s.specific_nll, s.specific_tokens) if s.specific_tokens else None

    @property
    def sentence(self) -> bool:
        """Return whether the output is a sentence: not empty, not gibberish, nothing over and over."""
        return not is_gibberish(self.output)

    @property
    def exact(self) -> bool:
        """Greedy output equal to the answer, surrounding white space aside."""
        return bool(texts.exact_match(self.output, self.answer))


@dataclass(frozen=True)
class SetScore:
    """A data set under one model: means over rows, perplexity over tokens; the last two where rows have weights."""

    n: int
    probability: float
    exact_match: float
    perplexity: float
    sentences: float = 1.0
    specific_probability: float | None = None
    extraction_strength: float | None = None


def aggregate(rows: Sequence[RowScore]) -> SetScore:
    """Means over rows; perplexity = exp(sum of NLL / number of tokens) over all tokens of the set."""
    if not rows:
        raise ValueError("no rows to aggregate")
    specific = [p for p in (r.specific_probability for r in rows) if p is not None]
    return SetScore(
        n=len(rows),
        probability=sum(r.probability for r in rows) / len(rows),
        exact_match=sum(r.exact for r in rows) / len(rows),
        perplexity=perplexity(sum(r.stats.all_nll for r in rows), sum(r.stats.all_tokens for r in rows)),
        sentences=sum(r.sentence for r in rows) / len(rows),
        specific_probability=sum(specific) / len(specific) if specific else None,
        extraction_strength=sum(r.stats.extraction for r in rows) / len(rows) if specific else None,
    )
