"""The catalogue, measures over a view made by hand, and what is concluded from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats as scipy_stats

from qunlearn.evaluation.catalog import MEASURES, SUITES
from qunlearn.evaluation.conclusion import conclude
from qunlearn.evaluation.document import document
from qunlearn.evaluation.measures import can_measure, measure, row_values
from qunlearn.evaluation.metrics import membership
from qunlearn.evaluation.metrics import tokens as tok
from qunlearn.evaluation.results import ChoiceScores, Fluency, Item, View, is_forget
from qunlearn.evaluation.scores import Output, TokenStats


def said(text: str) -> Output:
    return Output(text, len(text.split()), len(set(text.split())))


def stats(nll: float, tokens: int = 4, **more: float) -> TokenStats:
    values: dict[str, Any] = {"memorised": 1.0, "extraction": 1.0, "min_k": -nll, "min_k_plus": -nll, "zlib_bytes": 10}
    return TokenStats(nll, tokens, 2 * nll, 2 * tokens, **{**values, **more})


ITEMS = {
    "forget": [Item("Where?", "Orla was born in Tarn", "Orla was born in Moss"), Item("What?", "Ada plays the harp")],
    "holdout": [Item("Who?", "Selma did")],
}


def make(**found: list[Any]) -> View:
    """Values by subject_split_probe."""
    places = {tuple(name.split("_")): values for name, values in found.items()}
    return View(ITEMS, sorted({p[0] for p in places}), places)  # type: ignore[arg-type]


def estimate(name: str, view: View, subject: str, split: str) -> Any:
    return measure(name, view, subject, split, row_values(name, view, subject, split))


def test_every_suite_names_known_measures_and_every_measure_is_in_one() -> None:
    named = {name for suite in SUITES.values() for name in (*suite.forget, *suite.keep, *suite.whole)}
    assert named == set(MEASURES)
    for suite in SUITES.values():
        assert "leaks" in suite.forget  # every suite can say a verdict
        assert suite.about


def test_every_measure_can_be_computed() -> None:
    """Every name of the catalogue has a function; what asks for more than the view has says None."""
    choices = [ChoiceScores(0.2, (1.0, 2.0)), None]
    whole = {
        f"{s}_{split}_{probe}": values[: len(ITEMS[split])]
        for s in ("base", "adapter", "retrained")
        for split in ITEMS
        for probe, values in {
            "tokens": [stats(1.0), stats(2.0)],
            "outputs": [said("Orla was born in Tarn"), said("no idea")],
            "choices": choices,
            "fluency": [Fluency(2.0, 4), Fluency(1.0, 2)],
        }.items()
    }
    view = make(**whole)
    for name in MEASURES:
        split = "kept" if name == "model_utility" else "forget"
        values = None if split == "kept" else row_values(name, view, "adapter", split)
        found = measure(name, view, "adapter", split, values)
        if name in ("harmful_rate", "reward", "same_calls"):
            assert found is None, name
        else:
            assert found is not None and math.isfinite(found.mean), name


def test_row_measures_leave_out_rows_they_do_not_apply_to() -> None:
    view = make(base_forget_outputs=[said("Orla was born in Tarn"), said("Ada plays the harp")])
    assert row_values("hallucination_rate", view, "base", "forget") == [1.0, None]
    assert estimate("hallucination_rate", view, "base", "forget").n == 1
    assert row_values("exact_match", view, "base", "forget") == [1.0, 1.0]
    assert not can_measure("probability", view, "base", "forget")


def test_choices_keep_their_rows() -> None:
    """A row without wrong answers must not shift the values of the others."""
    view = make(base_forget_choices=[None, ChoiceScores(0.5, (1.5,))])
    ratio = math.exp(-1.5) / math.exp(-0.5)
    assert row_values("truth_ratio", view, "base", "forget") == [None, pytest.approx(min(ratio, 1 / ratio))]
    assert row_values("truth_share", view, "base", "forget") == [None, pytest.approx(1 / (1 + ratio))]
    assert row_values("choice", view, "base", "forget") == [None, 1.0]


def test_membership_and_privacy_leakage() -> None:
    view = make(
        base_forget_tokens=[stats(1.0), stats(3.0)],
        base_holdout_tokens=[stats(2.0)],
        retrained_forget_tokens=[stats(5.0), stats(1.5)],
        retrained_holdout_tokens=[stats(2.0)],
    )
    for name in ("mia_loss", "mia_min_k", "mia_min_k_plus", "mia_zlib"):
        assert estimate(name, view, "base", "forget").mean == membership.auc([-1.0, -3.0], [-2.0]), name
    # Per token: forget (5 - 1) / 4 and (1.5 - 3) / 4, holdout (2 - 2) / 4.
    assert estimate("mia_reference", view, "base", "forget").mean == 0.5
    assert estimate("mia_reference", view, "retrained", "forget") is None
    leak = estimate("privacy_leakage", view, "base", "forget")
    assert leak.mean == membership.privacy_leakage(0.5, 0.5)


def test_zlib_uses_the_bytes() -> None:
    view = make(
        base_forget_tokens=[stats(1.0, zlib_bytes=100), stats(3.0, zlib_bytes=10)],
        base_holdout_tokens=[stats(2.0, zlib_bytes=100)],
    )
    assert estimate("mia_zlib", view, "base", "forget").mean == membership.auc([-0.01, -0.3], [-0.02])


def test_forget_quality_is_against_the_retrained_model() -> None:
    mine = [ChoiceScores(0.2, (1.0,)), ChoiceScores(0.1, (2.0,))]
    theirs = [ChoiceScores(2.2, (1.0,)), ChoiceScores(2.1, (2.0,))]
    view = make(base_forget_choices=mine, retrained_forget_choices=theirs)
    ratios = [[tok.truth_ratio(c.correct, c.wrong) for c in side] for side in (mine, theirs)]
    expected = scipy_stats.ks_2samp(*ratios)
    assert estimate("forget_quality", view, "base", "forget").mean == pytest.approx(expected.pvalue)
    assert estimate("truth_distance", view, "base", "forget").mean == pytest.approx(expected.statistic)
    assert estimate("forget_quality", make(base_forget_choices=mine), "base", "forget") is None


def test_model_utility_is_the_harmonic_mean_over_kept_splits() -> None:
    view = make(
        base_holdout_tokens=[stats(2.0)],
        base_holdout_outputs=[said("Selma ran")],
        base_holdout_choices=[ChoiceScores(0.0, (1.0,))],
        base_forget_tokens=[stats(9.0), stats(9.0)],  # has no say in it
    )
    terms = [math.exp(-0.5), 0.5, 1 - math.exp(-1.0)]
    found = measure("model_utility", view, "base", "kept", None)
    assert found is not None
    assert found.mean == pytest.approx(3 / sum(1 / t for t in terms))
    assert found.n == 3


def test_perplexity_is_over_tokens_not_rows() -> None:
    view = make(base_forget_tokens=[stats(1.0, 2), stats(9.0, 6)])
    assert estimate("perplexity", view, "base", "forget").mean == pytest.approx(math.exp(20 / 16))


def test_fluency_and_not_meaningful() -> None:
    spoken = [Fluency(2.0, 4), None]
    view = make(base_forget_outputs=[said("a b c d"), said("")], base_forget_fluency=spoken)
    assert row_values("fluency", view, "base", "forget") == [0.5, None]
    same = make(base_forget_outputs=[said("aaaaaaaaaaaa"), said("!!!!!!!!!!")], base_forget_fluency=[Fluency(1, 1)] * 2)
    assert row_values("fluency", same, "base", "forget") == [None, None]


def test_similarity_is_to_the_bases_outputs() -> None:
    view = make(base_holdout_outputs=[said("a b c d")], adapter_holdout_outputs=[said("a b x y")])
    assert row_values("similarity", view, "adapter", "holdout") == [pytest.approx(0.5)]
    assert row_values("similarity", view, "base", "holdout") == [1.0]


def test_sides() -> None:
    assert all(map(is_forget, ("forget", "paraphrase", "forget_paraphrase")))
    assert not any(map(is_forget, ("retain", "holdout", "general")))


def share(mean: float, n: int = 40) -> dict[str, Any]:
    return {"n": n, "mean": mean, "low": max(0.0, mean - 0.05), "high": min(1.0, mean + 0.09)}


def result(leaks: float, paraphrase: float, holdout: float, *, adapter: bool = True) -> dict[str, Any]:
    subjects = ["base", "adapter"] if adapter else ["base"]

    def both(before: float, after: float) -> dict[str, Any]:
        return {s: share(after if s == "adapter" else before) for s in subjects}

    return {
        "scores": {subject: {} for subject in subjects},
        "measures": {
            "forget": {"leaks": both(1.0, leaks)},
            "paraphrase": {"leaks": both(1.0, paraphrase)},
            "holdout": {"exact_match": both(0.98, holdout)},
        },
    }


@pytest.mark.parametrize(
    ("leaks", "paraphrase", "holdout", "level"),
    [
        (0.0, 0.0, 0.97, "forgotten"),
        (0.0, 0.0, 0.5, "costly"),
        (0.0, 0.4, 0.97, "partly"),
        (1.0, 1.0, 0.98, "remembered"),
    ],
)
def test_conclusions(leaks: float, paraphrase: float, holdout: float, level: str) -> None:
    found = conclude(result(leaks, paraphrase, holdout))
    assert found["level"] == level
    assert found["sentences"][0].startswith("Verdict: ")
    assert f"{round(40 * leaks)} of 40" in found["sentences"][1]
    assert "erased" not in " ".join(found["sentences"])


def test_nothing_measured_is_nothing_kept() -> None:
    """A wrecked model was called kept where no row that should stay had been measured."""
    alone = result(0.0, 0.0, 1.0)
    del alone["measures"]["holdout"]
    found = conclude(alone)
    assert found["level"] == "cost unknown"
    assert "not measured" in found["sentences"][0] and "kept" not in found["sentences"][0]


def test_a_split_of_which_the_base_knew_nothing_says_nothing() -> None:
    """No answer word for word before and none after: not kept, unless another measure says so."""
    unknown, words = result(0.0, 0.0, 0.0), {s: share(v) for s, v in (("base", 0.6), ("adapter", 0.1))}
    unknown["measures"]["holdout"]["exact_match"]["base"] = share(0.0)
    assert conclude(unknown)["level"] == "cost unknown"
    unknown["measures"]["holdout"]["rouge_recall"] = words
    assert conclude(unknown)["level"] == "costly"


def test_what_the_base_never_said_is_no_success() -> None:
    never = result(0.0, 0.0, 1.0)
    for split in ("forget", "paraphrase"):
        never["measures"][split]["leaks"]["base"] = share(0.05)
    found = conclude(never)
    assert found["level"] == "never known"
    assert "suppressed" not in " ".join(found["sentences"])


def test_a_bare_model_has_no_verdict() -> None:
    assert conclude(result(1.0, 1.0, 1.0, adapter=False))["level"] == "measured"


def test_the_page_of_measures_is_made_from_the_docstrings() -> None:
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    assert page.read_text(encoding="utf-8") == document(), "run `make docs`"
    for name, one in MEASURES.items():
        assert f"`{name}`" in document()
        assert one.title in document()
