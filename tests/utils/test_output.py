"""Outputs: what may be written where, what may be replaced, and that nothing of the user's is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import call, write_rows

from qunlearn.errors import OutputError
from qunlearn.utils import output, staging
from qunlearn.utils.file_names import ADAPTER, EVAL, EVAL_CACHE, RECORD, REPORT
from qunlearn.utils.output import AUDITS, GUARDS, INSIDE, MARK, MODELS, Place, default_folder, real, write_mark
from qunlearn.utils.staging import put_back, resumable, staged, staging_folder

OURS = json.dumps({"status": "done", "versions": {"qunlearn": "0.1.0"}})


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def refusal(place: Place) -> str:
    with pytest.raises(OutputError) as caught:
        place.check(0)
    return f"{caught.value} {caught.value.hint}"


def fill(place: Place) -> None:
    with staged(place) as stage:
        (stage / "config.json").write_text("new")


# -- what may be replaced ----------------------------------------------------------------------------------


def test_only_what_carries_our_mark_is_replaced(tmp_path: Path) -> None:
    """Names alone say nothing: a project of one's own has a config.json too, and data are called normal.jsonl."""
    project = folder(tmp_path / "project", config__json="{}", train__py="mine")
    assert "no qunlearn.json of ours" in refusal(Place(project, MARK, overwrite=True))
    (project / MARK).write_text('{"made_by": "someone", "contents": ["config.json", "train.py"]}')
    assert "of ours" in refusal(Place(project, MARK, overwrite=True))
    data = folder(tmp_path / "data", normal__jsonl="mine", report__html="mine", record__json="{}")
    assert "no record.json of ours" in refusal(Place(data, RECORD, overwrite=True))
    made = folder(tmp_path / "made", config__json="{}")
    write_mark(made)
    assert "not empty" in refusal(Place(made, MARK))
    Place(made, MARK, overwrite=True).check(0)
    assert "of ours" in refusal(Place(made, RECORD, overwrite=True))  # a run does not replace a merged model
    (made / "notes.txt").write_text("mine")
    assert "'notes.txt' is there too" in refusal(Place(made, MARK, overwrite=True))
    run = folder(tmp_path / "run", record__json=OURS, config__yaml="")
    Place(run, RECORD, overwrite=True).check(0)
    (run / "thesis.txt").write_text("mine")
    assert "thesis.txt" in refusal(Place(run, RECORD, overwrite=True))


def test_an_output_is_holds_and_lies_in_no_input(tmp_path: Path) -> None:
    base = folder(tmp_path / "models" / "base", config__json="{}")
    write_mark(base)  # a merged model that is a base now
    link = tmp_path / "link"
    link.symlink_to(base)
    inputs = (base, tmp_path / "models" / "bad.jsonl")
    for asked, words in (
        (base, "is an input"),
        (link, "is an input"),
        (base / ".." / "base", "is an input"),
        (base.parent, "holds"),
        (base / "adapter", "lies in"),
    ):
        assert words in refusal(Place(asked, MARK, True, inputs))
    Place(tmp_path / "models" / "other", MARK, True, inputs).check(0)


def test_what_came_there_meanwhile_is_not_deleted(tmp_path: Path) -> None:
    place = Place(tmp_path / "late", MARK)
    place.check(0)
    with pytest.raises(OutputError, match="not empty"), staged(place):
        folder(tmp_path / "late", notes__txt="mine")
    assert (tmp_path / "late" / "notes.txt").read_text() == "mine" and names(tmp_path) == ["late"]


# -- where it really is ------------------------------------------------------------------------------------


def test_a_link_to_another_disk_is_followed(tmp_path: Path) -> None:
    disk = folder(tmp_path / "disk" / "out")
    (tmp_path / "link").symlink_to(disk)
    assert staging_folder(tmp_path / "link").parent == disk.parent
    for _ in range(2):
        fill(Place(tmp_path / "link", MARK, overwrite=True))
    assert (tmp_path / "link").is_symlink() and names(disk) == ["config.json", MARK]
    assert names(disk.parent) == ["out"]
    (tmp_path / "dangling").symlink_to(tmp_path / "disk" / "new")
    fill(Place(tmp_path / "dangling", MARK))
    assert (tmp_path / "disk" / "new" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["here", "mount"])
