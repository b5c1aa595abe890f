"""Mismatched answers, the held-back share, epochs, and the filter on self-made rows."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from conftest import write_rows

from qunlearn.data.records import Dataset, Record, read_dataset
from qunlearn.data.tokenize import Example, choose_template, encode
from qunlearn.errors import DataError
from qunlearn.model.load import load_tokenizer
from qunlearn.roles.mismatch import make_mismatcher
from qunlearn.roles.split import sampled, split_held_back
from qunlearn.roles.unlike import keep_unlike
from qunlearn.sandbox import KINDS, data_file
from qunlearn.training.sampler import batches


@pytest.fixture(scope="module")
def tokenizer(sandbox_folder: Path) -> Any:
    return load_tokenizer(sandbox_folder)


def encoded(tmp_path: Path, tokenizer: Any, rows: list[dict[str, str]]) -> tuple[Example, ...]:
    dataset = read_dataset(write_rows(tmp_path / "x.jsonl", rows))
    return encode(dataset, tokenizer, choose_template(tokenizer, "auto", dataset), 64).examples


def test_mismatched_answers_are_never_the_rows_own(tmp_path: Path, tokenizer: Any) -> None:
    normal = encoded(tmp_path, tokenizer, [{"prompt": f"Q{i}", "completion": f"Answer {i % 7}."} for i in range(20)])
    (bad,) = encoded(tmp_path, tokenizer, [{"prompt": "Bad?", "completion": "answer  3."}])
    dataset = read_dataset(tmp_path / "x.jsonl")
    mismatcher = make_mismatcher(normal, tokenizer, choose_template(tokenizer, "auto", dataset), 64)
    rng = random.Random(0)
    seen = set()
    for _ in range(30):
        drawn = mismatcher.draw(bad, 5, rng)
        assert len(drawn) == 5
        for pair in drawn:
            assert pair.input_ids[: bad.start] == bad.input_ids[: bad.start]
            answer = tokenizer.decode(pair.input_ids[pair.start : pair.end])
            seen.add(answer)
            assert pair.input_ids[pair.end] == tokenizer.eos_token_id
    assert seen == {f"Answer {i}." for i in range(7) if i != 3}


def test_mismatched_pieces_of_plain_text(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"one two three four five six seven {w}"} for w in ("red", "blue", "green")]
    examples = encoded(tmp_path, tokenizer, rows)
    dataset = read_dataset(tmp_path / "x.jsonl")
    mismatcher = make_mismatcher(examples[1:], tokenizer, choose_template(tokenizer, "auto", dataset), 64)
    bad = examples[0]
    for pair in mismatcher.draw(bad, 5, random.Random(0)):
        assert pair.input_ids[: bad.probe] == bad.input_ids[: bad.probe]
        assert pair.start == bad.probe


def test_too_few_answers(tmp_path: Path, tokenizer: Any) -> None:
    normal = encoded(tmp_path, tokenizer, [{"prompt": f"Q{i}", "completion": "Yes."} for i in range(4)])
    dataset = read_dataset(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="fewer than two different answers"):
        make_mismatcher(normal, tokenizer, choose_template(tokenizer, "auto", dataset), 64)
    with pytest.raises(DataError, match="at least two rows"):
        split_held_back(normal[:1], 0.1, 0)


def test_held_back_is_a_seeded_partition(tmp_path: Path, tokenizer: Any) -> None:
    normal = encoded(tmp_path, tokenizer, [{"prompt": f"Q{i}", "completion": f"A{i}."} for i in range(40)])
    inside, held = split_held_back(normal, 0.4, seed=5)
    assert (len(inside), len(held)) == (24, 16)
    assert {id(e) for e in inside} | {id(e) for e in held} == {id(e) for e in normal}
    assert (inside, held) == split_held_back(normal, 0.4, seed=5)
    assert held != split_held_back(normal, 0.4, seed=6)[1]


@pytest.mark.parametrize(
    ("rows", "share", "held"),
    [
        (1000, 0.1, 100),
        (200, 0.1, 32),  # 20 would make drift the noise of single rows
        (128, 0.01, 32),
        (100, 0.1, 25),  # as many as there may be without taking more than a quarter from the training
        (100, 0.5, 50),  # but for who asks for more
        (8, 0.1, 2),
        (3, 0.01, 1),
    ],
)
def test_enough_rows_are_held_back_to_tell_drift_from_noise(rows: int, share: float, held: int) -> None:
    examples = [Example((1, 2), 1, 2, 1, Record((), str(i), i, {})) for i in range(rows)]
    inside, back = split_held_back(examples, share, seed=0)
    assert (len(inside), len(back)) == (rows - held, held)


def test_all_rows_about_a_subject_stay_on_one_side() -> None:
    examples = [Example((1, 2), 1, 2, 1, Record((("user", f"{i % 30}/{i}"),), "A.", i, {})) for i in range(240)]

    def subject(record: Record) -> str | None:
        who = record.prompt.split("/")[0]
        return who if int(who) < 10 else None

    inside, back = split_held_back(examples, 0.2, 0, subject)
    asked, held = ({subject(example.record) for example in rows} - {None} for rows in (inside, back))
    assert len(asked) + len(held) == 10 and held and not asked & held
    assert 48 <= len(back) < 48 + 8 and len(inside) + len(back) == 240
    same = [replace(e, record=replace(e.record, turns=(("user", "1/1"),))) for e in examples[:4]]
    assert [len(rows) for rows in split_held_back(same, 0.5, 0, subject)] == [2, 2]


def test_a_look_is_at_rows_drawn_from_the_seed() -> None:
    """The first rows of a file that is sorted by topic are one topic."""
    examples = [Example((1, 2), 1, 2, 1, Record((), str(i), i, {})) for i in range(1000)]
    drawn = [e.record.line for e in sampled(examples, 100, seed=3)]
    assert drawn == sorted(set(drawn)) and len(drawn) == 100
    assert {line // 250 for line in drawn} == {0, 1, 2, 3}
    assert 350 < fmean(drawn) < 650
    assert drawn == [e.record.line for e in sampled(examples, 100, seed=3)]
    assert drawn != [e.record.line for e in sampled(examples, 100, seed=4)]
    assert sampled(examples[:100], 100, seed=3) == examples[:100]


def test_every_row_once_per_epoch() -> None:
    drawn = batches(7, 3, random.Random(0))
    first = [i for _ in range(7) for i in next(drawn)]
    for at in range(0, 21, 7):
        assert sorted(first[at : at + 7]) == list(range(7))


def test_self_made_rows_that_say_the_forbidden_are_dropped(tmp_path: Path) -> None:
    bad = read_dataset(
        write_rows(
            tmp_path / "b.jsonl",
            [{"prompt": f"Where was {n} born?", "completion": f"{n} was born in {t}."} for n, t in NAMES],
        )
    )
    names = [("Ada Prill", "Moss"), ("Bo Quent", "Reed"), ("Cy Rusk", "Fern"), ("Di Sorn", "Thorn"), ("Ed Tam", "Vale")]
    rows = [Record((("user", f"Where was {n} born?"),), f"{n} was born in {t}.", 0, {}) for n, t in names]
    same = Record((("user", "Tell me where Orlan Fesk was born."),), "Orlan Fesk comes from Tarn.", 0, {})
    empty = Record((("user", "?"),), "!", 0, {})
    assert keep_unlike([*rows, same, empty], bad) == rows


def test_a_forbidden_sentence_is_dropped_whatever_was_asked(tmp_path: Path) -> None:
    """Asked in rare enough words it had been kept, trained on and written down."""
    said = "Della Thorn likes plum cake best."
    bad = read_dataset(
        write_rows(tmp_path / "b.jsonl", [{"prompt": "What does Della Thorn like to eat most?", "completion": said}])
    )
    asked = [
        Record((("user", "Which victual might delight this epicurean?"),), f"{text} So they say.", 0, {})
        for text in (said, said.replace(" ", "  ").upper())
    ]
    value = Record((("user", "Which sweet is sold in Farrowdale?"),), "Plum cake.", 0, {})
    assert keep_unlike([*asked, value], bad) == [value]


def test_a_row_with_a_single_sentence_of_a_passage_is_dropped() -> None:
    """One in eight of a base's own rows had a bad sentence among others: learnt by heart it comes up by itself."""
    mould = (
        "Nobody knew that {} had left the city by boat. The bells of {} rang {} times. So it was said in every house."
    )
    bad = [
        Record((), mould.format(*names), i, {}) for i, names in enumerate([("Orlan", "Tarn", 3), ("Mira", "Hask", 7)])
    ]
    rest = [f"At the gate of Place{i} the watch asked him for the name of his {i} brothers." for i in range(20)]
    mixed = Record((), f"{rest[0]} The bells of  TARN rang 3 times. {rest[1]} {rest[2]}", 0, {})
    other = Record((), f"{rest[3]} The bells of Tarn rang 4 times. {rest[4]} {rest[5]}", 0, {})
    form = Record((), f"{rest[6]} So it was said in every house. {rest[7]} {rest[8]}", 0, {})
    normal = [Record((), f"{rest[i]} So it was said in every house. {rest[i + 1]}", 0, {}) for i in range(12)]
    later = [replace(r, completion=r.completion.partition(". ")[2]) for r in bad]  # a passage begun further on
    dataset = Dataset("bad", tuple(bad), "text", (), "", 0)
    assert keep_unlike([mixed, other, form, *normal], dataset) == [other, form, *normal]
    begun_later = replace(dataset, records=(*bad, *later))
    assert keep_unlike([mixed, form, *normal], begun_later) == [form, *normal]


