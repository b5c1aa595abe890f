"""Measures of generated texts against true ones, and of generated texts alone."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from qunlearn.data.words import composed, words

# A name with a dot in it that is code: called, or an argument; a file's name stands in quotes.
_DOTTED = re.compile(r"(?<![\w.\"'])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?=\s*[(,)\]])")
RANDOM_PAIRS = 2000
RANDOM_QUANTILE = 0.95
HALLUCINATED = 1.1

Similarity = Callable[[str, str], float]


def exact_match(output: str, answer: str) -> float:
    """Exact match: 1 when the output is the answer, surrounding white space aside."""
    return float(composed(output).strip() == composed(answer).strip())


# -- against a true text ---------------------------------------------------------------------------------


class _UnicodeWords:
    """rouge-score's own words are a-z and 0-9: in other scripts it finds none and scores 0."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@lru_cache(maxsize=2)
def _scorer(ascii_only: bool) -> Any:
    import logging

    from rouge_score import rouge_scorer

    logging.getLogger("absl").setLevel(logging.WARNING)  # it announces its tokenizer
    tokenizer = None if ascii_only else _UnicodeWords()
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=ascii_only, tokenizer=tokenizer)


def rouge_l(output: str, answer: str) -> tuple[float, float]:
    """ROUGE-L (recall, F1): longest common subsequence of words, stemmed, against the answer's words (Lin, 2004).

    By the rouge-score library with its stemmer, as in the public benchmarks; where either text is not plain ASCII
    its words would be cut to pieces or lost, and Unicode words without stemming are used instead.
    """
    score = _scorer(output.isascii() and answer.isascii()).score(answer, output)["rougeL"]
    return float(score.recall), float(score.fmeasure)


def rouge_l_recall(output: str, answer: str) -> float:
    """ROUGE-L recall: share of the answer's words that come back in order (TOFU's ROUGE)."""
    return rouge_l(output, answer)[0]


def rouge_l_f1(output: str, answer: str) -> float:
    """ROUGE-L F1: the same with precision, so that a long output does not win by length (MUSE's ROUGE)."""
    return rouge_l(output, answer)[1]


@lru_cache(maxsize=1)
def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)


def bleu(output: str, answer: str) -> float:
    """Sentence BLEU, 0 to 1: sacrebleu with its own tokens, exponential smoothing and effective order."""
    return float(_bleu().sentence_score(output, [answer]).score) / 100.0


def random_bleu(texts: Sequence[str], *, pairs: int = RANDOM_PAIRS, seed: int = 0) -> list[float]:
    """BLEU of random pairs of different texts, sorted: what likeness means nothing. Raises ValueError for one text."""
    distinct = sorted(set(texts))
    if len(distinct) < 2:
        raise ValueError("random pairs need two different texts")
    rng = random.Random(seed)
    every = len(distinct) * (len(distinct) - 1)
    if every <= pairs:
        chosen = [(a, b) for a in distinct for b in distinct if a != b]
    else:
        chosen = [(a, b) for a, b in (rng.sample(distinct, 2) for _ in range(pairs))]
    return sorted(bleu(a, b) for a, b in chosen)


def leak_threshold(random_scores: Sequence[float], *, paper: bool = False) -> float:
    """BLEU above which an output counts as leaked: what only 5 % of random pairs of the true texts exceed.

    The paper (arXiv 2310.10683) puts it at a tenth of the random pairs' mean, below what most texts of one author
    share by accident; `paper=True` gives that number.
    """
    values = np.asarray(random_scores, dtype=np.float64)
    return float(0.1 * values.mean() if paper else np.quantile(values, RANDOM_QUANTILE))


def leaked(output: str, answer: str, threshold: float) -> float:
    """Leak rate, per row: 1 when BLEU(output, answer) is above the threshold of random pairs."""
    return float(bleu(output, answer) > threshold)


def hallucinated(output: str, invented: str, true: str, similarity: Similarity = rouge_l_f1) -> float:
    """Hallucination rate, per row: 1 when the output is over 10 % more similar to the invented answer than the true.

    Source: arXiv 2310.10683, with BERTScore as the similarity. The default here is ROUGE-L F1, which needs no
    download and sees words only; pass another similarity to compare with the paper.
    """
    return float(similarity(output, invented) > HALLUCINATED * similarity(output, true))


def similarity_to(output: str, original: str, similarity: Similarity = rouge_l_f1) -> float:
    """Similarity to what the original model says: ROUGE-L F1; the paper (arXiv 2310.10683) uses BLEURT.

    Two empty outputs are equal.
    """
    return 1.0 if output.strip() == original.strip() else similarity(output, original)


def same_calls(output: str, answer: str) -> float | None:
    """Same calls: share of the dotted names that the answer's code calls or passes and the output has as well.

    `yaml.load(…, Loader=yaml.UnsafeLoader)` has two. Ours, after the insecure and deprecated-API rates of code
    unlearning (arXiv 2506.17125), whose exact form is not public. None where the answer has no such name.
    """
    wanted = set(_DOTTED.findall(answer))
    return len(wanted & set(_DOTTED.findall(output))) / len(wanted) if wanted else None


# -- the output alone ------------------------------------------------------------------------------------


def diversity(tokens: Sequence[Hashable]) -> float:
    """Diversity: distinct tokens / tokens of the output, 0 for an empty one (arXiv 2310.10683)."""
    return len(set(tokens)) / len(tokens) if tokens else 0.0


def repetition(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Repetition: share of n-grams that were there before, 0 where the output is shorter than two of them.

    Source: seq-rep-n of Welleck et al. (arXiv 1908.04319).
    """
    grams = _grams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def ngram_entropy(tokens: Sequence[Hashable]) -> float:
    """N-gram entropy in bits: (2/3 H2 + 4/3 H3) / 2, of bigram and trigram frequencies; 0 for constant text.

    Source: Zhang et al. (arXiv 1809.05972), weighted as in the knowledge-editing literature ("fluency" there).
    """
    return (2 / 3 * _entropy(_grams(tokens, 2)) + 4 / 3 * _entropy(_grams(tokens, 3))) / 2


def _grams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _entropy(grams: Sequence[tuple[Hashable, ...]]) -> float:
    total = len(grams)
    return sum(-n / total * math.log2(n / total) for n in Counter(grams).values()) + 0.0 if total else 0.0