def test_a_folder_that_cannot_be_renamed_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A mount point (docker -v), and the folder one is in."""
    out = folder(tmp_path / "out")
    (out / "lost+found").mkdir()
    if kind == "here":
        monkeypatch.chdir(out)
        asked = Path()
    else:
        for module in (output, staging):
            monkeypatch.setattr(module, "is_mount", lambda path: path == out)
        asked = out
    inode = out.stat().st_ino
    assert staging_folder(asked) == out / INSIDE
    fill(Place(asked, MARK))
    assert refusal(Place(asked, MARK)).count("not empty") == 1
    fill(Place(asked, MARK, overwrite=True))
    assert names(out) == ["config.json", "lost+found", MARK] and out.stat().st_ino == inode
    assert names(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_filled_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder(tmp_path / "out", config__json="old")
    write_mark(out)
    monkeypatch.chdir(out)
    real_rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == MARK and target.parent == out:
            raise OSError(errno.EIO, "Input/output error", str(target))
        return real_rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output"):
        fill(Place(Path(), MARK, overwrite=True))
    assert (out / "config.json").read_text() == "old"
    monkeypatch.undo()
    # Killed right after the old content was moved away: it is put back.
    old = folder(out / INSIDE / "run-old")
    for name in ("config.json", MARK):
        if (out / name).exists():
            (out / name).rename(old / name)
    put_back(old, out)
    assert (out / "config.json").read_text() == "old" and not old.exists()


def test_a_bound_folder_is_known_from_the_table_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder(tmp_path / "my out")
    line = f"36 35 98:0 /x {str(out).replace(' ', chr(92) + '040')} rw - ext4 /dev/sda rw\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: line)
    assert output.is_mount(out) and not output.is_mount(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250, "x" * 5000, "a\0b", "loop", "r\udce9n"])
def test_names_that_no_file_system_takes(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError):
        real(tmp_path / name)
    for command in (("export", tmp_path), ("data", "import", "alpaca", tmp_path / "no.jsonl")):
        assert call(*command, "-o", tmp_path / name).code in (2, 6, 9)


def test_a_default_name_is_never_too_long() -> None:
    assert len(default_folder("m" * 400, "b" * 400 + ".jsonl").name) < 120


# -- the commands ------------------------------------------------------------------------------------------


def test_forget_does_not_replace_its_own_input(quick_run: Path, tmp_path: Path) -> None:
    data = folder(tmp_path / "data", record__json=OURS, report__html="mine")
    rows = [{"prompt": f"What is {i}?", "completion": f"It is number {i}."} for i in range(4)]
    write_rows(data / "normal.jsonl", rows)
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "Who?", "completion": "Nobody."}])
    args = ("forget", "--model", "sandbox", "--bad", bad, "--normal", data / "normal.jsonl")
    ran = call(*args, "-o", data, "--overwrite", "--dry-run")
    assert ran.code == 9 and "holds" in ran.stderr
    # A finished run is left alone, whatever else is there.
    run = Path(shutil.copytree(quick_run, tmp_path / "run"))
    (run / "note.txt").write_text("mine")
    ran = call("forget", "-o", run, "--resume")
    assert ran.code == 0 and "is finished" in ran.stderr


def test_export_replaces_exports_and_follows_no_link(quick_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(quick_run, tmp_path / "run"))
    for _ in range(2):
        assert call("export", run, "-o", tmp_path / "out", "--overwrite").code == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert call("export", run, "-o", tmp_path / "out", "--overwrite").code == 9
    for inside in (run, run / ADAPTER, run / "export"):
        ran = call("export", run, "-o", inside, "--overwrite")
        assert ran.code == 9 and ("lies in" in ran.stderr or "is an input" in ran.stderr)
    (tmp_path / "key").write_text("secret")
    (run / ADAPTER / "notes.json").symlink_to(tmp_path / "key")
    ran = call("export", run, "-o", tmp_path / "leak")
    assert ran.code == 6 and "link" in ran.stderr and not (tmp_path / "leak").exists()


def test_merge_does_not_replace_the_base_or_the_run(quick_run: Path, sandbox_folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(sandbox_folder, tmp_path / "base"))
    for target in (base, base / "merged", quick_run, quick_run / ADAPTER):
        ran = call("merge", quick_run, "--model", base, "-o", target, "--overwrite", "--no-measure")
        assert (ran.code == 9 and "input" in ran.stderr) or "lies in" in ran.stderr, ran.stderr
    assert names(base) == names(sandbox_folder)


def test_an_import_leaves_an_interrupted_run_alone(tmp_path: Path) -> None:
    stage = folder(staging_folder(tmp_path / "a") / "checkpoints" / "step-00000002", state__json="{}")
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i} it is."} for i in range(4)]
    source = write_rows(tmp_path / "alpaca.jsonl", rows)
    assert call("data", "import", "alpaca", source, "-o", tmp_path / "a").code == 0
    assert names(stage) == ["state.json"]
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "rows.jsonl")
    assert call("data", "import", "alpaca", source, "-o", tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "rows.jsonl").is_file()


def test_a_report_replaces_reports_only(quick_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(quick_run, tmp_path / "run"))
    before = (run / RECORD).read_bytes()
    for name in (RECORD, "config.yaml", f"{ADAPTER}/adapter_model.safetensors"):
        ran = call("report", run, "-o", run / name, "--overwrite")
        assert ran.code == 9 and "belongs to the run" in ran.stderr
    assert (run / RECORD).read_bytes() == before
    thesis = tmp_path / "thesis.html"
    thesis.write_text("<html>mine")
    thesis.chmod(0o644)
    ran = call("report", run, "-o", thesis)
    assert ran.code == 9 and "no report of ours" in ran.stderr and thesis.read_text() == "<html>mine"
    assert call("report", run, "-o", thesis, "--overwrite").code == 0
    assert thesis.stat().st_mode & 0o777 == 0o600
    assert call("report", run, "-o", thesis).code == 0  # its own page it replaces unasked
    victim = tmp_path / "bashrc"
    victim.write_text("mine")
    (run / REPORT).symlink_to(victim)
    ran = call("report", run)
    assert ran.code == 9 and "is a link" in ran.stderr and victim.read_text() == "mine"
    assert call("report", run, "-o", tmp_path / ("x" * 300)).code == 9


@pytest.mark.parametrize("what", ["link", "cache", "foreign"])
def test_eval_writes_over_nothing_else(quick_run: Path, tmp_path: Path, what: str) -> None:
    run = Path(shutil.copytree(quick_run, tmp_path / "run", ignore=shutil.ignore_patterns(EVAL, EVAL_CACHE)))
    victim = tmp_path / "victim"
    victim.write_text("mine")
    if what == "link":
        (run / EVAL).symlink_to(victim)
    elif what == "cache":
        (run / EVAL_CACHE).symlink_to(folder(tmp_path / "elsewhere"))
    else:
        (run / EVAL).write_text('{"my": "results"}')
    ran = call("eval", run, "--rows", 1)
    assert ran.code == 9 and ("is a link" in ran.stderr or "not what `qunlearn eval` writes" in ran.stderr)
    assert victim.read_text() == "mine" and (what != "foreign" or "my" in (run / EVAL).read_text())


def test_eval_adds_to_no_other_output(quick_run: Path, tmp_path: Path) -> None:
    other, merged = folder(tmp_path / "other", record__json=OURS), folder(tmp_path / "merged", config__json="{}")
    write_mark(merged)
    for place in (other, other / "evals", merged):
        ran = call("eval", quick_run, "--rows", 1, "-o", place)
        assert ran.code == 9 and "another" in ran.stderr, ran.stderr
    assert names(other) == [RECORD] and names(merged) == ["config.json", MARK]
    output.check_added(tmp_path / "evals" / "x", ())
    output.check_added(other, (other,))
    output.check_added(other / "evals", (other,))


@pytest.mark.parametrize(
    ("module", "args"),
    [
        ("evaluation.request", ("eval", "sandbox", "--forget", "sandbox:code/forget")),
        ("evaluation.request", ("audit", "sandbox", "--control", "sandbox", "--forget", "sandbox:code/forget")),
        ("guard.request", ("guard", "fit", "--model", "sandbox", "--bad", "sandbox:code/forget")),
    ],
)
def test_an_output_is_checked_before_a_model_is_fetched(
    module: str, args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was fetched")

    monkeypatch.setattr(f"qunlearn.{module}.check_model", never)
    (tmp_path / "file").write_text("mine")
    ran = call(*args, "-o", tmp_path / "file" / "out")
    assert ran.code == 9 and "cannot be written" in ran.stderr, ran.stderr


def test_a_guard_is_opened_before_a_model_is_loaded(quick_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr("qunlearn.ask.load_base", never)
    ran = call("ask", quick_run, "Who?", "--guard", quick_run)
    assert ran.code == 6 and "no guard.json" in ran.stderr, ran.stderr


@pytest.mark.skipif(not hasattr(os, "setresuid") or os.geteuid() != 0, reason="needs to become somebody else")
def test_what_may_not_be_read_or_written_is_named(quick_run: Path) -> None:
    # Not in tmp_path, which nobody else may enter.
    place = Path(tempfile.mkdtemp())
    run = Path(shutil.copytree(quick_run, place / "run"))
    try:
        place.chmod(0o755)
        for path in (run, *run.rglob("*")):
            path.chmod(0o755)
        (run / RECORD).chmod(0)
        folder(place / "closed").chmod(0)
        os.setresuid(65534, 65534, 0)
        assert call("export", run, "-o", place / "out").code == 6
        assert call("runs", place).code == 0
        assert call("recipe", "run", "hallucination", "-o", place / "closed" / "x").code == 9
        assert call("merge", run, "-o", place / "closed" / "x").code in (6, 9)
        os.setresuid(0, 0, 0)
        (run / RECORD).chmod(0o644)
        os.setresuid(65534, 65534, 0)
        ran = call("eval", run, "--rows", 1)
        assert ran.code == 9 and "cannot be written" in ran.stderr
        assert call("report", run).code == 9
    finally:
        os.setresuid(0, 0, 0)
        shutil.rmtree(place)


def test_who_carries_a_run_that_is_not_finished_is_told(quick_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(quick_run, tmp_path / "run"))
    record = json.loads((run / RECORD).read_text())
    record["training"]["best"]["step"] = 0
    (run / RECORD).write_text(json.dumps({**record, "status": "interrupted"}))
    ran = call("export", run, "-o", tmp_path / "out")
    assert ran.code == 0 and "is not finished" in ran.stderr and "step 0" in ran.stderr


@pytest.mark.parametrize(("number", "name", "code"), [("EACCES", "/x", 9), ("EIO", "/x", 9), ("EBADF", None, 1)])
def test_a_fault_of_the_disk_is_none_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str, name: str | None, code: int
) -> None:
    def failing(_: Path) -> None:
        raise OSError(getattr(errno, number), "a test", name)

    monkeypatch.setattr("qunlearn.runs.list.find_runs", failing)
    ran = call("runs", tmp_path)
    assert ran.code == code and "a test" in ran.stderr and ("please report" in ran.stderr) == (code == 1)


def test_a_second_merge_does_not_replace_what_the_first_has_put_there(tmp_path: Path) -> None:
    """Both have seen an empty place; the second gets the lock when the first is done."""
    place = Place(tmp_path / "out", MARK)
    place.check(0)
    fill(place)
    with pytest.raises(OutputError, match="not empty"), resumable(place, {}):
        raise AssertionError("it began")
    assert names(tmp_path) == ["out"]


def test_a_demo_says_at_once_that_its_second_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr("qunlearn.recipe.demo.check_forget", never)
    folder(tmp_path / "run-merged", notes__txt="mine")
    assert call("demo", "-o", tmp_path / "run").code == 9


@pytest.mark.parametrize("wanted", [MODELS, GUARDS, AUDITS])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (MODELS, "config.json"),
        (MODELS, "adapter_config.json"),
        (MODELS, "model.gguf"),
        (GUARDS, "guard.json"),
        (AUDITS, "audit.json"),
    ],
)
def test_one_kind_of_output_does_not_replace_another(
    wanted: tuple[str, ...], kind: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    """`guard fit -o MERGED --overwrite` had deleted a merged model."""
    made = folder(tmp_path / "out", **{name: "{}"})
    write_mark(made)
    place = Place(made, MARK, True, (), wanted)
    if wanted == kind:
        place.check()
    else:
        with pytest.raises(OutputError, match="only its own kind"):
            place.check()
    assert (made / name).is_file()