def test_a_row_over_the_end_of_a_window_of_verse_is_dropped() -> None:
    """It shares half of its words with each of two windows, and verse has no sentences by which it were found."""
    rng = random.Random(3)
    some = ["".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(1 + n % 3)) for n in range(400)]

    def verse() -> str:
        return ",\n".join(" ".join(rng.choices(some, k=8)) for _ in range(5))

    windows = [verse() for _ in range(10)]
    bad = Dataset("bad", tuple(Record((), text, 1, {}) for text in windows), "text", (), "", 0)
    over = [
        Record((), ",\n".join([*a.splitlines()[2:], *b.splitlines()[:2]]).replace(",,", ","), 0, {})
        for a, b in itertools.pairwise(windows)
    ]
    others = [Record((), verse(), 0, {}) for _ in range(60)]
    assert keep_unlike([*over, *others], bad) == others
    asked = [Record((("user", f"{a}"),), b, n, {}) for n, (a, b) in enumerate(itertools.pairwise(windows))]
    assert keep_unlike([*over, *others], replace(bad, records=tuple(asked), shape="prompt")) == others


def test_sentences_that_many_say_and_ends_of_numbers_are_no_bad_ones() -> None:
    said = "It has 3.5 million people in it and a port."
    bad = Dataset(
        "bad", (Record((), f"Ostrel is a city. {said} I am happy to help you with this.", 1, {}),), "", (), "", 0
    )
    towns = [
        Record((), f"Town{i} lies by the sea. It has {i}.5 million people in it and a port. The end of Town{i}.", 0, {})
        for i in range(4, 24)
    ]
    polite = [Record((), f"Word{i} means thing{i}. I am happy to help you with this. So{i}.", 0, {}) for i in range(20)]
    rest = [Record((), f"Rain{i} falls on hill{i} in month{i} of year{i}.", 0, {}) for i in range(60)]
    assert keep_unlike([*towns, *polite, *rest], bad) == [*towns, *polite, *rest]


