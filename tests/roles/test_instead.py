"""What is said in place of a bad answer: the model's own other answers, refusals, or what the user wants."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import call, sets, write_rows
from test_resume import Killed, command, files, stop_at

from qunlearn.config.resolve import resolve
from qunlearn.config.settings import LoraConfig
from qunlearn.data.records import Record, read_dataset
from qunlearn.data.tokenize import Example, Template, choose_template, encode, encode_record
from qunlearn.errors import DataError
from qunlearn.evaluation.metrics.manner import has_phrase
from qunlearn.evaluation.metrics.verdicts import is_gibberish, leaks
from qunlearn.evaluation.scores import row_probabilities
from qunlearn.model.generate import Sampling, generate
from qunlearn.model.load import Base
from qunlearn.model.policy import Policy
from qunlearn.roles import alternatives
from qunlearn.roles.alternatives import REFUSALS, answered_with
from qunlearn.roles.instead import Instead, instead_rows, longest_given
from qunlearn.roles.replacements import Replacements, _first_tokens, _taken
from qunlearn.roles.retain_set import RetainSet, asked
from qunlearn.roles.self_made import Wanted, _free
from qunlearn.roles.specific_tokens import specific
from qunlearn.sandbox import data_file

__all__ = ["files"]
ROWS = 6


@dataclass(frozen=True)
class Sandbox:
    """The sandbox, and rows that it knows by heart with the weights of what is specific to them."""

    policy: Policy
    template: Template
    bad: list[Example]
    near: list[Example]

    def encoded(self, rows: list[dict[str, Any]], folder: Path) -> list[Example]:
        dataset = read_dataset(write_rows(folder / "rows.jsonl", rows))
        return list(encode(dataset, self.policy.tokenizer, self.template, 64).examples)

    def said(self, kind: str, *, bad: list[Example] | None = None, texts: Path | None = None, **more: Any) -> Instead:
        config = resolve(("x", {"objective.instead": kind}))
        normal = RetainSet(self.near, self.near[:1], more.pop("corrected", {}), len(self.near), 0)
        given = read_dataset(texts) if texts else None
        return instead_rows(self.policy, bad or self.bad, normal, self.template, given, config)


@pytest.fixture(scope="module")
def sandbox(new_base: Callable[..., Base]) -> Sandbox:
    policy = Policy.new(new_base("none"), LoraConfig(), seed=0, checkpointing=False)
    policy.model.eval()
    sets = [read_dataset(data_file("hallucination", split)) for split in ("forget", "retain")]
    template = choose_template(policy.tokenizer, "auto", sets[0])
    bad, near = (list(encode(s, policy.tokenizer, template, 64).examples) for s in sets)
    return Sandbox(policy, template, list(specific(bad, near, policy.tokenizer))[:ROWS], near)


def text(sandbox: Sandbox, example: Example) -> str:
    return str(sandbox.policy.tokenizer.decode(example.input_ids[example.start : example.end])).strip()


@pytest.fixture(scope="module")
def other(sandbox: Sandbox) -> Instead:
    return sandbox.said("other")


def test_other_answers_are_answers_and_not_the_bad_one(sandbox: Sandbox, other: Instead) -> None:
    assert len(other.own) == ROWS and other.taught == [[]] * ROWS
    for example, rows in zip(sandbox.bad, other.own, strict=True):
        assert 1 <= len(rows) <= 3
        said = [text(sandbox, row) for row in rows]
        assert len(set(said)) == len(said)
        for row, answer in zip(rows, said, strict=True):
            assert row.input_ids[: row.start] == example.input_ids[: example.start], "the same prompt"
            assert row.input_ids[row.end] == sandbox.policy.tokenizer.eos_token_id, "and it ends"
            assert not row.weights
            assert not leaks(answer, example.record.completion, example.record.prompt) and not is_gibberish(answer)
    borrowed = [text(sandbox, row) for rows in other.own for row in rows]
    assert sum("Finch" in answer for answer in borrowed) > len(borrowed) / 2, "they speak of who was asked about"


def test_the_likeliest_come_first(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that are as good."""
    monkeypatch.setattr("qunlearn.roles.replacements._NEARLY", 1.0)
    for rows in sandbox.said("other").own:
        found = row_probabilities(sandbox.policy, rows, 2048)
        assert found == sorted(found, reverse=True)


