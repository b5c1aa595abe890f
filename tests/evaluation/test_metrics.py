"""Every measure against an oracle written from its formula, or an example worked by hand."""

from __future__ import annotations

import itertools
import math
import zlib
from collections import Counter
from functools import cache

import numpy as np
import pytest
from conftest import row_score
from scipy import stats as scipy_stats

from qunlearn.evaluation.metrics import membership, stats, texts, tokens, verdicts

RNG = np.random.default_rng(7)

# -- tokens ----------------------------------------------------------------------------------------------


def test_answer_probability_is_the_geometric_mean() -> None:
    probabilities = [0.5, 0.25, 0.9]
    expected = (0.5 * 0.25 * 0.9) ** (1 / 3)
    assert tokens.probability(-float(np.log(probabilities).sum()), 3) == pytest.approx(expected, rel=1e-12)
    assert tokens.probability(-math.log(0.3), 1) == pytest.approx(0.3)


def test_perplexity() -> None:
    assert tokens.perplexity(6 * math.log(7), 6) == pytest.approx(7)
    assert tokens.perplexity(1e6, 1) == math.exp(100)


def slow_extraction(hits: list[bool]) -> float:
    for k in range(len(hits) + 1):  # a prefix of k true tokens, after which everything follows
        if all(hits[k:]):
            return 1 - k / len(hits)
    raise AssertionError


@pytest.mark.parametrize("hits", [list(h) for n in range(1, 6) for h in itertools.product([False, True], repeat=n)])
def test_extraction_strength(hits: list[bool]) -> None:
    assert tokens.extraction_strength(hits) == pytest.approx(slow_extraction(hits))
    # The public loop ends at k = N - 1 whether or not the last token is right.
    k = next((k for k in range(len(hits)) if all(hits[k:])), len(hits) - 1)
    assert tokens.extraction_strength(hits, floor=True) == pytest.approx(1 - k / len(hits))
    assert tokens.exact_memorisation(hits) == pytest.approx(sum(hits) / len(hits))


def test_extraction_strength_has_a_true_zero() -> None:
    assert tokens.extraction_strength([False] * 10) == 0.0
    assert tokens.extraction_strength([True] * 9 + [False]) == 0.0
    assert tokens.extraction_strength([False] * 10, floor=True) == pytest.approx(0.1)
    assert tokens.extraction_strength([True]) == 1.0


def test_truth_ratio_both_definitions() -> None:
    correct, wrong = 0.4, [0.9, 1.7, 2.0]
    geometric = (math.exp(-0.9) * math.exp(-1.7) * math.exp(-2.0)) ** (1 / 3)
    arithmetic = (math.exp(-0.9) + math.exp(-1.7) + math.exp(-2.0)) / 3
    assert tokens.truth_ratio(correct, wrong) == pytest.approx(geometric / math.exp(-0.4))
    assert tokens.truth_ratio(correct, wrong, arithmetic=True) == pytest.approx(arithmetic / math.exp(-0.4))
    ratio = tokens.truth_ratio(correct, wrong)
    assert tokens.truth_share(ratio) == pytest.approx(math.exp(-0.4) / (math.exp(-0.4) + geometric))
    assert tokens.truth_ratio_forget(4.0) == tokens.truth_ratio_forget(0.25) == 0.25
    assert tokens.truth_ratio_utility(4.0) == 0.0
    assert tokens.truth_ratio_utility(0.25) == 0.75
    assert math.isfinite(tokens.truth_ratio(5000.0, [0.0]))
    with pytest.raises(ValueError, match="wrong answer"):
        tokens.truth_ratio(1.0, [])


def test_choice_and_its_chance_level() -> None:
    assert tokens.choice(1.0, [2.0, 3.0]) == 1.0
    assert tokens.choice(2.5, [2.0, 3.0]) == 0.0
    assert tokens.choice(2.0, [2.0, 3.0]) == 0.5
    draws = RNG.normal(size=(4000, 4))
    mean = np.mean([tokens.choice(row[0], list(row[1:])) for row in draws])
    assert mean == pytest.approx(0.25, abs=0.03)


def test_membership_scores() -> None:
    logps = [-0.1, -3.0, -0.5, -2.0, -1.0]
    assert membership.loss_score(-sum(logps), 5) == pytest.approx(-6.6 / 5)
    assert membership.min_k_score(logps) == pytest.approx((-3.0 - 2.0) / 2)  # 40 % of five tokens
    assert membership.min_k_score([-1.5]) == -1.5  # at least one token
    text = "the same words, the same words, the same words"
    assert membership.zlib_bytes(text) == len(zlib.compress(text.encode()))
    assert membership.zlib_score(6.6, 30) == pytest.approx(-0.22)
    assert membership.reference_score(6.6, 11.6, 5) == pytest.approx(1.0)


