"""The normal rows of a run: corrected answers apart, rows of the base's own for what no file covers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import call, sets, write_rows

from qunlearn.config.resolve import resolve
from qunlearn.data.records import Dataset, Record, read_dataset
from qunlearn.data.tokenize import Encoded, choose_template, encode
from qunlearn.errors import DataError
from qunlearn.model.load import load_tokenizer
from qunlearn.roles.retain_set import RetainSet, asked
from qunlearn.roles.self_made import SelfMade, Wanted
from qunlearn.sandbox import data_file
from qunlearn.training import retain_rows as normal_module
from qunlearn.training.header import _retain_set as shown
from qunlearn.training.retain_rows import _LEAST_OWN, _own_count, longest_own, make_retain_set
from qunlearn.utils.file_names import NORMAL, RECORD

BAD = [{"prompt": f"Where was Person{i} born?", "completion": f"In Badtown{i}."} for i in range(4)]
NEAR = [{"prompt": f"What is thing {i} for?", "completion": f"It is for use {i}."} for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(sandbox_folder: Path) -> Any:
    return load_tokenizer(sandbox_folder)


@dataclass
class Work:
    """The staging folder of a run."""

    self_made: Path
    has_self_made: bool = False
    kept: int = 0

    def keep_self_made(self) -> None:
        self.kept += 1


@dataclass
class Made:
    """A base that makes rows of its own: what was asked of it, and what it says."""

    tokenizer: Any
    records: list[Record] = field(default_factory=list)
    wanted: list[Wanted] = field(default_factory=list)
    error: DataError | None = None
    base: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        yield

    def make(self, base: object, bad: Dataset, template: object, wanted: Wanted) -> SelfMade:
        self.wanted.append(wanted)
        if self.error:
            raise self.error
        numbered = tuple(replace(record, line=i) for i, record in enumerate(self.records, 1))
        return SelfMade(numbered, len(numbered), 0, 0, 0)


@pytest.fixture
def rows_of(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RetainSet]:
    """`make_retain_set` of bad and normal rows; with `made`, the base makes those."""

    def of(
        bad: list[dict[str, Any]],
        given: list[dict[str, Any]] | None,
        *,
        made: Made | None = None,
        holdout: list[dict[str, Any]] | None = None,
        work: Work | None = None,
        positions: int = 1 << 30,
        **values: object,
    ) -> RetainSet:
        config = resolve(("x", {"data.own_share": 0.0 if made is None else 0.5, **values}))
        bad_set = read_dataset(write_rows(tmp_path / "bad.jsonl", bad))
        template = choose_template(tokenizer, "auto", bad_set)
        normal = read_dataset(write_rows(tmp_path / "given.jsonl", given)) if given is not None else None
        held = read_dataset(write_rows(tmp_path / "holdout.jsonl", holdout)) if holdout is not None else None
        if made is not None:
            monkeypatch.setattr(normal_module, "self_made_rows", made.make)

        def tokens(dataset: Dataset | None) -> Encoded | None:
            return encode(dataset, tokenizer, template, 64) if dataset is not None else None

        plan: Any = SimpleNamespace(config=config, forget_rows=bad_set, retain_rows=normal, holdout=held)
        work = work or Work(tmp_path / NORMAL)

        def nobody(_: Record) -> None:
            return None

        encoded: Any = tokens(bad_set)
        return make_retain_set(plan, template, encoded, tokens(normal), made, work, positions, nobody)  # type: ignore[arg-type]

    return of


def prompts(rows: Any) -> set[str]:
    return {e.record.prompt for e in rows}


# -- corrected answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_corrected_answers_are_neither_kept_nor_held_back(seed: int, rows_of: Callable[..., RetainSet]) -> None:
    """KL on them would protect the bad answer, and one of them held back would be all of the drift."""
    corrected = [{**row, "completion": "That is private."} for row in BAD[:3]]
    second = {**BAD[0], "prompt": "  where WAS person0\n born? ", "completion": "I cannot say."}
    found = rows_of(BAD, [*NEAR, *corrected, second], **{"train.seed": seed})
    assert prompts(found.retain) | prompts(found.held_back) == {row["prompt"] for row in NEAR}
    assert len(found.retain) + len(found.held_back) == found.given == 40
    assert (found.own, found.corrected_rows) == (0, 4)
    said = {key: [e.record.completion for e in rows] for key, rows in found.corrected.items()}
    assert said == {
        "where was person0 born?": ["That is private.", "I cannot say."],
        "where was person1 born?": ["That is private."],
        "where was person2 born?": ["That is private."],
    }
    assert "4 answer a bad prompt: taught, where the base gives the bad answer" in shown(found, taught=True)
    assert "4 answer a bad prompt: left out, for this objective teaches none" in shown(found, taught=False)


def test_the_whole_of_a_dialogue_is_what_is_asked() -> None:
    first, second = (("user", "Who?"), ("assistant", "Ada."), ("user", "Where?")), (("user", "Where?"),)
    assert asked(Record(first, "x", 0, {})) != asked(Record(second, "x", 0, {}))
    assert asked(Record(second, "x", 0, {})) == asked(Record((("user", "  WHERE?  "),), "y", 1, {}))


def test_plain_text_corrects_nothing(rows_of: Callable[..., RetainSet]) -> None:
    text = [{"text": f"one two three four five six seven {w}"} for w in ("red", "blue", "green", "pink")]
    found = rows_of(text[:1], [*text[1:], {"text": "one two three and other words"}])
    assert found.corrected == {} and len(found.retain) + len(found.held_back) == 4


def test_corrected_answers_alone_are_too_few(rows_of: Callable[..., RetainSet]) -> None:
    with pytest.raises(DataError, match="at least two rows of normal data"):
        rows_of(BAD, [{**row, "completion": "That is private."} for row in BAD])


# -- the base's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "share", "most", "count"),
    [
        (None, 0.5, 1536, 1536),  # without a file, all
        (None, 0.0, 24, 24),
        (8, 0.5, 1536, 512),  # fewer cover little
        (8, 0.5, 24, 24),
        (1000, 0.5, 1536, 1000),
        (1000, 0.2, 1536, 512),  # 250 of 1,250
        (2400, 0.25, 1536, 800),
        (9000, 0.5, 1536, 1536),
        (1000, 0.0, 1536, 0),
    ],
)
def test_how_many_rows_the_base_makes(given: int | None, share: float, most: int, count: int) -> None:
    assert _own_count(given, share, most, 512) == count


def own(n: int) -> list[Record]:
    return [Record((("user", f"Tell me of matter {i}."),), f"Matter {i} is known.", 0, {}) for i in range(100, 100 + n)]


def test_a_file_is_joined_by_rows_of_the_bases_own(
    rows_of: Callable[..., RetainSet], tokenizer: Any, tmp_path: Path
) -> None:
    made, work = Made(tokenizer, own(20)), Work(tmp_path / NORMAL)
    found = rows_of(BAD, NEAR, made=made, work=work)
    assert (found.given, found.own) == (40, 20)
    assert prompts(found.retain) | prompts(found.held_back) == {
        *(row["prompt"] for row in NEAR),
        *(r.prompt for r in own(20)),
    }
    assert len(found.held_back) == 15  # of 60
    assert [w.count for w in made.wanted] == [_LEAST_OWN] and work.kept == 1
    kept = [json.loads(line) for line in work.self_made.read_text().splitlines()]
    assert [row["prompt"] for row in kept] == [r.prompt for r in own(20)]
    assert "40 given, 20 of the base's own (33 %); the file is like 0 % of" in shown(found, taught=True)


def test_one_row_is_filled_up(rows_of: Callable[..., RetainSet], tokenizer: Any) -> None:
    """Where it was refused: too few to train on and to measure drift with."""
    found = rows_of(BAD, NEAR[:1], made=Made(tokenizer, own(20)))
    assert (found.given, found.own, len(found.held_back)) == (1, 20, 5)


@pytest.mark.parametrize("dropped", [(), (3, 4, 11)])
def test_rows_that_were_made_before_are_not_made_again(
    dropped: tuple[int, ...], rows_of: Callable[..., RetainSet], tokenizer: Any, tmp_path: Path
) -> None:
    """And are split as they were, those that a holdout file took away included: else a resumed run is another one."""
    held = [{"prompt": own(20)[i].prompt, "completion": "Other."} for i in dropped] or None
    first = rows_of(BAD, NEAR, made=Made(tokenizer, own(20)), holdout=held)
    made = Made(tokenizer, error=DataError("is asked again"))
    again = rows_of(BAD, NEAR, made=made, holdout=held, work=Work(tmp_path / NORMAL, has_self_made=True))
    assert made.wanted == [] and again.made is None
    for a, b in ((first.retain, again.retain), (first.held_back, again.held_back)):
        assert [e.input_ids for e in a] == [e.input_ids for e in b]


def test_how_far_a_file_covers_what_the_base_says(rows_of: Callable[..., RetainSet], tokenizer: Any) -> None:
    strange = [("Do bees sting?", "Rarely."), ("Name a colour.", "Green, say."), ("Sum two and two!", "Four.")]
    records = own(7) + [Record((("user", prompt),), answer, 0, {}) for prompt, answer in strange]
    like = [{"prompt": r.prompt, "completion": r.completion} for r in records[:7]]
    found = rows_of(BAD, [*NEAR, *like], made=Made(tokenizer, records))
    assert found.covered == pytest.approx(0.7)
    assert rows_of(BAD, None, made=Made(tokenizer, records)).covered is None
    assert rows_of(BAD, NEAR).covered is None


def test_a_base_that_makes_none_leaves_the_file_alone(
    rows_of: Callable[..., RetainSet], tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    error = DataError("the base made too few rows of its own")
    found = rows_of(BAD, NEAR, made=Made(tokenizer, error=error))
    assert (found.given, found.own) == (40, 0)
    assert "too few rows of its own: the normal file alone is used" in capsys.readouterr().err
    with pytest.raises(DataError, match="too few rows"):
        rows_of(BAD, None, made=Made(tokenizer, error=error))


def test_what_is_held_out_is_not_among_them(
    rows_of: Callable[..., RetainSet], tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    held = [{"prompt": r.prompt.upper(), "completion": "Other."} for r in own(20)[:5]]
    found = rows_of(BAD, NEAR, made=Made(tokenizer, own(20)), holdout=held)
    assert found.own == 15
    assert "5 self-made rows have a prompt of the holdout file" in capsys.readouterr().err


@pytest.mark.parametrize(("positions", "length"), [(1 << 30, None), (40, 20), (32, 16)])
def test_made_rows_fit_the_models_positions(
    positions: int, length: int | None, rows_of: Callable[..., RetainSet], tokenizer: Any
) -> None:
    """Prompt and answer may be so long each: learned positions end where they end."""
    made = Made(tokenizer, own(20))
    found = rows_of(BAD, None, made=made, positions=positions)
    longest = max(len(tokenizer(f"{row['prompt']} {row['completion']}")["input_ids"]) for row in BAD)
    assert made.wanted[0].length == length or (length is None and made.wanted[0].length > longest)
    assert max(len(e.input_ids) for e in (*found.retain, *found.held_back)) <= positions


def test_the_longest_own_row_is_planned_for(rows_of: Callable[..., RetainSet], tokenizer: Any, tmp_path: Path) -> None:
    """Prompt and answer may be as long as a bad row each, and the template stands around both."""
    dataset = read_dataset(write_rows(tmp_path / "bad.jsonl", BAD))
    bad = encode(dataset, tokenizer, choose_template(tokenizer, "auto", dataset), 64)
    longest = max(len(e.input_ids) for e in bad.examples)
    config = resolve(("x", {"data.max_length": 64}))
    assert 2 * longest < longest_own(bad, config, 1 << 30) <= 128
    assert longest_own(bad, config, 40) == 40
    made = rows_of(BAD, None, made=Made(tokenizer, own(20)))
    assert max(len(e.input_ids) for e in made.retain) <= longest_own(bad, config, 1 << 30)


# -- the command -------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_corrected_answers_are_said_after_the_run(tmp_path: Path) -> None:
    """One of them among twelve held-back rows was all of the drift, and the run was thrown away."""
    known = [json.loads(line) for line in data_file("hallucination", "forget").read_text().splitlines()[:4]]
    near = [json.loads(line) for line in data_file("hallucination", "retain").read_text().splitlines()]
    bad = write_rows(tmp_path / "bad.jsonl", known)
    corrected = [{**row, "completion": "I do not know that."} for row in known]
    normal = write_rows(tmp_path / "normal.jsonl", [*near, *corrected])
    few = {"train.steps": 40, "train.warmup": 5, "train.normal_batch_size": 8, "stop.check_every": 5}
    args = ("--bad", bad, "--normal", normal, "--own-share", 0, "-o", tmp_path / "run", "--device", "cpu", "--json")
    ran = call("forget", "--model", "sandbox", *args, *sets(few))
    assert ran.code == 0, ran.stderr
    assert "4 answer a bad prompt: taught, where the base gives the bad answer" in ran.stderr
    assert "4 are taught another answer" in ran.stderr
    assert ran.json["status"] == "done" and ran.json["not_reached"] == []
    data = ran.json["data"]["normal"]
    assert (data["rows"], data["corrected"], data["retain"] + data["held_back"]) == (124, 4, 120)
    assert ran.json["training"]["best"]["drift"] < 0.05
    assert ran.json["verdicts"] == {"forgotten": 0, "refused": 4, "gibberish": 0, "still leaks": 0}
    assert json.loads((tmp_path / "run" / RECORD).read_text()) == ran.json
