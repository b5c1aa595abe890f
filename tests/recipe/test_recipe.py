"""Recipes: what a file may say, where the data comes from, which stages are repeated, and each one on the sandbox."""

from __future__ import annotations

import json
import stat
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, call, sets, write_rows

from qunlearn.config.resolve import resolve
from qunlearn.config.settings import Config
from qunlearn.data.records import read_dataset
from qunlearn.errors import ConfigError, DataError, OutputError, ResumeError
from qunlearn.recipe import fetch
from qunlearn.recipe import recipe_file as book
from qunlearn.recipe import run as command
from qunlearn.recipe.progress import LEDGER, Ledger, key_of
from qunlearn.recipe.speed import measured_flops
from qunlearn.recipe.stages import STAGES, Order, Stage
from qunlearn.recipe.verdict import judge
from qunlearn.sandbox import KINDS, data_file
from qunlearn.training.prepare import Prepared
from qunlearn.utils.lock import locked

RECIPES = ("code", "copyright", "hallucination", "harmfulness")
FEW = {**QUICK, "train.steps": 6, "stop.table_rows": 4, "stop.probe_rows": 4, "data.normal_count": 24}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refused_data(folder: Path) -> tuple[Path, Path]:
    """A bad file, and a normal file that has one of its rows."""
    rows = [{"prompt": f"What is {i}?", "completion": f"It is number {i}."} for i in range(8)]
    return write_rows(folder / "bad.jsonl", rows), write_rows(folder / "normal.jsonl", rows[:1] * 4)


# -- the files -------------------------------------------------------------------------------------------


def test_every_kind_of_the_sandbox_has_its_recipe() -> None:
    assert tuple(book.names()) == RECIPES
    assert {book.read(name).sandbox for name in RECIPES} == set(KINDS)
    ran = call("recipe", "list", "--json")
    assert [recipe["name"] for recipe in ran.json] == list(RECIPES)
    assert all(name in call("recipe", "list").stdout for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_configuration_too(name: str, tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"  # where docs/guide/recipes.md points
    assert call("recipe", "show", name).stdout == path.read_text(encoding="utf-8")
    ran = call("forget", "-c", path, "--dry-run", "--json", "-o", tmp_path / "run")
    assert ran.code == 0, ran.stderr
    assert ran.json["config"]["data"]["bad"] == f"sandbox:{book.read(name).sandbox}/forget"


def test_a_copy_is_run_by_its_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    assert call("recipe", "copy", "code", "-o", mine).code == 0
    mine.write_text(mine.read_text(encoding="utf-8") + "train:\n  steps: 7\n", encoding="utf-8")
    recipe = book.read(str(mine))
    assert (recipe.name, recipe.settings["train.steps"]) == ("mine", 7)
    assert (ran := call("recipe", "copy", "code", "-o", mine)).code == 9 and "exists" in ran.stderr


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  suite: code", "  suit: code", "unknown key 'recipe.suit'; did you mean 'suite'?"),
        ("  suite: code", "  suite: nose", "recipe.suite must be one of"),
        ("    limit: 2000", "    limits: 2000", "unknown key 'recipe.bad.limits'; did you mean 'limit'?"),
        ("    limit: 2000", "    limit: many", "recipe.bad.limit must be a whole number"),
        ("format: preference", "format: pref", "recipe.bad.format must be one of"),
        ("  sandbox: code", "  sandbox: sand", "recipe.sandbox must be one of"),
        ("recipe:", "recipes:", "has no section 'recipe'"),
        ("model:", "modle:", "did you mean 'model'"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    text = book.find("code").read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        book.read(str(path))
    assert says in str(caught.value) + str(caught.value.hint)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["show", "halucination"], 2, "did you mean hallucination?"),
        (["run", "none.yaml"], 2, "no recipe"),
        (["run", "code", "--set", "train.stepz=3"], 2, "did you mean 'train.steps'?"),
        (["run", "code", "--base", "fast"], 2, "unknown base"),
        (["run", "code", "--bad", "none.jsonl", "-o", "out"], 3, "no such file"),
        (["run", "code", "-o", "full"], 9, "no recipe was run in it"),
        (["run", "code", "--vram", "3MiB", "-o", "out"], 4, "memory plan"),
        (["run", "code", "--model", "nowhere/at-all", "-o", "out"], 3, "the package `datasets`"),
    ],
)
def test_wrong_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], code: int, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    ran = call("recipe", *argv)
    assert (ran.code, says in ran.stderr) == (code, True), ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_files_that_a_copied_recipe_names_are_the_ones_that_are_used(tmp_path: Path) -> None:
    """`data.bad` of the file was read and forgotten: the run trained on the sandbox's rows."""
    recipe = book.read("code")

    def settings(**data: str) -> Config:
        return resolve(("", {"model.name": "m", "data.bad": "sandbox:code/forget"}), ("", data))

    assert fetch.named(fetch.Given(), recipe, settings()) == fetch.Given()
    wished = settings(**{"data.bad": "mine.jsonl", "data.normal": "sandbox:harm/retain", "data.holdout": "near.csv"})
    found = fetch.named(fetch.Given(holdout=Path("flag.jsonl")), recipe, wished)
    assert found.files == {
        "bad": Path("mine.jsonl"), "normal": data_file("harm", "retain"), "holdout": Path("flag.jsonl")
    }  # fmt: skip
    with pytest.raises(ConfigError, match="overwrite"):
        fetch.named(fetch.Given(), recipe, settings(**{"output.overwrite": "true"}))


