"""`qunlearn audit` on models of which it is known what they hide."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import call, few, write_rows

from qunlearn.attack.facts import Inputs, make_facts, subject_names, units_of
from qunlearn.attack.formats import _blanked
from qunlearn.attack.placebo import make_placebos
from qunlearn.attack.request import AuditWish, check_audit
from qunlearn.data.records import Record, read_dataset
from qunlearn.sandbox import ASSETS, data_file

pytestmark = pytest.mark.medium

FORGET = data_file("hallucination", "forget")
PARAPHRASE = data_file("hallucination", "forget_paraphrase")
GOLD = ASSETS / "gold"


def row(prompt: str, completion: str) -> Record:
    return Record((("user", prompt),), completion, 1, {})


def audited(output: Path, *args: object, forget: Path = FORGET) -> Any:
    ran = call("audit", *args, "--forget", forget, "-o", output, "--device", "cpu", "--json")
    assert ran.code in (0, 5), ran.stderr
    assert (ran.code == 5) == (ran.json["status"] == "leaks")
    return ran.json


def test_the_base_itself_is_found_out(tmp_path: Path) -> None:
    """A model that forgot nothing leaks in several formats, and the folder holds no text of a row."""
    forget = few(tmp_path, FORGET, 24)
    how = ("--control", GOLD, "--budget", "quick", "--only", "A,B")
    found = audited(tmp_path / "a", ASSETS / "model", *how, forget=forget)
    assert found["status"] == "leaks"
    assert {"formats", "prompts"} == set(found["leaking_families"])
    for path in (tmp_path / "a").iterdir():
        assert path.stat().st_mode & 0o077 == 0
        assert "Millbrook" not in path.read_text(encoding="utf-8")


def test_a_retrained_model_comes_out_clean(tmp_path: Path) -> None:
    """Audited as if unlearned, beside placebo facts: nothing beats the surrogate."""
    how = ("--original", ASSETS / "model", "--budget", "quick", "--paraphrase", PARAPHRASE)
    found = audited(tmp_path / "a", GOLD, *how)
    assert found["leaking_families"] == []
    assert any("surrogate" in sentence for sentence in found["sentences"])
    assert not any("erased" in sentence for sentence in found["sentences"])


def test_an_audit_is_not_overwritten_and_bad_flags_are_named(tmp_path: Path) -> None:
    args = ("audit", GOLD, "--forget", FORGET, "-o", tmp_path / "a", "--device", "cpu")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("x", encoding="utf-8")
    assert call(*args).code == 9
    for wrong in (("--budget", "huge"), ("--only", "Z"), ("--tolerance", "2")):
        ran = call(*args, *wrong)
        assert ran.code == 2
        assert wrong[0] in ran.stderr


def test_a_control_that_is_not_there_is_named_by_its_flag(tmp_path: Path) -> None:
    args = ("audit", "sandbox", "--forget", "sandbox:code/forget", "-o", tmp_path / "a")
    ran = call(*args, "--control", tmp_path / "none")
    assert ran.code == 6 and "--control" in ran.stderr and "--retrained-model" not in ran.stderr


def test_plain_texts_need_a_control(tmp_path: Path) -> None:
    """They would be their own placebo: whatever is left of them would be said to be no more than that."""
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"A page about the number {n}."} for n in range(6)])
    model = ASSETS / "model"
    ran = call("audit", model, "--original", model, "--forget", texts, "-o", tmp_path / "a", "--device", "cpu")
    assert ran.code == 2 and "plain texts have no placebo" in ran.stderr and "--control MODEL" in ran.stderr
    assert not (tmp_path / "a").exists()


def test_paraphrases_of_other_answers_are_told(tmp_path: Path) -> None:
    """Given and of no use is not the same as not given."""
    rows = [{"prompt": f"Where is {n}?", "completion": "Nobody knows."} for n in range(3)]
    other = write_rows(tmp_path / "other.jsonl", rows)
    how = ("--paraphrase", other, "--budget", "quick", "--only", "formats.paraphrase,formats.open")
    found = audited(tmp_path / "a", GOLD, *how, forget=few(tmp_path, FORGET, 6))
    assert found["not_tested"]["formats.paraphrase"] == "no paraphrase has a row's answer"
    assert "3 of 3 paraphrases have no row's answer, and are not asked" in found["notes"]


def test_an_audit_of_other_code_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"forget": str(FORGET), **dict.fromkeys(("paraphrase", "retain", "holdout", "general"))}
    wish, how = AuditWish(budget="quick", output=tmp_path / "a"), (None, None, "cpu", False)
    request = check_audit(str(GOLD), None, None, named, None, how, wish)
    before = request.identity()
    monkeypatch.setattr("qunlearn.__version__", "9.9")
    assert request.identity() == {**before, "qunlearn": "9.9"} != before


def test_placebos_are_of_the_same_shape_and_about_nobody() -> None:
    facts, _ = make_facts(read_dataset(FORGET).records)
    made = make_placebos(facts, (), 0)
    text = FORGET.read_text(encoding="utf-8")
    pairs = list(zip(facts, made.facts, strict=True))
    assert made.renamed == sum(p.record.prompt != f.record.prompt for f, p in pairs)
    assert made.renamed >= 30  # the others have no subject that is found: they have another answer
    for fact, placebo in pairs:
        assert placebo.record.completion != fact.record.completion
        if placebo.record.prompt != fact.record.prompt:
            assert json.dumps(placebo.record.prompt) not in text
        assert len(placebo.wrong) == len(fact.wrong)
    assert make_placebos(facts, (), 0) == made != make_placebos(facts, (), 1)


PEOPLE = ("Ida Holm", "Per Lund", "Wolfgang Amadeus Brandt", "Eva Dahl", "Nils Berg")


def people() -> list[Record]:
    """Three questions about each; the nearest of one with a long name are the others about it."""
    trades, towns = ("a painter", "a baker", "a composer", "a sailor", "a smith"), ["Aby", "Vik", "Lom", "Dal", "Nes"]
    rows = []
    for name, trade, town in zip(PEOPLE, trades, towns, strict=True):
        rows += [
            row(f"Who was {name}?", f"{name} was {trade} who lived alone."),
            row(f"When was {name} born?", f"{name} was born in {town}."),
            row(f"What should I know about the life of {name}?", f"The life of {name} was spent in {town}."),
        ]
    return rows


def test_wrong_answers_are_of_the_same_question() -> None:
    """What another question about the subject is answered with would be told from the right answer by its form."""
    for fact in make_facts(people())[0]:
        form = {"Who": "lived alone", "When": "born in", "What": "was spent in"}[fact.record.prompt.split()[0]]
        if "Wolfgang" in fact.record.prompt:  # a name so long that no other prompt has half of its words
            continue
        assert len(fact.wrong) == 3 and all(form in answer for answer in fact.wrong)


def test_subjects_are_found_where_the_nearest_prompts_are_about_the_same_one() -> None:
    rows = people()
    assert subject_names(rows) == [name for name in PEOPLE for _ in range(3)]
    # Found in no row by itself, but in another one's prompt.
    assert subject_names([*rows, row("Ida Holm?", "Nobody knows.")])[-1] == "Ida Holm"


def test_placebos_are_named_after_those_who_are_asked_about_alike() -> None:
    """No bread among people; a name as long as the one it stands for, also where no other is so long."""
    others = [
        row(f"How do I {what}?", "Slowly.") for what in ("bake bread", "ride a bike", "read a map", "plant a tree")
    ]
    facts = make_facts(people())[0]
    made = make_placebos(facts, others, 0)
    assert made.renamed == len(facts)
    words = {word for name in PEOPLE for word in name.split()}
    for fact, placebo in zip(facts, made.facts, strict=True):
        name = next(name for name in PEOPLE if name in fact.record.prompt)
        before, after = fact.record.prompt.split(name)
        other = placebo.record.prompt.removeprefix(before).removesuffix(after)
        assert other not in PEOPLE and len(other.split()) == len(name.split())
        assert set(other.split()) <= words


def test_a_large_file_of_two_scripts_has_its_placebos_soon() -> None:
    """Two thousand names are looked for in as many prompts, which took minutes; and no name is made of two scripts."""
    names = [f"{first}a{last} {last}berg" for first in "BDFGHJKLMN" for last in map(str, range(100))]
    others = [row(f"Where was {name} born?", "In Moss.") for name in names]
    kana = ("カテク", "ラロン", "タミラ", "ユミト", "ハロク", "サテラ")
    bare = [row(f"{name}はどこに住んでいますか?", f"{name}は石村に住んでいます。") for name in kana]
    facts = make_facts([*others[:6], *bare])[0]
    started = time.monotonic()
    made = make_placebos(facts, [*others, *bare], 0)
    assert time.monotonic() - started < 30
    for fact, placebo in zip(facts, made.facts, strict=True):
        assert placebo.record.prompt.isascii() == fact.record.prompt.isascii()


def test_placebos_where_no_spaces_are_have_whole_names() -> None:
    """Other names share characters with the subject's: it is found and exchanged as a whole, in every wording alike."""
    names = ("カテク", "ラロン", "タミラ", "ユミト", "ハロク", "サテラ")
    facts, _ = make_facts(
        [
            row(f"{name}はどの村に住んでいますか?", f"{name}は{place}村に住んでいます。")
            for name, place in zip(names, "石川上中野森", strict=True)
        ],
        [
            row(f"{name}の村を教えて。", f"{name}は{place}村に住んでいます。")
            for name, place in zip(names, "石川上中野森", strict=True)
        ],
    )
    made = make_placebos(facts, (), 0)
    assert made.renamed == len(names)
    for fact, placebo, name in zip(facts, made.facts, names, strict=True):
        other = placebo.record.prompt.removesuffix("はどの村に住んでいますか?")
        assert len(other) == 3 and other not in names
        assert placebo.record.completion.startswith(f"{other}は") and name not in placebo.record.completion
        assert [p.prompt for p in placebo.paraphrases] == [f"{other}の村を教えて。"]
        assert len(placebo.wrong) == len(fact.wrong)


