"""Files that others may have made: what has no end or no end of values is refused before it is read."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qunlearn.config.resolve import read_config_file
from qunlearn.data import file_types as packed
from qunlearn.data import whole_file as files
from qunlearn.data.records import read_dataset
from qunlearn.errors import AdapterError, DataError, ModelError, OutputError, QunlearnError
from qunlearn.evaluation.cache import Cache
from qunlearn.hub.preflight import preflight_folder, read_config
from qunlearn.hub.safetensors_file import read_tensors
from qunlearn.recipe.progress import LEDGER, Ledger
from qunlearn.report.read import read_story
from qunlearn.runs.folder import open_run
from qunlearn.runs.list import find_runs
from qunlearn.utils import limits as bounds
from qunlearn.utils.file_names import METRICS, RECORD
from qunlearn.utils.json_files import misfit, read_object

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no pipes or devices with names")


def hole(path: Path, size: int = 3 << 30) -> None:
    """A file of so many bytes that takes no disk."""
    with path.open("wb") as file:
        file.truncate(size)


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    os.mkfifo(path)


READERS: dict[str, tuple[str, Callable[[Path], object], type[QunlearnError]]] = {
    "any": ("x.json", lambda path: read_object(path, OutputError), OutputError),
    "model": ("config.json", lambda path: read_config(path.parent), ModelError),
    "adapter": ("adapter_config.json", lambda path: open_run(path.parent), AdapterError),
    "record": (RECORD, lambda path: read_story(path.parent), AdapterError),
    "evaluation": ("eval.json", lambda path: read_story(path.parent), AdapterError),
    "stages": (LEDGER, lambda path: Ledger.open(path.parent, {}), OutputError),
    "weights": ("x.safetensors", read_tensors, ModelError),
}


@pytest.mark.parametrize("make", [hole, zero, pipe])
@pytest.mark.parametrize("name", READERS)
def test_what_has_no_end_is_refused(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    """Devices, pipes and gigabytes were read until the memory ended, or waited for."""
    file, read, error = READERS[name]
    make(tmp_path / file)
    tracemalloc.start()
    try:
        with pytest.raises(error):
            read(tmp_path / file)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_small_file_of_many_values_is_not_made_into_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qunlearn.utils.json_files._MOST_VALUES", 1000)
    (tmp_path / "x.json").write_text("[" + "[]," * 1000 + "[]]", encoding="utf-8")
    with pytest.raises(OutputError, match="too many values"):
        read_object(tmp_path / "x.json", OutputError)


def test_a_list_of_runs_survives_a_record_without_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    hole(tmp_path / "a" / RECORD)
    assert [row["status"] for row in find_runs(tmp_path)] == ["unreadable record"]


def test_other_files_of_a_run_are_bounded_too(tmp_path: Path) -> None:
    hole(tmp_path / "probe.jsonl")
    assert Cache(tmp_path).load(tmp_path / "probe.jsonl", dict, 1) is None
    (tmp_path / RECORD).write_text('{"status": "done"}', encoding="utf-8")
    hole(tmp_path / METRICS)
    with pytest.raises(AdapterError, match="larger than"):
        read_story(tmp_path)


def test_what_transformers_reads_whole_is_looked_at_first(tmp_path: Path, sandbox_folder: Path) -> None:
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        folder = tmp_path / name
        folder.mkdir()
        for path in sandbox_folder.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / name).unlink(missing_ok=True)
        pipe(folder / name)
        with pytest.raises(ModelError):
            preflight_folder(folder)
        (folder / name).unlink()
        hole(folder / name)
        with pytest.raises(ModelError):
            preflight_folder(folder)


def test_what_nobody_reads_may_be_as_large_as_it_likes(tmp_path: Path, sandbox_folder: Path) -> None:
    for path in sandbox_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    hole(tmp_path / "trainer_state.json")
    assert preflight_folder(tmp_path).has_tokenizer


def test_a_settings_file_may_be_a_shells_pipe(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"train: {steps: 7}")
    os.close(writer)
    assert read_config_file(Path(f"/dev/fd/{reader}")) == {"train.steps": 7}
    os.close(reader)
    with pytest.raises(QunlearnError):
        read_config_file(Path("/dev/zero"))


def test_data_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hole(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="larger than"):
        read_dataset(tmp_path / "x.jsonl")
    monkeypatch.setattr(files, "_LARGE_BYTES", 1 << 10)
    monkeypatch.setattr(packed, "_UNPACKED_BYTES", 1 << 10)
    row = b'{"prompt": "p", "completion": "c"}\n'
    (tmp_path / "y.jsonl").write_bytes(row + bytes(2000))
    with pytest.raises(DataError, match="no text"):
        read_dataset(tmp_path / "y.jsonl")
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(row * 10_000))
    with pytest.raises(DataError, match="unpacks to more"):
        read_dataset(tmp_path / "z.jsonl.gz")


def test_slow_rows_are_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row kept within its limit, and a file of a thousand took hours."""
    account = bounds._Account()
    monkeypatch.setattr(bounds, "_account", account)
    account.blocks, account.seconds = 1000, 25.0
    with bounds.bounded():
        pass
    account.seconds = 31.0
    with pytest.raises(bounds.OutOfBoundsError, match=r"0\.03 s a row"), bounds.bounded():
        pass


SHAPE = {"name": str, "n?": int, "by": {"*": [{"x": (int, float)}]}}


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ({"name": "a", "by": {}}, None),
        ({"name": "a", "n": 3, "by": {"k": [{"x": 1.5, "more": []}]}, "other": 1}, None),
        ([], "it is not an object"),
        ({"by": {}}, "name is missing"),
        ({"name": 3, "by": {}}, "name is not as it was written"),
        ({"name": "a", "n": True, "by": {}}, "n is not as it was written"),
        ({"name": "a", "by": {"k": {}}}, "by.k is not a list"),
        ({"name": "a", "by": {"k": [{"x": 1}, {"x": "1"}]}}, "by.k.1.x is not as it was written"),
        ({"name": "a", "by": {"k": [{"x": 10**400}]}}, "by.k.0.x is not as it was written"),
    ],
)
def test_shapes(value: Any, wrong: str | None) -> None:
    assert misfit(value, SHAPE) == wrong
    json.dumps(value)