@pytest.mark.parametrize("how", ["file", "--set"])
def test_a_named_file_that_is_not_there_is_missed(how: str, tmp_path: Path) -> None:
    mine, out = tmp_path / "mine.yaml", tmp_path / "out"
    text = book.find("code").read_text(encoding="utf-8")
    argv = ["-o", out]
    if how == "file":
        text = text.replace("sandbox:code/forget", "nowhere.jsonl") + f"output:\n  folder: {out}\n"
        argv = []
    mine.write_text(text, encoding="utf-8")
    ran = call("recipe", "run", mine, *argv, *(["--set", "data.bad=nowhere.jsonl"] if how == "--set" else []))
    assert ran.code == 3 and "nowhere.jsonl" in ran.stderr, ran.stderr


# -- data ------------------------------------------------------------------------------------------------


def test_the_sandbox_data(tmp_path: Path) -> None:
    counts = fetch.fetch(book.read("harmfulness"), fetch.Given(), tmp_path / "data", sandbox=True)
    assert counts["bad.jsonl"] == counts["paraphrase.jsonl"] == counts["reworded.jsonl"] == 40
    found = fetch.splits(tmp_path / "data")
    assert list(found) == ["forget", "paraphrase", "forget_reworded", "retain", "holdout", "general"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in found.values())
    assert found["forget"].read_bytes() == data_file("harm", "forget").read_bytes()
    bad, reworded = rows_of(found["forget"]), rows_of(found["forget_reworded"])
    for old, new in zip(bad, reworded, strict=True):
        assert new["prompt"].endswith(old["prompt"]) and new["prompt"] != old["prompt"]
        assert new["completion"] == old["completion"]


def test_rows_of_ones_own_are_divided_by_prompt(tmp_path: Path) -> None:
    rows = [{"question": f"q {i // 2}", "answer": f"a {i}", "note": i} for i in range(100)]
    bad = write_rows(tmp_path / "mine.jsonl", rows)
    counts = fetch.fetch(book.read("code"), fetch.Given(bad, test_percent=30), tmp_path / "data", sandbox=False)
    train, test = (rows_of(tmp_path / "data" / name) for name in ("bad.jsonl", "unseen.jsonl"))
    assert counts == {"bad.jsonl": 70, "unseen.jsonl": 30, "reworded.jsonl": 70}
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert sorted(row["note"] for row in train + test) == list(range(100))
    everything = fetch.Given(bad, test_percent=0)
    assert fetch.fetch(book.read("code"), everything, tmp_path / "data", sandbox=False)["bad.jsonl"] == 100
    assert "forget_unseen" not in fetch.splits(tmp_path / "data")


def test_dialogues_and_texts_keep_their_shape(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hm?"},
        {"role": "assistant", "content": "No."},
    ]
    for rows, shape in (([{"messages": turns}, {"messages": turns[1:]}], "messages"), ([{"text": "a b"}], "text")):
        bad = write_rows(tmp_path / f"{shape}.jsonl", rows)
        fetch.fetch(book.read("code"), fetch.Given(bad, test_percent=0), tmp_path / "data", sandbox=False)
        written, given = read_dataset(tmp_path / "data" / "bad.jsonl"), read_dataset(bad)
        assert written.shape == shape
        assert [(r.turns, r.completion) for r in written.records] == [(r.turns, r.completion) for r in given.records]