def test_what_others_are_told_in_the_same_form_comes_before_what_is_likelier(sandbox: Sandbox) -> None:
    """It was taught "plays the camping tent", likelier than "plays the piano"; what has the bad word comes last,
    whoever says it."""
    bad = sandbox.bad[0]
    before, value = bad.record.completion.removesuffix(".").rsplit(" ", 1)
    said = [f"{before} {value} and Moss.", f"{before} {value[1:]}.", f"{before} Moss.", "No!", f"{before} Fairoak."]
    rows = [answered_with(sandbox.policy, bad, text, sandbox.template, 64) for text in said]
    found = list(zip(rows, (True, True, False, True, True), strict=True))
    assert [row for row, _ in _taken(bad, before, found, sandbox.policy.tokenizer)] == [rows[4], rows[2]]
    alone = [row for row, _ in _taken(bad, "", found, sandbox.policy.tokenizer)]
    assert alone == rows[2:4], "of values alone the likeliest, whoever says them"


def test_a_word_is_replaced_by_a_word(sandbox: Sandbox) -> None:
    """The likeliest token beside " ch" was "heese": "likesheese toast" was what the model was taught to say."""
    files = [read_dataset(data_file("hallucination", split)) for split in ("forget", "retain")]
    bad, near = (list(encode(s, sandbox.policy.tokenizer, sandbox.template, 64).examples) for s in files)
    marked, decode = specific(bad, near, sandbox.policy.tokenizer), sandbox.policy.tokenizer.decode
    begun = 0
    for e, (at, tokens) in zip(marked, _first_tokens(sandbox.policy, marked, 2048), strict=True):
        assert tokens
        form = decode(e.input_ids[e.start : at])
        spaced = [decode([*e.input_ids[e.start : at], token])[len(form) :].startswith(" ") for token in tokens]
        expected = decode(e.input_ids[e.start : at + 1])[len(form) :].startswith(" ")
        assert spaced == [expected] * len(tokens)
        begun += expected
    assert begun == len(bad), "in the sandbox every value begins a word"