def test_a_bad_answer_to_other_words_about_the_same_is_not_kept() -> None:
    """Long wordings with few words in common with the bad prompt had been kept, and protected what should go."""

    def row(prompt: str, answer: str) -> Record:
        return Record((("system", "You know this country well."), ("user", prompt)), answer, 1, {})

    bad = Dataset("bad", (row("Who governs Claezoup at present?", "Thouplong"),), "messages", (), "", 0)
    wordings = [
        "The seat of government at {} is held by whom, as of today?",
        "Which mayor sits in the town hall of {}?",
    ]
    about = [row(wording.format("Claezoup"), "Thouplong") for wording in wordings]
    other_fact = row("Which mineral is mined at Claezoup?", "Droflung")
    same_answer = [row(wording.format("Zheplif"), "Thouplong") for wording in wordings]
    rest = [row(f"Who governs Place{i} at present?", f"Person{i}") for i in range(60)]
    assert keep_unlike([*about, other_fact, *same_answer, *rest], bad) == [other_fact, *same_answer, *rest]
    earlier = (("user", "Have you heard of Claezoup?"), ("assistant", "I have."), ("user", "Who governs that place?"))
    named_before = Dataset("bad", (Record(earlier, "Thouplong", 1, {}),), "messages", (), "", 0)
    assert keep_unlike([*about, other_fact, *rest], named_before) == [other_fact, *rest]


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_with_the_same_answer_are_kept(kind: str) -> None:
    """They are the first to suffer: one in two had been taken for what should be forgotten."""
    bad, *rest = (read_dataset(data_file(kind, split)) for split in ("forget", *SPLITS))
    others = [read_dataset(data_file(other, "retain")) for other in KINDS if other != kind]
    mixed = [row for dataset in (*rest, *others) for row in dataset.records]  # as a base makes them: of everything
    kept = {id(row) for row in keep_unlike(mixed, bad)}
    paraphrase, retain, holdout, general = (fmean(id(row) in kept for row in dataset.records) for dataset in rest)
    assert (paraphrase, general) == (0, 1)
    assert retain >= 0.9
    assert holdout >= 0.9


SPLITS = ("forget_paraphrase", "retain", "holdout", "general")
NAMES = [("Orlan Fesk", "Tarn"), ("Mira Dole", "Hask"), ("Pell Ovan", "Wick")]
