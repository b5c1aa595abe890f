"""Rows that several processes make and score together are those of one process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from conftest import call, sets, write_rows
from launched import Call, launch

from qunlearn.cli.app import _IN_SEVERAL, app
from qunlearn.data.batch import ALL
from qunlearn.data.records import Record
from qunlearn.data.tokenize import Example
from qunlearn.errors import OutputError
from qunlearn.evaluation import scores
from qunlearn.model import device, generate
from qunlearn.model.generate import Asked, Sampling, generate_each
from qunlearn.model.load import Base
from qunlearn.model.policy import Policy
from qunlearn.model.reference import Cached, Live
from qunlearn.parallel.group import Group
from qunlearn.parallel.ranks import ALONE, current, joined_as
from qunlearn.sandbox import data_file
from qunlearn.utils.launch import count_here

BAD, NORMAL = data_file("hallucination", "forget"), data_file("hallucination", "retain")
GENERAL, COPIED = data_file("hallucination", "holdout"), data_file("copyright", "forget")


class _Told(Exception):
    """A process has said what it computed."""


class Replayed(Group):
    """One of several processes, played one after another: first each says its share, then the last hears them all."""

    def __init__(self, number: int, count: int, heard: list[bytes] | None = None) -> None:
        super().__init__(number, count, number)
        self.heard, self.said = heard, b""

    def from_main(self, compute: Callable[[], Any], read: Any = None) -> Any:
        told = json.loads(json.dumps(compute()))
        return read(told) if read else told

    def _all_told(self, data: bytes) -> list[bytes]:
        self.said = data
        if self.heard is None:
            raise _Told
        return self.heard


def in_turn(count: int, act: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """What comes of it in `count` processes, and what each of them had to say."""
    heard = []
    for number in range(count):
        one = Replayed(number, count)
        with joined_as(one), pytest.raises(_Told):
            act()
        heard.append(one.said)
    with joined_as(Replayed(count - 1, count, heard)):
        return act(), [json.loads(data) for data in heard]


def asked_of(base: Base) -> list[Asked]:
    """Greedy prompts of several batches, sampled ones of several, and none at all."""
    texts = [row["prompt"] for row in map(json.loads, Path(NORMAL).read_text().splitlines())][:30]
    prompts = [base.tokenizer(text)["input_ids"] for text in texts]
    return [
        Asked(prompts[:22], Sampling(10)),
        Asked(prompts[5:20], Sampling(8, 1.0, seed=3)),
        Asked([], Sampling(4)),
        Asked(prompts[20:], Sampling(8, 1.0, seed=4)),
        Asked(prompts[:3], Sampling(12)),
    ]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches of at most eight rows; the list gets the rows of each that is computed."""
    monkeypatch.setitem(generate._MOST_ROWS, "cpu", 8)
    seen: list[int] = []
    plain = generate._one_batch

    def counted(lm: Any, prompts: Sequence[Any], sampling: Sampling) -> list[list[int]]:
        seen.append(len(prompts))
        return plain(lm, prompts, sampling)

    monkeypatch.setattr(generate, "_one_batch", counted)
    return seen


@pytest.mark.parametrize("count", [2, 3, 7])
def test_whole_batches_are_divided_and_give_the_ids_of_one_process(
    count: int, new_base: Callable[..., Base], small_batches: list[int]
) -> None:
    base = new_base()
    alone = generate_each(base, asked_of(base))
    batches = sorted(small_batches)
    assert batches == sorted([8, 8, 6, 8, 7, 8, 2, 3])
    small_batches.clear()
    state = torch.get_rng_state()
    together, said = in_turn(count, lambda: generate_each(base, asked_of(base)))
    assert together == alone
    assert bool((torch.get_rng_state() == state).all())
    assert sum(bool(part) for part in said) == min(count, 6)  # six pieces: those of one seed stay together
    assert max(sum(map(len, part)) for part in said) < 50  # of 50 rows none makes all


def test_what_is_heard_is_how_many_of_its_own_are_done(new_base: Callable[..., Base], small_batches: list[int]) -> None:
    base, heard = new_base(), []
    generate_each(base, asked_of(base), heard.append)
    assert heard == sorted(heard) and heard[-1] == 50 == sum(small_batches)