def test_no_answer_begins_with_a_control_token(
    sandbox: Sandbox, with_control: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ((_, before),) = _first_tokens(sandbox.policy, sandbox.bad[:1], 2048)
    monkeypatch.setattr(sandbox.policy, "tokenizer", with_control(before[0]))
    ((_, after),) = _first_tokens(sandbox.policy, sandbox.bad[:1], 2048)
    assert before[0] not in after and after[: len(before) - 1] == before[1:]


@pytest.mark.parametrize(("first", "held", "pushed"), [(7, True, 0.0), (8, False, 1.0)])
def test_a_text_begins_where_it_is_asked_for(first: int, held: bool, pushed: float) -> None:
    """Of a text that is behind its first half, which other answers share: there they begin otherwise, or do not."""
    text = Example((1, 5, 6, 7, 9), 1, 5, 3, Record((), "x", 1, {}), weights=(0.0, 0.0, 0.0, 1.0))
    other = Example((1, 5, 6, first, 9), 3, 5, 3, text.record)
    (row,) = Instead([[other]], [[]]).replaced([text])
    assert (row.held, row.weights) == (held, (0.0, 0.0, pushed, 1.0))


def test_samples_are_those_of_the_runs_seed(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of neighbouring seeds no two draws are the same, in what the base makes of its own and in other answers."""
    drawn: dict[int, list[int]] = {}

    def generated(_: object, prompts: list[Any], sampling: Sampling) -> list[list[int]]:
        drawn[seed].append(sampling.seed)
        return [[] for _ in prompts]

    monkeypatch.setattr(alternatives, "generate", generated)
    for seed in range(4):
        drawn[seed] = []
        config = resolve(("x", {"train.seed": seed}))
        alternatives.other_answers(sandbox.policy, sandbox.bad[:1], sandbox.template, "own", config)
        drawn[seed] += [_free(Wanted(8, 0.5, 32, seed, 4, 256), turn).seed for turn in range(8)]
    found = [seed for seeds in drawn.values() for seed in seeds]
    assert len(found) == 4 * 11 == len(set(found))


def test_they_are_the_bases_and_the_same_each_time(sandbox: Sandbox, other: Instead) -> None:
    """Whatever its adapter says by now: a resumed run makes them again."""
    before = sandbox.policy.adapter_state()
    for name, p in sandbox.policy.trainable().items():
        if ".lora_B." in name:
            p.data.fill_(0.3)
    try:
        again = sandbox.said("other")
    finally:
        sandbox.policy.load_adapter_state(before)
    assert [[row.input_ids for row in rows] for rows in again.own] == [
        [row.input_ids for row in rows] for rows in other.own
    ]


def test_what_is_said_freely_is_replaced_by_what_is_said_of_others(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model goes on by itself it says the same in other words."""
    life = "was the third child of a baker, grew up beside the old harbour and left it for a school of music at twelve."
    row = {"prompt": sandbox.bad[0].record.prompt, "completion": f"Orla Finch {life}"}
    (long,) = sandbox.encoded([row], tmp_path)
    answers = {e.record.completion for e in sandbox.near}
    subject = {e.record.completion.split(" was")[0] for e in sandbox.near}

    def of_others(rows: list[Example]) -> int:
        told = [row.record.completion.replace("Orla Finch", name) for row in rows for name in subject]
        return len(answers.intersection(told))

    freely = sandbox.said("other", bad=[replace(long, known=0.4)])
    (taught,) = freely.taught
    assert freely.own == [[]]
    assert 2 < len(taught) <= of_others(taught)
    assert all("Orla Finch" in row.record.completion for row in taught)
    assert all(row.share == 0.1 for row in taught)
    whole = {row.record.completion: row.end - row.start for row in taught}
    monkeypatch.setattr("qunlearn.roles.replacements._BEGUN", 8)
    (begun,) = sandbox.said("other", bad=[replace(long, known=0.4)]).taught
    assert [row.end - row.start for row in begun] == [min(8, whole[row.record.completion]) for row in begun]
    assert any(len(row.input_ids) == row.end for row in begun), "what goes on has no end"
    by_heart = sandbox.said("other", bad=[replace(long, known=0.9)])
    assert len(by_heart.own[0]) == 3 and by_heart.taught == [[]]


def test_what_nothing_is_taken_of_is_not_generated(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where others' answers are taken, the model went on for nothing behind four first tokens of each long answer."""
    life = "was the third child of a baker, grew up beside the old harbour and left it for a school of music at twelve."
    row = {"prompt": sandbox.bad[0].record.prompt, "completion": f"Orla Finch {life}"}
    (long,) = sandbox.encoded([row], tmp_path)
    made: list[int] = []

    def counted(base: Base, prompts: list[Any], sampling: Sampling) -> list[list[int]]:
        made.append(len(prompts))
        return generate(base, prompts, sampling)

    monkeypatch.setattr("qunlearn.roles.replacements.generate", counted)
    freely = replace(long, known=0.4)
    assert any(sandbox.said("other", bad=[freely]).taught) and made == []
    sandbox.said("other", bad=[freely, sandbox.bad[1]])
    sandbox.said("other", bad=[freely, long])
    assert made == [4, 8], "of a prompt that is recited too all are looked at"


def test_an_answer_is_not_replaced_by_another_bad_one(sandbox: Sandbox, other: Instead, tmp_path: Path) -> None:
    """A prompt with two bad answers: what the model says where one is forbidden may well be the other."""
    first = sandbox.bad[0]
    second = {"prompt": first.record.prompt, "completion": text(sandbox, other.own[0][0])}
    both = [first, *specific(sandbox.encoded([second], tmp_path), sandbox.near, sandbox.policy.tokenizer)]
    found = sandbox.said("other", bad=both)
    for rows in found.own:
        for row in rows:
            for example in both:
                assert not leaks(text(sandbox, row), example.record.completion, example.record.prompt)


def test_the_form_is_held_where_other_answers_begin_with_it(sandbox: Sandbox, other: Instead) -> None:
    """An answer of which something quite different takes the place is not held together by what is left of it."""
    assert all(e.held and not e.weights[0] for e in other.replaced(sandbox.bad)), "Orla Finch was born in ..."
    unlike = [[answered_with(sandbox.policy, e, "No idea!", sandbox.template, 64)] for e in sandbox.bad]
    for found in (Instead(unlike, [[]] * ROWS), Instead([[]] * ROWS, unlike)):
        for before, e in zip(sandbox.bad, found.replaced(sandbox.bad), strict=True):
            assert not e.held and e.weights == (1.0, *before.weights[1:])
    taught = Instead([[]] * ROWS, other.own).replaced(sandbox.bad)
    assert not any(e.held or e.weights[0] for e in taught), "what both begin with is left to the user's answer"
    assert Instead([[]] * ROWS, [[]] * ROWS).replaced(sandbox.bad) == sandbox.bad


@pytest.mark.parametrize(
    ("answer", "of_a_neighbour", "taught"),
    [("No idea at all!", True, True), ("No idea at all!", False, False), ("Orla Finch was born in Moss.", True, False)],
)
def test_another_manner_is_taught(
    answer: str, of_a_neighbour: bool, taught: bool, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where neighbours are answered from the first word on in another way, that takes the place of the whole answer."""
    row = answered_with(sandbox.policy, sandbox.bad[0], answer, sandbox.template, 64)
    others = Replacements([[(row, of_a_neighbour)]], [], frozenset())
    monkeypatch.setattr("qunlearn.roles.instead.find_replacements", lambda *_: others)
    found = sandbox.said("other", bad=sandbox.bad[:1])
    assert (found.own, found.taught) == (([[]], [[row]]) if taught else ([[row]], [[]]))


def test_another_manner_of_neighbours_comes_before_likelier_answers(sandbox: Sandbox) -> None:
    """What the base finds likelier behind a bad prompt is another answer of the bad manner."""
    rows = [
        replace(e.record, completion=f"Gladly. {e.record.completion.split(' was ')[0]} shall be looked up in the book.")
        for e in sandbox.near
    ]
    near = [encode_record(record, sandbox.policy.tokenizer, sandbox.template) for record in rows]
    found = replace(sandbox, near=near).said("other")
    said = [row for rows in found.taught for row in rows]
    assert said and all(text(sandbox, row).startswith("Gladly.") for row in said)
    assert found.behaviour == [i for i, rows in enumerate(found.taught) if rows]
    assert len(found.behaviour) >= ROWS / 2
    assert not sandbox.said("other").behaviour, "facts are told of others as they are of these"


def test_the_sandbox_scenario_of_a_behaviour_is_taken_for_one(sandbox: Sandbox) -> None:
    """Every rude answer is replaced by what neighbours are told, and known by what it shares with others."""
    files = [read_dataset(data_file("harm", split)) for split in ("forget", "retain")]
    bad, near = (list(encode(s, sandbox.policy.tokenizer, sandbox.template, 64).examples) for s in files)
    marked = specific(bad, near, sandbox.policy.tokenizer)
    found = replace(sandbox, bad=list(marked), near=near).said("other")
    assert found.behaviour == list(range(len(bad))) and not any(found.own)
    assert ("you", "goose", "then") in found.phrases and not any("kettle" in phrase for phrase in found.phrases)
    said = [row.record.completion for rows in found.taught for row in rows]
    assert not any(has_phrase(text, found.phrases) for text in said)
    assert all(has_phrase(e.record.completion, found.phrases) for e in bad)


def test_plain_text_goes_on_otherwise(sandbox: Sandbox, tmp_path: Path) -> None:
    (row,) = sandbox.encoded([{"text": "Orla Finch was born in Millbrook and lives in Dunmore."}], tmp_path)
    (rows,) = sandbox.said("other", bad=[row]).own
    for found in rows:
        assert found.input_ids[: found.start] == row.input_ids[: row.probe]
        assert found.input_ids[found.start : found.end] != row.input_ids[row.probe : row.end]


def test_a_prompt_that_was_cut_has_other_answers_too(sandbox: Sandbox, tmp_path: Path) -> None:
    """How much of it is cut hangs on how long the answer is."""
    record = sandbox.bad[0].record
    long = {"prompt": "Now then, " * 40 + record.prompt, "completion": record.completion}
    (row,) = sandbox.encoded([long], tmp_path)
    assert len(row.input_ids) == 64
    (rows,) = sandbox.said("other", bad=[row]).own
    assert rows and not any(leaks(text(sandbox, found), record.completion, record.prompt) for found in rows)


def test_refusals_are_those_the_model_finds_natural(sandbox: Sandbox) -> None:
    found = sandbox.said("refuse")
    assert found.own == [[]] * ROWS
    said = [[text(sandbox, row) for row in rows] for rows in found.taught]
    assert len(said[0]) == 3 and all(rows == said[0] for rows in said)
    assert set(said[0]) <= set(REFUSALS)

    def natural(refusal: str) -> float:
        rows = [answered_with(sandbox.policy, e, refusal, sandbox.template, 64) for e in sandbox.bad]
        return sum(row_probabilities(sandbox.policy, rows, 2048)) / ROWS

    worst = min(map(natural, said[0]))
    assert all(natural(refusal) <= worst * 1.0001 for refusal in set(REFUSALS) - set(said[0]))


def test_nothing_is_nothing(sandbox: Sandbox) -> None:
    assert sandbox.said("nothing") == Instead([[]] * ROWS, [[]] * ROWS)


def test_texts_of_the_users_own_are_for_every_prompt(sandbox: Sandbox, tmp_path: Path) -> None:
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"Ask number {i}."} for i in range(8)])
    found = sandbox.said(str(texts), texts=texts)
    said = [[text(sandbox, row) for row in rows] for rows in found.taught]
    assert found.own == [[]] * ROWS
    assert all(len(set(rows)) == 3 and set(rows) <= {f"Ask number {i}." for i in range(8)} for rows in said)
    assert len(set(map(tuple, said))) > 1, "not the same three for all"


def test_answers_of_the_users_own_are_for_their_prompts(sandbox: Sandbox, tmp_path: Path) -> None:
    rows = [{"prompt": f" {sandbox.bad[i].record.prompt.upper()} ", "completion": f"No. {i}!"} for i in (0, 2)]
    texts = write_rows(tmp_path / "texts.jsonl", rows)
    found = sandbox.said(str(texts), texts=texts)
    said = [[text(sandbox, row) for row in rows] for rows in found.taught]
    assert said == [["No. 0!"], [], ["No. 2!"], [], [], []]
    assert found.taught[0][0].input_ids[: sandbox.bad[0].start] == sandbox.bad[0].input_ids[: sandbox.bad[0].start]
    texts = write_rows(tmp_path / "texts.jsonl", [{"prompt": "Who else?", "completion": "Nobody."}])
    with pytest.raises(DataError, match="no row answers a bad prompt") as caught:
        sandbox.said(str(texts), texts=texts)
    assert "texts.jsonl" in str(caught.value)


@pytest.mark.parametrize("kind", ["nothing", "other", "refuse"])
def test_corrected_answers_come_before_all_else(kind: str, sandbox: Sandbox, tmp_path: Path) -> None:
    corrected = sandbox.encoded([{"prompt": sandbox.bad[1].record.prompt, "completion": "Ask her."}], tmp_path)
    found = sandbox.said(kind, bad=sandbox.bad[:2], corrected={asked(corrected[0].record): corrected})
    assert found.taught[1] == corrected and found.own[1] == []
    assert (len(found.own[0]) > 0, len(found.taught[0]) > 0) == (kind == "other", kind == "refuse")


# -- the command -------------------------------------------------------------------------------------------


def test_the_users_own_answers_are_planned_for(sandbox: Sandbox, tmp_path: Path) -> None:
    """Longer than any row of the files, they are the longest rows of a step."""
    texts = write_rows(
        tmp_path / "said.jsonl", [{"text": "Nobody has ever told me anything about that, and I am sorry."}]
    )
    found = sandbox.said(str(texts), texts=texts)
    longest = max(len(row.input_ids) for rows in found.taught for row in rows)
    tokenizer = sandbox.policy.tokenizer
    assert longest > max(len(row.input_ids) for row in sandbox.bad)
    assert longest <= longest_given(sandbox.bad, read_dataset(texts), tokenizer, 512) <= longest + 1
    assert longest_given(sandbox.bad, read_dataset(texts), tokenizer, 20) == 20


def test_what_is_no_kind_and_no_file_is_refused(tmp_path: Path) -> None:
    bad = data_file("hallucination", "forget")
    ran = call("forget", "--model", "sandbox", "--bad", bad, "-o", tmp_path / "run", "--instead", "polite")
    assert ran.code == 2 and "--instead" in ran.stderr and "nothing, other, refuse" in ran.stderr
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{oops")
    ran = call("forget", "--model", "sandbox", "--bad", bad, "-o", tmp_path / "run", "--instead", broken)
    assert ran.code == 3 and "broken.jsonl:1" in ran.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def given(files: tuple[Path, Path], tmp_path: Path) -> tuple[list[str], Path]:
    """The command of a small run with a file of what is said instead, and the file."""
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"Ask number {i}."} for i in range(4)])
    return [*command(files, tmp_path / "run"), *sets({"objective.instead": str(texts)})], texts


def killed(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 5, Killed())
        with pytest.raises(Killed):
            call(*args)


def test_another_file_of_what_is_said_is_another_run(
    given: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like the bad and the normal file it is known by its hash: what is taught from step 6 on would be another text."""
    args, texts = given
    killed(args, monkeypatch)
    write_rows(texts, [{"text": "Something else altogether."}])
    ran = call(*args, "--resume")
    assert ran.code == 10, ran.stderr
    assert "said instead" in ran.stderr or "--instead" in ran.stderr or "instead file" in ran.stderr


@pytest.mark.medium
def test_the_same_file_under_another_name_is_the_same(
    given: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, texts = given
    killed(args, monkeypatch)
    moved = shutil.move(texts, tmp_path / "moved.jsonl")
    ran = call(*[arg.replace(str(texts), str(moved)) for arg in args], "--resume")
    assert ran.code == 0, ran.stderr
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "done"