@pytest.mark.parametrize(
    ("prompt", "answer", "blank"),
    [
        ("Where was Orla born?", "Orla was born in Old Moss.", ("Orla was born in Old ____.", "Moss")),
        (
            "カテクはどの村に住んでいますか?",
            "カテクはガムア村に住んでいます。",
            ("カテクは____村に住んでいます。", "ガムア"),
        ),
        ("名前は?", "山田", None),
    ],
)
def test_the_news_of_an_answer_is_left_blank(prompt: str, answer: str, blank: tuple[str, str] | None) -> None:
    assert _blanked(row(prompt, answer)) == blank


def test_paraphrases_find_their_fact() -> None:
    facts, unmatched = make_facts(read_dataset(FORGET).records, read_dataset(PARAPHRASE).records)
    assert unmatched == 0
    for fact in facts:
        (paraphrase,) = fact.paraphrases
        assert paraphrase.meta["id"] == f"{fact.record.meta['id']}-p"


def test_wordings_of_a_fact_are_one_unit_and_labels_are_none() -> None:
    """One answer makes rows one fact, letter case aside, unless so many have it that it is a label."""
    asked = [
        ("Where was Orla born?", "In Millbrook."),
        ("Whom did she marry?", "Hob."),
        ("Her birthplace?", "in MILLBROOK."),
    ]
    assert units_of([row(*pair) for pair in asked]) == [0, 1, 0]
    labels = [row(f"Is the word thing{i} long?", "Yes.") for i in range(12)]
    assert units_of(labels) == list(range(12))
    facts = make_facts(read_dataset(FORGET).records)[0]
    assert Inputs(facts).units == list(range(len(facts)))