def test_outputs_of_several_sets_are_those_of_each_alone(new_base: Callable[..., Base]) -> None:
    base = new_base()
    rows = [Example((5 + i, 9, 11, 13 + i), 2, 4, 2, Record((), "x", i, {})) for i in range(6)]
    sets_of = [rows[:2], [], rows[2:]]
    assert scores.outputs_each(base, sets_of) == [scores.greedy_outputs(base, of) for of in sets_of]
    found, _ = in_turn(2, lambda: scores.outputs_each(base, sets_of))
    assert found == scores.outputs_each(base, sets_of)


def test_items_are_divided_by_what_they_cost() -> None:
    seen: list[list[int]] = []

    def twice(items: Sequence[int]) -> list[int]:
        seen.append([*items])
        return [2 * item for item in items]

    items = [10, 1, 2, 30, 4]
    found, _ = in_turn(2, lambda: current().divided(items, twice, costs=items))
    assert found == [20, 2, 4, 60, 8]
    assert seen[:2] == [[30], [10, 1, 2, 4]]
    assert ALONE.divided(items, twice, costs=items) == found


def test_the_processes_of_a_machine_fill_one_file(new_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """In shares: the file is that of one process, and a share that nobody filled is filled when all look."""
    policy = new_policy()
    rows = [Example(tuple(range(3, 9 + i)), 1, 9 + i - 3, 1, Record((), "x", i, {})) for i in range(12)]
    whole = Cached(tmp_path / "one", Live(policy, 24), rows)
    assert whole.fill() == whole.tokens
    shared = [Cached(tmp_path / "three", Live(policy, 24), rows) for _ in range(3)]
    shared[0].make()
    computed = [one.fill(share=(n, 3)) for n, one in enumerate(shared)]
    assert sum(computed) == whole.tokens and all(computed)
    assert shared[1].fill() == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "three").read_bytes()
    left = Cached(tmp_path / "left", Live(policy, 24), rows)
    done = left.fill(share=(0, 3))
    assert left.fill() == whole.tokens - done > 0
    a, b = (torch.cat(one.states(rows, [ALL] * len(rows))) for one in (left, whole))
    assert torch.equal(a, b)


def test_a_file_that_one_cannot_write_is_written_by_none() -> None:
    class Said(Group):
        def any(self, mine: bool) -> bool:
            return True

    def full() -> None:
        raise OutputError("the disk is full")

    with pytest.raises(OutputError, match="the disk is full"):
        Said(0, 2, 0).agreed(full)
    with pytest.raises(OutputError, match="another process could not write"):
        Said(1, 2, 1).agreed(lambda: 3)
    assert ALONE.agreed(lambda: 3) == 3


def test_how_many_are_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert count_here() == 1  # left over from elsewhere
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert count_here() == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert count_here() == 1


def _commands() -> list[str]:
    return sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [name for name in _commands() if name not in _IN_SEVERAL])
def test_every_other_command_refuses_a_launcher_once(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["fit"] if command == "guard" else ["run"] if command == "recipe" else []
    monkeypatch.setenv("RANK", "0")
    ran = call(command, *arguments)
    assert (ran.code, ran.stdout) == (2, "")
    assert f"{command} runs in one process; 2 were launched" in ran.stderr
    assert "without torchrun or accelerate launch" in ran.stderr
    monkeypatch.setenv("RANK", "1")
    ran = call(command, *arguments)
    assert (ran.code, ran.stdout, ran.stderr) == (2, "", "")


# -- with processes --------------------------------------------------------------------------------------

TINY = {
    "train.steps": 2,
    "train.max_tokens": 512,
    "stop.check_every": 2,
    "stop.probe_rows": 16,
    "stop.table_rows": 24,
    "lora.r": 4,
}


def run_line(folder: Path, bad: Path | str, *more: object, **settings: object) -> list[object]:
    changed = TINY | {key.replace("__", "."): value for key, value in settings.items()}
    return [
        *("forget", "--model", "sandbox", "--bad", bad, "-o", folder, "--device", "cpu", "--reference", "cached"),
        *(*sets(changed), *more),
    ]


def reference_files(folder: Path) -> list[str]:
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.safetensors"))


@pytest.mark.slow
def test_what_a_run_makes_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own rows of several turns, of prompts and of texts, sampled answers, other wordings, the reference's file."""
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: False)
    kinds: dict[str, tuple[Any, list[object], dict[str, Any]]] = {
        "rows": (BAD, [], {"data__normal_count": 300, "data__reworded": 8}),
        "texts": (COPIED, [], {"data__normal_count": 280, "data__reworded": 0}),
        "altpo": (BAD, ["--normal", NORMAL, "--objective", "altpo"], {"data__own_share": 0, "data__reworded": 0}),
    }
    for name, (bad, more, settings) in kinds.items():
        monkeypatch.setenv("QUNLEARN_CACHE", str(tmp_path / "cache-one"))
        assert call(*run_line(tmp_path / f"one-{name}", bad, *more, **settings)).code in (0, 5)
    monkeypatch.setenv("QUNLEARN_CACHE", str(tmp_path / "cache-two"))
    calls = [Call(run_line(tmp_path / name, bad, *more, **settings)) for name, (bad, more, settings) in kinds.items()]
    told = launch(2, tmp_path, calls)
    for n, name in enumerate(kinds):
        assert [process[n]["code"] in (0, 5) for process in told] == [True, True], told[0][n]["stderr"]
        assert told[1][n]["stderr"] + told[1][n]["stdout"] == ""
        records = [json.loads((tmp_path / run / "record.json").read_text()) for run in (name, f"one-{name}")]
        for key in ("before", "verdicts"):
            assert flat(records[0][key]) == pytest.approx(flat(records[1][key]), rel=1e-3)
        assert records[0]["data"]["bad"] == records[1]["data"]["bad"]
    for name in ("rows", "texts"):
        ours, theirs = ((tmp_path / run / "normal.jsonl").read_bytes() for run in (name, f"one-{name}"))
        assert ours == theirs and ours.count(b"\n") >= 280
        said = told[0][list(kinds).index(name)]["stderr"]
        assert "tokens computed by this process" in said
    files = reference_files(tmp_path / "cache-two")
    assert files == reference_files(tmp_path / "cache-one") and len(files) == 3