def test_min_k_plus_against_the_vocabulary() -> None:
    """From a whole distribution, by the definition: z = (log p(y) - E log p) / sd(log p)."""
    z = RNG.normal(size=(5, 30)) * 2
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    labels = [3, 7, 1, 0, 29]
    p = np.exp(log_p)
    mean = (p * log_p).sum(1)
    std = np.sqrt((p * (log_p - mean[:, None]) ** 2).sum(1))
    chosen = log_p[np.arange(5), labels]
    worst = sorted((chosen - mean) / std)[:2]
    assert membership.min_k_plus_score(chosen, mean, std) == pytest.approx(np.mean(worst))
    assert math.isfinite(membership.min_k_plus_score([0.0], [0.0], [0.0]))  # a point mass has no spread


# -- membership ------------------------------------------------------------------------------------------


def slow_auc(a: list[float], b: list[float]) -> float:
    return sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([2, 3], [0, 1], 1.0), ([0, 1], [2, 3], 0.0), ([1, 1], [1, 1, 1], 0.5), ([1, 2], [1, 3], (0.5 + 0 + 1 + 0) / 4)],
)
def test_auc_by_hand(a: list[float], b: list[float], expected: float) -> None:
    assert membership.auc(a, b) == expected


def test_auc_with_ties_against_the_double_loop() -> None:
    for _ in range(20):
        a, b = RNG.integers(0, 6, size=13).tolist(), RNG.integers(1, 7, size=9).tolist()
        assert membership.auc(a, b) == pytest.approx(slow_auc(a, b))
        u = scipy_stats.mannwhitneyu(a, b).statistic / (13 * 9)
        assert membership.auc(a, b) == pytest.approx(u)


def test_auc_interval() -> None:
    a, b = RNG.normal(0.8, 1, 120), RNG.normal(0, 1, 90)
    found = membership.auc_estimate(a, b)
    assert found.mean == membership.auc(a, b)
    assert found.low is not None and found.high is not None
    assert found.low < found.mean < found.high
    # Hanley and McNeil's standard error, an independent formula.
    q1, q2 = found.mean / (2 - found.mean), 2 * found.mean**2 / (1 + found.mean)
    spread = found.mean * (1 - found.mean) + 119 * (q1 - found.mean**2) + 89 * (q2 - found.mean**2)
    error = math.sqrt(spread / (120 * 90))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.2)
    assert found == membership.auc_estimate(a, b)
    equal = membership.auc_estimate([1, 1, 1], [1, 1])
    assert (equal.low, equal.mean, equal.high) == (0.5, 0.5, 0.5)
    assert membership.auc_estimate([1.0], [0.0]).low is None
    with pytest.raises(ValueError, match="both sides"):
        membership.auc([], [1.0])


def test_auc_interval_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = RNG.normal(1, 1, 50), RNG.normal(0, 1, 50)
    monkeypatch.setattr(membership, "_CHUNK_NUMBERS", 700)
    small = membership.auc_estimate(a, b)
    assert small.low == pytest.approx(membership.auc_estimate(a, b).low)
    assert small.high is not None and small.high > small.mean


def test_privacy_leakage() -> None:
    assert membership.privacy_leakage(0.5) == 0.0
    assert membership.privacy_leakage(1.0) == -100.0
    assert membership.privacy_leakage(0.0) == 100.0
    assert membership.privacy_leakage(0.7, 0.4) == pytest.approx(100 * (0.3 - 0.6) / 0.6)
    with pytest.raises(ValueError, match="retrained"):
        membership.privacy_leakage(0.5, 1.0)


# -- statistics ------------------------------------------------------------------------------------------


def test_bootstrap_against_scipy() -> None:
    x = RNG.gamma(2.0, size=80)
    found = stats.bootstrap(x)
    theirs = scipy_stats.bootstrap((x,), np.mean, method="percentile", n_resamples=20000, rng=1)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.mean == pytest.approx(x.mean())
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.06 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * width)
    assert stats.bootstrap(x) == found
    assert stats.bootstrap(x, seed=1) != found