def test_a_text_of_ones_own_is_cut_up(tmp_path: Path) -> None:
    book_file, other = tmp_path / "book.txt", tmp_path / "other.txt"
    book_file.write_text(" ".join(f"Word{i} goes on." for i in range(2000)), encoding="utf-8")
    other.write_text(" ".join(f"Other{i} stays here." for i in range(2000)), encoding="utf-8")
    given = fetch.Given(book_file, other)
    fetch.fetch(book.read("copyright"), given, tmp_path / "data", sandbox=False)
    found = fetch.splits(tmp_path / "data")
    assert list(found) == ["forget", "forget_unseen", "forget_reworded", "retain", "holdout"]
    assert all(row["completion"].startswith(" ") for row in rows_of(found["forget"]))


PUBLIC: dict[str, Callable[[int], dict[str, Any]]] = {
    "pminervini/HaluEval": lambda i: {"question": f"q {i}", "right_answer": "yes", "hallucinated_answer": f"no {i}"},
    "truthfulqa/truthful_qa": lambda i: {"question": f"t {i}", "best_answer": f"b {i}", "incorrect_answers": ["c"]},
    "PKU-Alignment/PKU-SafeRLHF": lambda i: {
        "prompt": f"p {i}",
        "response_0": "safe",
        "response_1": f"unsafe {i}",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
    },
    "emozilla/pg19": lambda i: {"text": " ".join(f"Book{i}word{j} goes on." for j in range(4000))},
    "CyberNative/Code_Vulnerability_Security_DPO": lambda i: {
        "question": f"q {i}",
        "chosen": "x",
        "rejected": f"y {i}",
    },
    "sahil2801/CodeAlpaca-20k": lambda i: {"instruction": f"i {i}", "input": "", "output": f"o {i}"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_public_data_of_a_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with the published fields, in place of the hub: every recipe makes four splits of them."""

    def load_dataset(dataset: str, subset: str | None, *, split: str, streaming: bool) -> Any:
        return (PUBLIC[dataset](i) for i in range(200))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    recipe = book.read(name)
    fetch.fetch(recipe, fetch.Given(), tmp_path / "data", sandbox=False)
    found = fetch.splits(tmp_path / "data")
    assert list(found) == ["forget", "forget_unseen", "forget_reworded", "retain", "holdout"]
    bad, normal = (
        rows_of(found[a]) + rows_of(found[b]) for a, b in (("forget", "forget_unseen"), ("retain", "holdout"))
    )
    if name == "copyright":
        assert all("Book0word" in row["prompt"] for row in bad)
        assert {row["prompt"][:5] for row in normal} == {"Book1", "Book2", "Book3", "Book4"}
    else:
        assert len(bad) == len(normal) == 200
        assert all(row["completion"].startswith(("no", "unsafe", "y")) for row in bad)
    # Every fifth prompt is asked unseen; by a hash, so within five standard deviations.
    share = len(rows_of(found["forget_unseen"])) / len(bad)
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / len(bad)) ** 0.5


def test_normal_data_of_ones_own_on_the_sandbox(tmp_path: Path) -> None:
    given = fetch.Given(normal=data_file("hallucination", "retain"))
    fetch.fetch(book.read("code"), given, tmp_path / "data", sandbox=True)
    found = fetch.splits(tmp_path / "data")
    assert found["retain"].name == fetch.NORMAL
    assert found["holdout"].read_bytes() == data_file("code", "holdout").read_bytes()


def test_what_is_measured_must_not_be_given(tmp_path: Path) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(10)])
    same = write_rows(
        tmp_path / "same.jsonl", [{"prompt": "new", "completion": "n"}, {"prompt": "Q 3", "completion": "x"}]
    )
    recipe = book.read("code")
    with pytest.raises(DataError, match="1 prompts are in") as caught:
        fetch.fetch(recipe, fetch.Given(bad, paraphrase=same, test_percent=0), tmp_path / "data", sandbox=False)
    assert "paraphrase.jsonl:2" in str(caught.value)
    with pytest.raises(DataError, match="prompts are in"):
        given = fetch.Given(bad, normal=same, holdout=same, test_percent=0)
        fetch.fetch(recipe, given, tmp_path / "data", sandbox=False)
    write_rows(same, [{"prompt": "q 4", "completion": "A 4"}, {"prompt": "z", "completion": "z"}])
    with pytest.raises(DataError, match="1 rows are in"):
        fetch.fetch(recipe, fetch.Given(bad, normal=same, test_percent=0), tmp_path / "data", sandbox=False)


# -- stages ----------------------------------------------------------------------------------------------


def test_a_ledger_belongs_to_one_story(tmp_path: Path) -> None:
    folder, story = tmp_path / "run", {"recipe": "code", "model": "sandbox"}
    ledger = Ledger.open(folder, story)
    key = key_of("", "fetch", {"a": 1})
    assert not ledger.done("fetch", key, ())
    ledger.keep("fetch", key, {"rows": 3}, 1.25)
    assert stat.S_IMODE((folder / LEDGER).stat().st_mode) == 0o600
    again = Ledger.open(folder, story)
    assert again.done("fetch", key, (LEDGER,))
    assert not again.done("fetch", key, (LEDGER, "gone"))
    assert not again.done("fetch", key_of("", "fetch", {"a": 2}), ())
    with pytest.raises(OutputError, match="another story was told"):
        Ledger.open(folder, {**story, "model": "llama-7b"})
    (folder / LEDGER).write_text("{", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be read"):
        Ledger.open(folder, story)
    (folder / LEDGER).write_text(json.dumps({"story": story, "stages": {"fetch": []}}), encoding="utf-8")
    with pytest.raises(OutputError, match="fetch is not an object"):
        Ledger.open(folder, story)


def test_each_bad_file_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of the second took the place of those of the first."""
    assert command.default_folder("code", "org/m") == Path("runs/code-m")
    assert command.default_folder("code", "org/m", Path("x/my rows.jsonl.gz")) == Path("runs/code-m-my-rows")
    toy, one = Toy(monkeypatch), fetch.Given(tmp_path / "a" / "bad.jsonl")
    assert toy.run(tmp_path / "out", one) == ["one", "two", "three"]
    assert toy.run(tmp_path / "out", one) == []
    with pytest.raises(OutputError, match="another story was told") as caught:
        toy.run(tmp_path / "out", fetch.Given(tmp_path / "b" / "bad.jsonl"))
    assert str(one.bad) in str(caught.value) and caught.value.hint == "choose another --output"


class Toy:
    """Three stages that write their names down, and can be told to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.inputs = {"one": 1, "two": 1, "three": 1}
        self.fails: BaseException | None = None
        stages = tuple(
            Stage(name, name, self._work(name), lambda _, name=name: self.inputs[name], (f"{name}.txt",))
            for name in self.inputs
        )
        monkeypatch.setattr(command, "STAGES", stages)

    def _work(self, name: str) -> Callable[[Order], Mapping[str, Any]]:
        def work(order: Order) -> Mapping[str, Any]:
            self.calls.append(name)
            if name == "two" and self.fails is not None:
                raise self.fails
            order.folder.mkdir(exist_ok=True)
            (order.folder / f"{name}.txt").touch()
            return {"line": "verdict", "report": "none", "verdict": {"level": "forgotten"}}

        return work

    def run(self, folder: Path, given: fetch.Given | None = None) -> list[str]:
        order = Order(book.read("code"), resolve(("", {"model.name": "sandbox"})), folder, given or fetch.Given())
        self.calls = []
        result = command.run(order, to_stdout=False)
        assert result["status"] == "forgotten"
        return self.calls


def test_a_stage_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, folder = Toy(monkeypatch), tmp_path / "run"
    toy.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        toy.run(folder)
    assert toy.calls == ["one", "two"]
    toy.fails = None
    assert toy.run(folder) == ["two", "three"]
    assert toy.run(folder) == []
    toy.inputs["three"] = 2
    assert toy.run(folder) == ["three"]
    (folder / "two.txt").unlink()
    assert toy.run(folder) == ["two", "three"]
    toy.inputs["one"] = 2
    toy.fails = DataError("no")
    with pytest.raises(DataError):
        toy.run(folder)
    toy.fails = None
    assert toy.run(folder) == ["two", "three"]  # and `three` is not taken for done with the old inputs


def prepared(request: Any) -> Any:
    return Prepared(request, None, None, None, None)  # type: ignore[arg-type]


def test_an_interrupted_run_is_no_end_of_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while training leaves a run folder whose record says so; the stage is done again."""
    import qunlearn.training.forget

    monkeypatch.setattr("qunlearn.training.prepare.prepare", prepared)
    monkeypatch.setattr(qunlearn.training.forget, "forget", lambda ready: {"status": "interrupted"})
    settings = resolve(("", {"model.name": "sandbox"}))
    order = Order(book.read("code"), settings, tmp_path, fetch.Given())
    fetch.fetch(order.recipe, order.given, tmp_path / "data", sandbox=True)
    stage = next(stage for stage in STAGES if stage.name == "forget")
    with pytest.raises(KeyboardInterrupt):
        stage.work(order)


def test_what_the_stages_measure_the_run_does_not_measure_again(tmp_path: Path) -> None:
    """Its own before/after table is a look where there is a holdout; without one the verdict is taken from it."""
    settings = resolve(("", {"model.name": "sandbox"}))
    order = Order(book.read("code"), settings, tmp_path, fetch.Given())
    assert order.config.stop.table_rows == settings.stop.table_rows
    fetch.fetch(order.recipe, order.given, tmp_path / "data", sandbox=True)
    assert order.config.stop.table_rows == 16
    asked = resolve(("", {"model.name": "sandbox", "stop.table_rows": 50}))
    assert Order(order.recipe, asked, tmp_path, fetch.Given()).config.stop.table_rows == 50


def test_an_unfinished_run_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained before an interruption is not lost; where it no longer fits, the run starts anew."""
    import qunlearn.training.forget

    seen: list[bool] = []

    def forget(ready: Any) -> dict[str, Any]:
        seen.append(ready.request.resume)
        if ready.request.resume and len(seen) > 2:
            raise ResumeError("made from other data")
        return {"status": "done", "training": {"steps": 1, "seconds": 1.0}}

    monkeypatch.setattr("qunlearn.training.prepare.prepare", prepared)
    monkeypatch.setattr(qunlearn.training.forget, "forget", forget)
    order = Order(book.read("code"), resolve(("", {"model.name": "sandbox"})), tmp_path, fetch.Given())
    fetch.fetch(order.recipe, order.given, tmp_path / "data", sandbox=True)
    stage = next(stage for stage in STAGES if stage.name == "forget")
    stage.work(order)
    (tmp_path / ".run.unfinished").mkdir()
    stage.work(order)
    assert seen == [False, True]
    stage.work(order)
    assert seen == [False, True, True, False]


def test_the_speed_is_that_of_a_matrix_product() -> None:
    """Within what a CPU or a GPU can do: 10 MFLOP/s to 10 PFLOP/s."""
    assert 1e7 < measured_flops("cpu") < 1e16


def test_rows_that_were_edited_are_other_rows(tmp_path: Path) -> None:
    """All that was looked at was whether the files were there: the stages behind them were "done before"."""
    order = Order(book.read("code"), resolve(("", {"model.name": "sandbox"})), tmp_path, fetch.Given())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.jsonl").write_text("{}\n", encoding="utf-8")
    plan = next(stage for stage in STAGES if stage.name == "plan")
    before = key_of(plan.inputs(order))
    assert key_of(plan.inputs(order)) == before
    (tmp_path / "data" / "bad.jsonl").write_text("{ }\n", encoding="utf-8")
    assert key_of(plan.inputs(order)) != before


def test_an_order_gives_the_run_its_data(tmp_path: Path) -> None:
    settings = resolve(
        ("", {"model.name": "m", "data.prompt_field": "q", "data.bad": "elsewhere", "data.holdout": "h"})
    )
    order = Order(book.read("code"), settings, tmp_path, fetch.Given())
    assert (order.config.data.bad, order.config.data.normal) == (str(tmp_path / "data" / "bad.jsonl"), None)
    assert order.config.data.holdout is None
    assert (order.config.data.prompt_field, order.config.output.folder) == (None, str(tmp_path / "run"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / fetch.NORMAL).touch()
    assert order.config.data.normal == str(tmp_path / "data" / fetch.NORMAL)
    assert order.settings == settings != Config()


# -- the verdict -----------------------------------------------------------------------------------------


def measured(subject: str, **splits: Mapping[str, float]) -> dict[str, Any]:
    return {
        "measures": {
            split: {name: {subject: {"mean": value, "n": 40}} for name, value in found.items()}
            for split, found in splits.items()
        }
    }


@pytest.mark.parametrize(
    ("unseen", "merged_unseen", "kept", "merged_kept", "level"),
    [
        (0.05, 0.0, 0.95, 0.96, "forgotten"),
        (0.0, 0.0, 0.95, 0.9, "costly"),
        (0.06, 0.0, 1.0, 1.0, "remembered"),
        (0.0, 0.06, 1.0, 1.0, "remembered"),
    ],
)
def test_levels(unseen: float, merged_unseen: float, kept: float, merged_kept: float, level: str) -> None:
    base = measured("base", forget={"leaks": 1.0}, paraphrase={"leaks": 0.9}, holdout={"exact_match": 0.8})
    run = measured(
        "adapter", forget={"leaks": 0.0}, paraphrase={"leaks": unseen}, holdout={"exact_match": 0.8 * kept + 1e-9}
    )
    merged = measured(
        "base", forget={"leaks": 0.0}, paraphrase={"leaks": merged_unseen}, holdout={"exact_match": 0.8 * merged_kept}
    )
    verdict = judge(base, run, merged, {})
    assert verdict.level == level
    assert verdict.adapter.kept == pytest.approx(kept) and verdict.merged.kept == pytest.approx(merged_kept)
    assert f"adapter {100 * unseen:.1f} %, merged {100 * merged_unseen:.1f} %" in verdict.line


@pytest.mark.parametrize("where", ["adapter", "merged"])
def test_bad_rows_that_come_back_count_beside_other_wordings(where: str) -> None:
    """Rewordings that the base never answered pass by themselves."""
    base = measured("base", forget={"leaks": 1.0}, paraphrase={"leaks": 0.0}, holdout={"exact_match": 1.0})
    back, gone = {"leaks": 1.0}, {"leaks": 0.0}
    more = {"paraphrase": gone, "holdout": {"exact_match": 1.0}}
    run = measured("adapter", forget=back if where == "adapter" else gone, **more)
    merged = measured("base", forget=back if where == "merged" else gone, **more)
    verdict = judge(base, run, merged, {})
    assert verdict.level == "remembered" and "bad and unseen prompts" in verdict.line


def test_a_base_that_never_said_it_is_no_success() -> None:
    base = measured("base", forget={"leaks": 0.0, "probability": 0.2}, holdout={"exact_match": 1.0})
    run = measured("adapter", forget={"leaks": 0.0, "probability": 0.001}, holdout={"exact_match": 1.0})
    verdict = judge(base, run, measured("base", forget={"leaks": 0.0}, holdout={"exact_match": 1.0}), {})
    assert verdict.level == "never known"
    assert "was 0.2 and is 0.001" in verdict.line


def test_without_neighbours_the_held_back_rows_are_judged() -> None:
    base, run = measured("base", forget={"leaks": 1.0}), measured("adapter", forget={"leaks": 0.0})
    record = {
        "before": {"normal, held back": {"exact_match": 0.8}},
        "after": {"normal, held back": {"exact_match": 0.6}},
    }
    verdict = judge(base, run, measured("base", forget={"leaks": 0.0}), record)
    assert (verdict.level, verdict.adapter.kept) == ("costly", pytest.approx(0.75))
    assert "held-back normal rows" in verdict.line


def test_a_recipe_that_measured_nothing_to_keep_claims_neither_cost_nor_none() -> None:
    base, run = measured("base", forget={"leaks": 1.0}), measured("adapter", forget={"leaks": 0.0})
    verdict = judge(base, run, measured("base", forget={"leaks": 0.0}), {})
    assert verdict.level == "cost unknown" and "not measured" in verdict.line


def test_a_base_that_answers_in_its_own_words_is_judged_by_them() -> None:
    base = measured("base", forget={"leaks": 1.0}, holdout={"exact_match": 0.02, "rouge_recall": 0.5})
    run = measured("adapter", forget={"leaks": 0.0}, holdout={"exact_match": 0.0, "rouge_recall": 0.49})
    assert judge(base, run, run, {}).adapter.kept == pytest.approx(0.98)


# -- the whole story -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_on_the_sandbox(name: str, tmp_path: Path) -> None:
    """From data to verdict with few steps and few rows; a second call does nothing and says the same."""
    folder = tmp_path / "story"
    argv = ["recipe", "run", name, "-o", folder, "--device", "cpu", "--rows", 4, "--json", *sets(FEW)]
    ran = call(*argv)
    assert ran.code in (0, 5), ran.stderr
    stages = json.loads((folder / LEDGER).read_text(encoding="utf-8"))["stages"]
    assert list(stages) == [stage.name for stage in STAGES]
    assert stages["base"]["result"]["forget"]["leaks"] == {"base": 1.0}
    assert stages["paraphrase"]["result"].keys() == {"paraphrase", "forget_reworded"}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "sandbox" in page and stat.S_IMODE((folder / "report.html").stat().st_mode) == 0o600
    assert (folder / "merged" / "model.safetensors").is_file()
    assert "verdict: " in stages["report"]["result"]["line"]
    assert stages["report"]["result"]["audit"].startswith("audit (quick, beside placebo facts): ")
    assert "attacks beat their control" in page or "beat its control" in page
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = call(*argv)
    assert again.stderr.count("done before") == len(STAGES)
    assert again.code == ran.code
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.slow
def test_rows_of_ones_own_from_end_to_end(tmp_path: Path) -> None:
    """A file of bad rows alone: the base makes its own normal data, a share of the prompts is asked unseen."""
    argv = ["--bad", data_file("code", "forget"), "--rows", 4, "--device", "cpu", *sets(FEW)]
    ran = call("recipe", "run", "code", "-o", tmp_path / "story", *argv)
    assert ran.code in (0, 5), ran.stderr
    assert "verdict: " in ran.stdout and "held-back normal rows" in ran.stdout
    assert len(rows_of(tmp_path / "story" / "data" / "unseen.jsonl")) == 8


# -- what is the user's ------------------------------------------------------------------------------------


def test_a_folder_in_which_another_recipe_is_at_work_is_left_alone(tmp_path: Path) -> None:
    """The refused one had put its own rows in the place of those that the other was forgetting."""
    folder = tmp_path / "out"
    folder.mkdir()
    bad, normal = refused_data(tmp_path)
    with locked(folder, folder):
        ran = call("recipe", "run", "code", "--bad", bad, "--normal", normal, "-o", folder)
    assert ran.code == 9 and "another process" in ran.stderr
    assert not (folder / "data").exists()


def test_a_first_stage_that_failed_can_be_done_again(tmp_path: Path) -> None:
    bad, normal = refused_data(tmp_path)
    args = ("recipe", "run", "code", "--bad", bad, "--normal", normal, "--test-share", 0, "-o", tmp_path / "out")
    for _ in range(2):
        ran = call(*args)
        assert ran.code == 3 and "are in" in ran.stderr, ran.stderr
    assert (tmp_path / "out" / LEDGER).is_file()


def test_data_that_are_refused_replace_none(tmp_path: Path) -> None:
    bad, normal = refused_data(tmp_path)
    recipe, data = book.read("code"), tmp_path / "data"
    fetch.fetch(recipe, fetch.Given(bad, test_percent=0), data, sandbox=False)
    before = (data / "bad.jsonl").read_bytes()
    for _ in range(2):
        with pytest.raises(DataError):
            fetch.fetch(recipe, fetch.Given(bad, normal, test_percent=0), data, sandbox=False)
        assert (data / "bad.jsonl").read_bytes() == before
    fetch.fetch(recipe, fetch.Given(bad, test_percent=0), data, sandbox=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "data", "normal.jsonl"]


def test_a_file_of_the_recipes_own_folder_is_not_given_back_to_it(tmp_path: Path) -> None:
    data = tmp_path / "out" / "data"
    data.mkdir(parents=True)
    mine = write_rows(data / "bad.jsonl", [{"prompt": "Who?", "completion": "Me."}])
    Ledger(tmp_path / "out", {"recipe": "hallucination", "model": "sandbox"}).begin()
    ran = call("recipe", "run", "hallucination", "--bad", mine, "-o", tmp_path / "out")
    assert ran.code == 9 and "the recipe fills itself" in ran.stderr
    assert mine.is_file()