def flat(value: Any, at: str = "") -> dict[str, float]:
    """All numbers of a tree by where they are."""
    if isinstance(value, dict):
        return {place: number for key, inner in value.items() for place, number in flat(inner, f"{at}/{key}").items()}
    return {} if value is None else {at: value}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_eval_in_several(count: int, quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts, verdicts and numbers of one process; what the cache knows is told to all; errors are said once."""
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: False)
    rows = [json.loads(text) for text in Path(BAD).read_text().splitlines()][:12]
    wrong = write_rows(tmp_path / "wrong.jsonl", [{**row, "perturbed": ["Nothing.", "A cat."]} for row in rows])
    line: list[object] = [
        *("eval", quick_run, "--device", "cpu", "--forget", wrong, "--retain", NORMAL, "--holdout", GENERAL),
        *("--rows", 60, "--suite", "tofu", "--retrained-model", "sandbox-gold", "--json", "-o"),
    ]
    judged = [*("eval", quick_run, "--device", "cpu", "--suite", "llmu", "--harm-classifier", "sandbox", "-o")]
    one = call(*line, tmp_path / "one")
    assert one.code == 0, one.stderr
    assert call(*judged, tmp_path / "one").code == 0
    calls = [
        *(Call([*line, tmp_path / "several"]), Call([*line, tmp_path / "several"])),
        *(Call([*judged, tmp_path / "several"]), Call(["eval", tmp_path / "nowhere"])),
        Call(["eval", quick_run, "--device", "cpu", "-o", Path(wrong) / "in a file"]),
    ]
    told = launch(count, tmp_path, calls)
    assert [said["code"] for said in told[0]] == [0, 0, 0, told[0][3]["code"], 9], [s["stderr"] for s in told[0]]
    for process in told[1:]:
        assert {said["stdout"] + said["stderr"] for said in process} == {""}
    assert "known from before" not in told[0][0]["stderr"]
    assert "known from before" in told[0][1]["stderr"] and "error" in told[0][3]["stderr"]
    again = [json.loads(told[0][n]["stdout"]) for n in (0, 1)]
    assert flat(again[0]["measures"]) == flat(again[1]["measures"])
    assert flat(again[0]["measures"]) == pytest.approx(flat(one.json["measures"]), rel=1e-3)
    assert again[0]["verdicts"] == one.json["verdicts"] and again[0]["conclusion"] == one.json["conclusion"]
    ours, theirs = (json.loads((tmp_path / name / "eval.json").read_text())["suites"] for name in ("several", "one"))
    for suite in ("tofu", "llmu"):
        assert {s: [i["outputs"] for i in items] for s, items in ours[suite]["items"].items()} == {
            s: [i["outputs"] for i in items] for s, items in theirs[suite]["items"].items()
        }
    kept = [sorted(path.name.split("-")[0] for path in (tmp_path / n).rglob("*.jsonl")) for n in ("several", "one")]
    assert kept[0] == kept[1] != []