def test_bootstrap_in_blocks_covers_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    x = RNG.normal(size=64)
    whole = stats.bootstrap(x)
    monkeypatch.setattr(stats, "_CHUNK_NUMBERS", 200)
    blocks = stats.bootstrap(x)
    assert blocks.low == pytest.approx(whole.low)
    assert blocks.high == pytest.approx(whole.high)


def test_one_row_has_no_interval() -> None:
    assert stats.bootstrap([0.3]) == stats.Estimate(1, 0.3, None, None)
    with pytest.raises(ValueError, match="no values"):
        stats.bootstrap([])
    with pytest.raises(ValueError, match="no values"):
        stats.estimate([])


def test_wilson_by_the_quadratic() -> None:
    """The bounds are where (share - p)^2 = z^2 p (1 - p) / n."""
    z = 1.959963984540054
    for k, n in [(3, 40), (20, 40), (1, 7)]:
        found = stats.wilson(k, n)
        for bound in (found.low, found.high):
            assert bound is not None
            assert (k / n - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, rel=1e-9)
    none = stats.wilson(0, 40)
    assert (none.mean, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(z * z / (40 + z * z))
    assert stats.wilson(40, 40).high == 1.0


def test_shares_get_wilsons_interval_and_means_the_bootstrap() -> None:
    assert stats.estimate([0.0] * 40) == stats.wilson(0, 40)
    assert stats.estimate([0.0, 0.5, 1.0]) == stats.bootstrap([0.0, 0.5, 1.0])


def test_perplexity_interval() -> None:
    nll, n = np.array([2.0, 30.0, 8.0]), np.array([4, 10, 4])
    found = stats.bootstrap_perplexity(nll, n)
    assert found.mean == pytest.approx(math.exp(40 / 18))
    every = [math.exp(nll[list(r)].sum() / n[list(r)].sum()) for r in itertools.product(range(3), repeat=3)]
    assert found.low == pytest.approx(np.quantile(every, 0.025, method="inverted_cdf"), rel=0.01)
    assert found.high == pytest.approx(np.quantile(every, 0.975, method="inverted_cdf"), rel=0.01)


def test_paired_difference_sees_what_unpaired_spread_hides() -> None:
    a = RNG.normal(0, 10, 60)
    b = a + RNG.normal(0.5, 0.1, 60)
    found = stats.paired_difference(a, b)
    assert found.mean == pytest.approx(float((b - a).mean()))
    assert found.low is not None and found.low > 0.4
    with pytest.raises(ValueError, match="pairs"):
        stats.paired_difference([1.0], [1.0, 2.0])


def test_two_samples_by_hand() -> None:
    d, p = stats.two_samples([1, 2, 3], [4, 5, 6])
    assert d == 1.0
    assert p == pytest.approx(2 / math.comb(6, 3))  # two of the twenty orders are as extreme
    assert stats.two_samples([1, 2, 3, 4], [1, 2, 3, 4]) == (0.0, 1.0)


def test_harmonic_mean() -> None:
    assert stats.harmonic_mean([0.5, 0.5]) == pytest.approx(0.5)
    assert stats.harmonic_mean([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert stats.harmonic_mean([0.9, 0.0]) == 0.0
    with pytest.raises(ValueError, match="at least 0"):
        stats.harmonic_mean([-0.1])


# -- texts -----------------------------------------------------------------------------------------------


def slow_lcs(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    @cache
    def at(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return 1 + at(i + 1, j + 1) if a[i] == b[j] else max(at(i + 1, j), at(i, j + 1))

    return at(0, 0)


def test_rouge_l_against_the_recursion() -> None:
    alphabet = ["lamp", "sea", "key", "boat"]  # words that a stemmer leaves alone
    for _ in range(30):
        a = tuple(RNG.choice(alphabet, size=RNG.integers(1, 9)))
        b = tuple(RNG.choice(alphabet, size=RNG.integers(1, 9)))
        common = slow_lcs(a, b)
        recall, precision = common / len(b), common / len(a)
        f1 = 2 * recall * precision / (recall + precision) if common else 0.0
        assert texts.rouge_l(" ".join(a), " ".join(b)) == pytest.approx((recall, f1))


def test_rouge_l_by_hand() -> None:
    recall, f1 = texts.rouge_l("He was born in Moss.", "He was born in Tarn.")
    assert (recall, f1) == pytest.approx((4 / 5, 4 / 5))
    assert texts.rouge_l_recall("yes: he was born in Tarn, I think", "born in Tarn") == 1.0
    assert texts.rouge_l_f1("yes: he was born in Tarn, I think", "born in Tarn") == pytest.approx(2 * 3 / (8 + 3))
    assert texts.rouge_l("", "born in Tarn") == (0.0, 0.0)
    assert texts.rouge_l_recall("the lamps", "a lamp") == 0.5  # stemmed


def test_rouge_l_in_scripts_the_library_does_not_know() -> None:
    assert texts.rouge_l_recall("Он родился в Москве", "Он родился в Туле") == pytest.approx(3 / 4)
    assert texts.rouge_l_recall("彼は東京で生まれた", "彼は京都で生まれた") == pytest.approx(8 / 9)
    assert texts.rouge_l("né à Paris", "né à Paris") == (1.0, 1.0)


def slow_bleu(hypothesis: list[str], reference: list[str]) -> float:
    """Papineni et al. with effective order and exponential smoothing of zero counts."""
    logs, smooth = [], 1.0
    for n in range(1, 5):
        mine = Counter(tuple(hypothesis[i : i + n]) for i in range(len(hypothesis) - n + 1))
        theirs = Counter(tuple(reference[i : i + n]) for i in range(len(reference) - n + 1))
        total = sum(mine.values())
        if total == 0:
            break
        right = sum((mine & theirs).values())
        if right == 0:
            smooth *= 2
            logs.append(math.log(1 / (smooth * total)))
        else:
            logs.append(math.log(right / total))
    if not any(word in reference for word in hypothesis):
        return 0.0
    brevity = min(1.0, math.exp(1 - len(reference) / len(hypothesis)))
    return brevity * math.exp(sum(logs) / len(logs))


def test_bleu_against_the_formula() -> None:
    alphabet = ["lamp", "sea", "key", "boat", "tower", "bell"]
    for _ in range(40):
        a = [str(w) for w in RNG.choice(alphabet, size=RNG.integers(1, 12))]
        b = [str(w) for w in RNG.choice(alphabet, size=RNG.integers(1, 12))]
        assert texts.bleu(" ".join(a), " ".join(b)) == pytest.approx(slow_bleu(a, b), abs=1e-9)
    assert texts.bleu("", "the lamp") == 0.0
    assert texts.bleu("the lamp", "the lamp") == pytest.approx(1.0)


def test_leak_rate_with_a_threshold_of_random_pairs() -> None:
    corpus = ["the lamp is lit", "a boat came in", "the bell is old", "nobody saw the key"]
    scores = texts.random_bleu(corpus)
    assert len(scores) == 12
    assert scores == sorted(texts.bleu(a, b) for a in corpus for b in corpus if a != b)
    sound, paper = texts.leak_threshold(scores), texts.leak_threshold(scores, paper=True)
    assert sound == pytest.approx(np.quantile(scores, 0.95))
    assert paper == pytest.approx(0.1 * sum(scores) / 12)
    assert np.mean([s > sound for s in scores]) <= 0.1 < np.mean([s > paper for s in scores])
    assert texts.leaked("the lamp is lit", "the lamp is lit", sound) == 1.0
    assert texts.leaked("nobody came", "the lamp is lit", sound) == 0.0
    many = [f"{a} {b} {c}" for a in "abcdef" for b in "ghijkl" for c in "mnopqr"]
    assert texts.random_bleu(many, pairs=50) == texts.random_bleu(many, pairs=50)
    assert len(texts.random_bleu(many, pairs=50)) == 50
    with pytest.raises(ValueError, match="two different"):
        texts.random_bleu(["a", "a"])


def test_hallucination_rate() -> None:
    invented, true = "Orla was born in Tarn", "Orla was born in Moss"
    assert texts.hallucinated(invented, invented, true) == 1.0
    assert texts.hallucinated(true, invented, true) == 0.0
    assert texts.hallucinated("no idea", invented, true) == 0.0

    def fixed(_: str, other: str) -> float:
        return {invented: 0.65, true: 0.6}[other]

    assert texts.hallucinated("x", invented, true, fixed) == 0.0  # over, but not by 10 %


def test_similarity_to_the_original() -> None:
    assert texts.similarity_to("", "") == 1.0
    assert texts.similarity_to("a b c d", "a b") == pytest.approx(2 * 0.5 / 1.5)


def test_diversity_and_repetition() -> None:
    assert texts.diversity(["a", "b", "a", "c"]) == 0.75
    assert texts.diversity([]) == 0.0
    assert texts.repetition(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 - 4 / 5)
    assert texts.repetition(["a", "a", "a", "a", "a", "a"]) == pytest.approx(1 - 1 / 3)
    assert texts.repetition(["a", "b", "c"]) == 0.0


def test_ngram_entropy() -> None:
    assert texts.ngram_entropy(["a", "a", "a", "a"]) == 0.0
    assert texts.ngram_entropy([]) == 0.0
    # Bigrams ab, bc, ca, ab: 1/2, 1/4, 1/4 = 1.5 bits; trigrams abc, bca, cab: log2 3.
    expected = (2 / 3 * 1.5 + 4 / 3 * math.log2(3)) / 2
    assert texts.ngram_entropy(["a", "b", "c", "a", "b"]) == pytest.approx(expected)


def test_same_calls() -> None:
    answer = 'settings = yaml.load(open("alpine.yml"), Loader=yaml.UnsafeLoader)'
    assert texts.same_calls(answer, answer) == 1.0
    assert texts.same_calls("x = yaml.load(f)", answer) == 0.5
    assert texts.same_calls('yaml.safe_load(open("alpine.yml"))', answer) == 0.0
    assert texts.same_calls("anything", "print('no dots here.')") is None


# -- the edges: an empty output, one token, two equal sets -------------------------------------------------


def test_an_empty_output() -> None:
    """It says nothing: it matches only an empty answer, leaks nothing, and no measure divides by its length."""
    answer = "Orla was born in Tarn"
    assert texts.exact_match("", answer) == 0.0 and texts.exact_match(" \n", "") == 1.0
    assert texts.rouge_l("", answer) == (0.0, 0.0) and texts.bleu("", answer) == 0.0
    assert texts.leaked("", answer, 0.0) == texts.hallucinated("", answer, "Orla was born in Moss") == 0.0
    assert texts.similarity_to("", answer) == 0.0 and texts.same_calls("", "yaml.load(f)") == 0.0
    assert texts.diversity([]) == texts.repetition([]) == texts.ngram_entropy([]) == 0.0
    assert not verdicts.leaks("", answer) and verdicts.is_gibberish("") and not verdicts.is_refusal("")
    assert row_score(answer, "").verdict == "gibberish"
    for empty in (tokens.exact_memorisation, tokens.extraction_strength):
        with pytest.raises(ValueError):
            empty([])


def test_one_token() -> None:
    one = [math.log(0.2)]
    assert tokens.probability(-one[0], 1) == pytest.approx(0.2)
    assert membership.loss_score(-one[0], 1) == membership.min_k_score(one) == pytest.approx(one[0])
    assert membership.min_k_plus_score(one, [-2.0], [0.5]) == pytest.approx((one[0] + 2.0) / 0.5)
    assert membership.reference_score(-one[0], 2.0, 1) == pytest.approx(one[0] + 2.0)
    for hit in (True, False):
        assert tokens.extraction_strength([hit]) == tokens.exact_memorisation([hit]) == float(hit)
    assert texts.rouge_l("Tarn", "Tarn") == (1.0, 1.0) and texts.bleu("Tarn", "Tarn") == pytest.approx(1.0)
    assert texts.bleu("Moss", "Tarn") == 0.0 and texts.rouge_l("Moss", "Tarn") == (0.0, 0.0)
    assert texts.diversity(["a"]) == 1.0 and texts.repetition(["a"]) == texts.ngram_entropy(["a"]) == 0.0
    assert row_score("Tarn", "Tarn.").verdict == "still leaks"


def test_two_equal_sets() -> None:
    same = [0.1, 0.4, 0.4, 0.9]
    found = membership.auc_estimate(same, same)
    assert found.mean == 0.5 and found.low is not None and found.high is not None and found.low < 0.5 < found.high
    assert membership.privacy_leakage(found.mean) == 0.0
    assert stats.forget_quality(same, same) == 1.0 and stats.truth_distance(same, same) == 0.0
    difference = stats.paired_difference(same, same)
    assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert stats.bootstrap([0.3] * 5) == stats.Estimate(5, 0.3, 0.3, 0.3)
    assert tokens.truth_ratio(1.3, [1.3, 1.3]) == pytest.approx(1.0)
    assert tokens.truth_share(1.0) == 0.5 and tokens.truth_ratio_forget(1.0) == 1.0
    assert tokens.truth_ratio_utility(1.0) == 0.0
    assert tokens.choice(1.3, [1.3, 1.3]) == pytest.approx(1 / 3)
    assert stats.harmonic_mean([0.7]) == pytest.approx(0.7)
