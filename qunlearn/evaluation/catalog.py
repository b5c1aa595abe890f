"""The catalogue of measures by name, and the suites: which measures on which splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qunlearn.evaluation.results import is_forget


@dataclass(frozen=True)
class Measure:
    """One measure. `function` in `evaluate.measures` computes it; `definition` is the function that defines it.

    `unit`: "%" a share, "p" a probability or score from 0 to 1, "nats", "ppl", "bits", "score", "%point".
    `needs`: the probes of the split; `better`: where it should go on data to forget and on data to keep
    ("down", "up", or "retrained" for as near as possible to a model that never saw the data).
    """

    title: str
    unit: str
    needs: tuple[str, ...]
    definition: str
    forget: str = ""
    keep: str = ""
    asks: str = ""  # what else must be given for it to be measured


_T, _O, _C, _F = ("tokens",), ("outputs",), ("choices",), ("outputs", "fluency")
_HOLDOUT = "--holdout"
_JUDGE = "metrics.verdicts"
_TOKENS = "metrics.tokens"
_TEXTS = "metrics.texts"
_MEMBERS = "metrics.membership"

MEASURES: Mapping[str, Measure] = {
    # answers
    "exact_match": Measure("exact match", "%", _O, f"{_TEXTS}.exact_match", "down", "up"),
    "leaks": Measure("still leaks", "%", _O, f"{_JUDGE}.leaks", "down", "up"),
    "refused": Measure("refused", "%", _O, f"{_JUDGE}.is_refusal", "", "down"),
    "gibberish": Measure("gibberish", "%", _O, f"{_JUDGE}.is_gibberish", "down", "down"),
    "rouge_recall": Measure("ROUGE-L recall", "p", _O, f"{_TEXTS}.rouge_l_recall", "down", "up"),
    "rouge_f1": Measure("ROUGE-L F1", "p", _O, f"{_TEXTS}.rouge_l_f1", "down", "up"),
    "bleu": Measure("BLEU", "p", _O, f"{_TEXTS}.bleu", "down", "up"),
    "same_calls": Measure("same calls", "p", _O, f"{_TEXTS}.same_calls", "down", "up"),
    # the paper's
    "leak_rate": Measure("leak rate", "%", _O, f"{_TEXTS}.leaked", "down", "up"),
    "leak_rate_paper": Measure("leak rate, paper's threshold", "%", _O, f"{_TEXTS}.leak_threshold", "down", "up"),
    "hallucination_rate": Measure(
        "hallucination rate", "%", _O, f"{_TEXTS}.hallucinated", "down", "", "rows with a true answer (`truth`)"
    ),
    "harmful_rate": Measure("harmful rate", "%", _O, "judges.harmful", "down", "down", "--harm-classifier"),
    "reward": Measure("reward", "score", _O, "judges.rewards", "", "up", "--reward-model"),
    "similarity": Measure("similarity to the base", "p", _O, f"{_TEXTS}.similarity_to", "", "up"),
    "diversity": Measure("diversity", "p", _O, f"{_TEXTS}.diversity", "up", "up"),
    "fluency": Measure("fluency, log-perplexity", "nats", _F, "measures.fluency", "down", "down"),
    "repetition": Measure("repetition", "p", _O, f"{_TEXTS}.repetition", "down", "down"),
    "ngram_entropy": Measure("n-gram entropy", "bits", _O, f"{_TEXTS}.ngram_entropy", "up", "up"),
    # tokens
    "probability": Measure("probability", "p", _T, f"{_TOKENS}.probability", "down", "up"),
    "perplexity": Measure("perplexity", "ppl", _T, f"{_TOKENS}.perplexity", "up", "down"),
    "extraction_strength": Measure("extraction strength", "p", _T, f"{_TOKENS}.extraction_strength", "down", "up"),
    "exact_memorisation": Measure("exact memorisation", "p", _T, f"{_TOKENS}.exact_memorisation", "down", "up"),
    # right against wrong
    "truth_ratio": Measure("truth ratio, min(R, 1/R)", "p", _C, f"{_TOKENS}.truth_ratio_forget", "up", ""),
    "truth_utility": Measure("truth ratio, max(0, 1 - R)", "p", _C, f"{_TOKENS}.truth_ratio_utility", "", "up"),
    "truth_share": Measure("truth share, 1 / (1 + R)", "p", _C, f"{_TOKENS}.truth_share", "retrained", "up"),
    "choice": Measure("multiple choice", "p", _C, f"{_TOKENS}.choice", "retrained", "up"),
    # sets
    "forget_quality": Measure(
        "forget quality (KS p-value)", "p", _C, "metrics.stats.forget_quality", "up", "", "--retrained-model"
    ),
    "truth_distance": Measure(
        "truth-ratio distance (KS D)", "p", _C, "metrics.stats.truth_distance", "down", "", "--retrained-model"
    ),
    "model_utility": Measure(
        "model utility", "p", ("tokens", "outputs", "choices"), "measures.model_utility", "", "up"
    ),
    "mia_loss": Measure("membership, loss", "p", _T, f"{_MEMBERS}.loss_score", "retrained", "", _HOLDOUT),
    "mia_zlib": Measure("membership, zlib", "p", _T, f"{_MEMBERS}.zlib_score", "retrained", "", _HOLDOUT),
    "mia_min_k": Measure("membership, Min-K", "p", _T, f"{_MEMBERS}.min_k_score", "retrained", "", _HOLDOUT),
    "mia_min_k_plus": Measure(
        "membership, Min-K++", "p", _T, f"{_MEMBERS}.min_k_plus_score", "retrained", "", _HOLDOUT
    ),
    "mia_reference": Measure(
        "membership, reference",
        "p",
        _T,
        f"{_MEMBERS}.reference_score",
        "retrained",
        "",
        "--holdout and --retrained-model",
    ),
    "privacy_leakage": Measure("privacy leakage", "%point", _T, f"{_MEMBERS}.privacy_leakage", "", "", _HOLDOUT),
}


@dataclass(frozen=True)
class Suite:
    """Measures for the splits to forget, the splits to keep, and over all of the latter together (`whole`)."""

    about: str
    forget: tuple[str, ...]
    keep: tuple[str, ...]
    whole: tuple[str, ...] = ()

    def on(self, split: str) -> tuple[str, ...]:
        return self.forget if is_forget(split) else self.keep

    def needs(self, split: str) -> frozenset[str]:
        """The probes of a split; what is measured over all splits to keep needs them on each."""
        names = (*self.on(split), *(() if is_forget(split) else self.whole))
        return frozenset(probe for name in names for probe in MEASURES[name].needs)


_MEMBERSHIP = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus", "mia_reference")

SUITES: Mapping[str, Suite] = {
    "basic": Suite(
        "What a person wants to know first: is it gone, asked this way and that, and is the rest still there?",
        (
            "leaks",
            "exact_match",
            "rouge_recall",
            "probability",
            "extraction_strength",
            "perplexity",
            "refused",
            "gibberish",
        ),
        ("exact_match", "rouge_recall", "probability", "perplexity", "gibberish"),
    ),
    "llmu": Suite(
        "The evaluation of Large Language Model Unlearning (arXiv 2310.10683): efficacy on seen and unseen prompts, "
        "diversity and fluency, utility on normal prompts.",
        ("leaks", "leak_rate", "leak_rate_paper", "hallucination_rate", "harmful_rate", "diversity", "fluency"),
        ("reward", "similarity", "harmful_rate", "diversity", "fluency"),
    ),
    "tofu": Suite(
        "TOFU (arXiv 2401.06121): forget quality against a model that never saw the data, and model utility.",
        (
            "leaks",
            "probability",
            "rouge_recall",
            "truth_ratio",
            "truth_share",
            "choice",
            "extraction_strength",
            "forget_quality",
            "truth_distance",
            "privacy_leakage",
        ),
        ("probability", "rouge_recall", "truth_utility", "choice"),
        ("model_utility",),
    ),
    "muse": Suite(
        "MUSE (arXiv 2407.06460): memorisation (verbatim for plain text, knowledge for questions), privacy, utility.",
        ("leaks", "rouge_f1", "extraction_strength", "exact_memorisation", *_MEMBERSHIP, "privacy_leakage"),
        ("rouge_f1", "exact_memorisation"),
    ),
    "code": Suite(
        "Source code after PROD (arXiv 2506.17125): likeness to the snippets, and whether their calls come back.",
        ("leaks", "exact_match", "bleu", "same_calls", "probability", "extraction_strength", "gibberish", "repetition"),
        ("exact_match", "bleu", "same_calls", "probability", "perplexity", "repetition", "ngram_entropy"),
    ),
}
