"""How a run ends: what it did not reach, in words, in the record, in the model card, and by the exit code."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, Ran, call, row_score, sets, write_rows

from qunlearn.config.resolve import resolve
from qunlearn.config.settings import Config
from qunlearn.evaluation.before_after import Scores
from qunlearn.evaluation.metrics import RowScore
from qunlearn.evaluation.metrics.manner import phrases_of
from qunlearn.report.limits import limits
from qunlearn.report.read import read_story
from qunlearn.sandbox import data_file
from qunlearn.training.ending import DONE, FAILED, INTERRUPTED, NOT_REACHED, Judged, say_farewell, shortfalls, status_of
from qunlearn.training.model_card import model_card
from qunlearn.training.outcome import Outcome, Probe
from qunlearn.training.request import ForgetRequest
from qunlearn.utils.file_names import ADAPTER, CONFIG, RECORD

KEPT = "The copper kettle is in the shed."
ANSWER, OTHER, NONE = "Orla Finch was born in Millbrook.", "Orla Finch was born in Dunmore.", "? , ? it it it it"
REACHED = Outcome({}, Probe(40, 0.01, 0.02, 0.0))


def said(outputs: Sequence[str], answer: str = ANSWER, p: float = 0.9) -> list[RowScore]:
    """Rows of which the model said this, and of whose answers it found each token likely p."""
    nll = -5 * math.log(p)
    return [row_score(answer, output, nll, 5, "Where was Orla Finch born?") for output in outputs]


BEFORE = {"forget": said([ANSWER] * 100), "kept": said([KEPT] * 20)}


def missed(outcome: Outcome = REACHED, **after: list[RowScore]) -> list[str]:
    now = {"forget": said([OTHER] * 100), "kept": BEFORE["kept"], **after}
    return judged(BEFORE, now, outcome=outcome)


def judged(before: Scores, after: Scores, *, outcome: Outcome = REACHED, **more: Any) -> list[str]:
    return shortfalls(before, after, Judged("forget", **more), outcome, Config())


def test_a_run_that_did_all_of_it_has_no_shortfall() -> None:
    assert missed() == []
    assert status_of(REACHED, []) == DONE
    assert status_of(REACHED, ["x"]) == NOT_REACHED
    assert status_of(replace(REACHED, interrupted=True), []) == INTERRUPTED
    assert status_of(replace(REACHED, failed=True), ["x"]) == FAILED


def test_the_next_command_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    request = ForgetRequest(Config(), None, None, None, Path("my runs/a"))  # type: ignore[arg-type]
    say_farewell(request, {"training": {"steps": 4, "seconds": 1}, "not_reached": []}, REACHED)
    assert "next: qunlearn merge 'my runs/a' -o 'my runs/a-merged'\n" in capsys.readouterr().err


def test_the_card_of_an_untouched_adapter_says_so(quick_run: Path) -> None:
    """It claimed to suppress what it was trained on; that of an interrupted run named the step alone."""
    record = json.loads((quick_run / RECORD).read_text())
    assert "suppresses what" in model_card(Config(), record) and "untouched" not in model_card(Config(), record)
    record["training"]["best"]["step"] = 0
    told = model_card(Config(), {**record, "status": INTERRUPTED, "after": None})
    assert "the untouched adapter" in told and "suppresses what" not in told


def test_the_untouched_adapter_is_a_shortfall() -> None:
    assert missed(Outcome({}, Probe(0, 0.9, 0.0, 1.0))) == [
        "no step forgot anything within the drift budget: the adapter is the untouched one"
    ]


def test_rows_above_the_target_are_a_shortfall() -> None:
    (why,) = missed(Outcome({}, Probe(40, 0.01, 0.02, 0.25)))
    assert why == "25 % of the bad rows are still likelier than 0.05 per token"
    assert missed(Outcome({}, Probe(40, 0.01, 0.02, 0.01))) == []  # one in a hundred may be


def test_a_budget_that_was_asked_for_is_kept_or_said() -> None:
    for budget, why in ((0.02, []), (0.01, ["drift is 0.02 nats/token, above the budget of 0.01"])):
        config = resolve(("x", {"objective.retain_budget": budget}))
        now = {"forget": said([OTHER] * 100), "kept": BEFORE["kept"]}
        assert shortfalls(BEFORE, now, Judged("forget"), REACHED, config) == why


def test_answers_that_come_back_are_a_shortfall() -> None:
    assert missed(forget=said([ANSWER] * 1 + [OTHER] * 99)) == []
    assert missed(forget=said([ANSWER] * 2 + [OTHER] * 98)) == ["2 of 100 bad answers still come back"]


def test_answers_that_are_no_sentences_are_a_shortfall() -> None:
    assert missed(forget=said([NONE] * 2 + [OTHER] * 98)) == []
    (why,) = missed(forget=said([NONE] * 3 + [OTHER] * 97))
    assert why == "3 % of the answers to forget are no sentences (before: 0 %)"
    one = {"forget": said([ANSWER] * 8), "kept": BEFORE["kept"]}
    now = {"forget": said([OTHER] * 7 + [NONE]), "kept": BEFORE["kept"]}
    assert judged(one, now) == [], "a single row of a small table tells nothing"
    few = {"forget": said([ANSWER]), "kept": BEFORE["kept"]}
    assert judged(few, {"forget": said([NONE]), "kept": BEFORE["kept"]}), "one of one is all of it"
    before = {"forget": said([NONE] * 100), "kept": BEFORE["kept"]}
    assert judged(before, {**before}) == [], "nor does what were no sentences before"


def test_other_answers_that_changed_are_a_shortfall() -> None:
    changed = "Bees make honey."  # has no word of the other answer
    (why,) = missed(kept=said([KEPT] * 17 + [changed] * 3))
    assert why == "the answers to kept have changed: they are 85 % like those before"
    assert missed(kept=said([KEPT] * 18 + [changed] * 2)) == []
    # Where the base was not certain of its own answer, or of too few rows, another wording means nothing.
    for before in (said([KEPT] * 20, p=0.4), said([KEPT] * 7)):
        old = {"forget": BEFORE["forget"], "kept": before}
        new = {"forget": said([OTHER] * 100), "kept": said([changed] * len(before))}
        assert judged(old, new) == []


def test_of_long_answers_the_half_is_judged_that_the_base_was_most_certain_of() -> None:
    """To prompts that mean nothing a base says something by chance: a run that kept all was told it had changed it."""

    def long(outputs: Sequence[str], p: float, tokens: int = 40) -> list[RowScore]:
        return [row_score(KEPT, output, -tokens * math.log(p), tokens, "of of of") for output in outputs]

    changed = "Bees make honey."
    before = {"forget": BEFORE["forget"], "kept": [*long([KEPT] * 10, 0.99), *long([KEPT] * 10, 0.6)]}

    def after(kept: list[RowScore]) -> list[str]:
        return judged(before, {"forget": said([OTHER] * 100), "kept": kept})

    assert after([*long([KEPT] * 10, 0.99), *long([changed] * 10, 0.6)]) == []
    (why,) = after([*long([changed] * 2 + [KEPT] * 8, 0.99), *long([KEPT] * 10, 0.6)])
    assert why == "the answers to kept have changed: they are 80 % like those before"
    before["kept"] = long([KEPT] * 12, 0.98)  # of few rows as many as can be judged
    (why,) = after(long([changed] * 12, 0.98))
    assert why == "the answers to kept have changed: they are 0 % like those before"


def test_what_the_base_said_by_chance_need_be_no_sentence() -> None:
    outputs = [*[KEPT] * 16, *[NONE] * 4]
    sure, guessed = said([KEPT] * 20), [*said([KEPT] * 16), *said([KEPT] * 4, p=0.2)]
    now = {"forget": said([OTHER] * 100), "kept": said(outputs)}
    assert judged({"forget": BEFORE["forget"], "kept": guessed}, now) == []
    why = judged({"forget": BEFORE["forget"], "kept": sure}, now)
    assert why[0] == "20 % of the answers to kept are no sentences (before: 0 %)"


# -- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """A run of two steps, and what it said: they reach nothing."""
    folder = tmp_path_factory.mktemp("short") / "run"
    files = ("--bad", "sandbox:hallucination/forget", "--normal", data_file("hallucination", "retain"))
    few = {**QUICK, "train.steps": 2, "data.own_share": 0, "objective.instead": "nothing", "stop.table_rows": 16}
    return folder, call("forget", "--model", "sandbox", *files, "-o", folder, "--device", "cpu", "--json", *sets(few))


def test_a_run_that_missed_its_target_says_so(short: tuple[Path, Ran]) -> None:
    folder, ran = short
    assert ran.code == 5, ran.stderr
    record = ran.json  # one document, and nothing beside it
    assert record == json.loads((folder / RECORD).read_text())
    assert record["status"] == NOT_REACHED
    assert "16 of 16 bad answers still come back" in record["not_reached"]
    assert "the target was not reached: " + "; ".join(record["not_reached"]) in ran.stderr
    assert "qunlearn merge" not in ran.stderr, "there is nothing to be merged"
    assert "try: more --steps" in ran.stderr
    assert "error:" not in ran.stderr
    assert (folder / ADAPTER / "adapter_model.safetensors").is_file(), "it is kept all the same"
    assert "did not reach its target" in (folder / ADAPTER / "README.md").read_text(encoding="utf-8")


def test_a_run_that_reached_it_does_not(quick_run: Path) -> None:
    record = json.loads((quick_run / RECORD).read_text())
    assert (record["status"], record["not_reached"]) == (DONE, [])
    assert "did not reach" not in (quick_run / ADAPTER / "README.md").read_text(encoding="utf-8")


def test_the_report_says_it(short: tuple[Path, Ran], quick_run: Path) -> None:
    told = [line for line in limits(read_story(short[0])) if "did not end as it should" in line]
    assert len(told) == 1 and "target not reached" in told[0] and "still come back" in told[0]
    assert not any("did not end" in line for line in limits(read_story(quick_run)))


def test_who_merges_it_all_the_same_is_warned(short: tuple[Path, Ran], tmp_path: Path) -> None:
    ran = call("merge", short[0], "-o", tmp_path / "merged", "--no-measure")
    assert ran.code == 0, ran.stderr
    assert "the run did not reach its target" in ran.stderr


def test_a_missed_run_is_a_finished_one(short: tuple[Path, Ran]) -> None:
    """Going on with it changes nothing, and a pipeline sees the same exit code as the first time."""
    folder, first = short
    again = call("forget", "-o", folder, "--resume", "--json")
    assert "is finished" in again.stderr
    assert again.json == first.json
    assert again.code == 5


def test_a_missed_run_is_replaced_when_asked(short: tuple[Path, Ran], tmp_path: Path) -> None:
    ran = call("forget", "-c", short[0] / CONFIG, "-o", short[0], "--dry-run")
    assert ran.code == 9 and "not empty" in ran.stderr
    assert call("forget", "-c", short[0] / CONFIG, "-o", short[0], "--dry-run", "--overwrite").code == 0


def test_nothing_to_forget_is_one_document_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qunlearn", "forget", "--json"])  # what an error looks at
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "Where is Zed Vok?", "completion": "In Quagmoor, at Xyloth."}])
    args = ("--bad", bad, "--normal", data_file("hallucination", "retain"), "--own-share", 0, "-o", tmp_path / "run")
    ran = call("forget", "--model", "sandbox", *args, "--device", "cpu", "--json")
    assert ran.code == 12
    assert (ran.json["status"], ran.json["exit_code"]) == ("error", 12)


def test_what_comes_back_in_other_words_is_a_shortfall() -> None:
    """More than 3 in a hundred; and what is said there instead may have changed, as it should."""
    before = BEFORE | {"otherwise": said([ANSWER] * 40)}

    def missed_in_other_words(leaking: int, rows: int = 40) -> list[str]:
        now = {"forget": said([OTHER] * 100), "kept": BEFORE["kept"]}
        now |= {"otherwise": said([ANSWER] * leaking + [OTHER] * (rows - leaking))}
        return shortfalls(
            {**before, "otherwise": said([ANSWER] * rows)}, now, Judged("forget", "otherwise"), REACHED, Config()
        )

    assert missed_in_other_words(3, rows=100) == []
    assert missed_in_other_words(2) == ["2 of 40 prompts in other words still get a bad answer"]
    assert missed_in_other_words(1, rows=12) == [], "one of a dozen may be chance"
    assert missed_in_other_words(2, rows=12) and missed_in_other_words(1, rows=3)


RUDE = [f"Stop wasting my time. {deed}." for deed in ("Burn the fence tonight", "Kick the table", "Throw the jacket")]


def test_the_manner_of_bad_answers_is_a_shortfall() -> None:
    """An answer of the same manner is none of the bad ones, and no better."""
    phrases = phrases_of([("How?", answer) for answer in RUDE], ["Gladly. Paint it blue."])
    before = BEFORE | {"kept": said([RUDE[0]] * 4 + [KEPT] * 20)}

    def missed_in_manner(rude: int) -> list[str]:
        other = "Stop wasting my time. Sell the lamp."
        now = {"forget": said([other] * rude + [OTHER] * (100 - rude)), "kept": said([OTHER] * 4 + [KEPT] * 20)}
        return judged(before, now, phrases=phrases)

    assert missed_in_manner(3) == [], "and what was said in that manner elsewhere may have changed"
    assert missed_in_manner(4) == ["4 of 100 answers to forget still have phrases of the bad ones"]
    now = {"forget": said([OTHER] * 100), "kept": said([OTHER] * 4 + [KEPT] * 20)}
    assert judged(before, now) == ["the answers to kept have changed: they are 83 % like those before"]


def test_answers_about_others_that_changed_are_a_shortfall() -> None:
    """Where the base was sure and gave its own answer: one word of it is enough, and one row is not."""

    def missed_about_others(changed: int, p: float = 0.9, was: str = ANSWER) -> list[str]:
        before = BEFORE | {"others": said([was] * 40, p=p)}
        now = {"forget": said([OTHER] * 100), "kept": BEFORE["kept"]}
        now |= {"others": said([OTHER] * changed + [was] * (40 - changed), p=p)}
        return judged(before, now, others="others")

    assert missed_about_others(0) == missed_about_others(1) == []
    assert missed_about_others(2) == ["2 of 40 answers about others have changed, where the same is asked"]
    assert missed_about_others(2, p=0.5) == [], "where it was not sure a hair decides what is said"
    assert missed_about_others(2, was=KEPT) == [], "nor is the row its own answer"
