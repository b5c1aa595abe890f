"""Every reader on what hypothesis makes up: a value, or a named error; nothing else, whatever the bytes."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qunlearn.config.resolve import parse_set, read_config_file, resolve
from qunlearn.config.settings import SETTINGS
from qunlearn.data.records import FieldNames, read_dataset
from qunlearn.errors import EXIT_CODES, QunlearnError
from qunlearn.hub.adapter_files import check_adapter
from qunlearn.hub.preflight import preflight_folder
from qunlearn.hub.safetensors_file import read_tensors
from qunlearn.report.read import read_story
from qunlearn.runs.folder import open_run
from qunlearn.runs.list import find_runs
from qunlearn.utils.units import parse_size

QUICK = settings(max_examples=120, deadline=5000, suppress_health_check=list(HealthCheck), derandomize=True)

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def objects(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    """Objects that use names the reader knows, with values of any kind."""
    return st.dictionaries(st.sampled_from(names) | st.text(max_size=5), values, max_size=6)


@contextlib.contextmanager
def named() -> Iterator[None]:
    try:
        yield
    except QunlearnError as error:
        assert error.exit_code in EXIT_CODES and error.exit_code > 1
        assert len(str(error)) < 8000


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@QUICK
@given(st.binary(max_size=300), st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.tsv", "x.txt", "x.jsonl.gz", "x"]))
def test_records_of_any_bytes(raw: bytes, name: str) -> None:
    with folder() as here, named():
        (here / name).write_bytes(raw)
        read_dataset(here / name)


@QUICK
@given(
    st.lists(
        objects("prompt", "completion", "question", "answer", "messages", "text", "instruction", "input", "system")
        | objects("question", "choices", "answer", "prompt", "chosen", "rejected", "query", "goal", "target", "")
        | st.fixed_dictionaries({"messages": st.lists(objects("role", "content", "from", "value"), max_size=3)}),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([FieldNames(), FieldNames("a", "b"), FieldNames(None, "text"), FieldNames(turns="all")]),
    st.booleans(),
)
def test_records_of_any_rows(rows: list[dict[str, Any]], fields: FieldNames, lines: bool) -> None:
    with folder() as here, named():
        path = here / ("x.jsonl" if lines else "x.json")
        path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
        dataset = read_dataset(path, fields)
        assert dataset.records and all(record.completion.strip() for record in dataset.records)


@QUICK
@given(st.binary(max_size=200) | st.text(alphabet="model:name{}[]&*!?|>-'\"\n \t#%0.e,", max_size=120).map(str.encode))
def test_recipes_of_any_bytes(raw: bytes) -> None:
    with folder() as here, named():
        (here / "r.yaml").write_bytes(raw)
        resolve(("r", read_config_file(here / "r.yaml")))


@QUICK
@given(st.dictionaries(st.sampled_from(sorted(SETTINGS)), scalars | values, max_size=5))
def test_settings_of_any_values(overlay: dict[str, Any]) -> None:
    with named():
        resolve(("test", overlay))


@QUICK
@given(st.lists(st.text(max_size=30), max_size=3), st.text(max_size=20))
def test_assignments_and_sizes(assignments: list[str], size: str) -> None:
    with named():
        resolve(("--set", parse_set(assignments)))
    with named():
        assert parse_size(size, "--vram") >= 0


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "X"]) | values,
        "shape": st.lists(st.integers(-2, 2**40), max_size=3) | values,
        "data_offsets": st.lists(st.integers(-8, 2**66), max_size=3) | values,
    },
)
headers = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | values, max_size=4)


@QUICK
@given(
    headers.map(json.dumps).map(str.encode) | st.binary(max_size=80),
    st.binary(max_size=64),
    st.none() | st.integers(0, 2**64 - 1),
)
def test_safetensors_headers(header: bytes, data: bytes, length: int | None) -> None:
    raw = struct.pack("<Q", len(header) if length is None else length) + header + data
    with folder() as here:
        (here / "model.safetensors").write_bytes(raw)
        with named():
            for tensor in read_tensors(here / "model.safetensors"):
                assert 0 <= tensor.start <= tensor.end <= len(raw)
        (here / "config.json").write_text('{"model_type": "llama"}')
        (here / "tokenizer.json").write_text("{}")
        with named():
            assert preflight_folder(here).weight_bytes <= len(raw)


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@QUICK
@given(objects("model_type", "auto_map", "quantization_config", "transformers_weights", "num_hidden_layers"), values)
def test_model_configs_and_indices(config: dict[str, Any], weight_map: Any) -> None:
    header = json.dumps({"a": GOOD}).encode()
    with folder() as here:
        (here / "shard.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        (here / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (here / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
        (here / "tokenizer.json").write_text("{}")
        with named():
            preflight_folder(here)


@QUICK
@given(objects("peft_type", "r", "target_modules", "rank_pattern", "auto_mapping", "base_model_name_or_path"))
def test_adapter_configs(config: dict[str, Any]) -> None:
    header = json.dumps({"base_model.model.q.lora_A.weight": GOOD}).encode()
    with folder() as here:
        (here / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        (here / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2} | config))
        with named():
            check_adapter(here)
        with named():
            open_run(here)


@QUICK
@given(
    objects("model", "data", "training", "status", "before", "after", "verdicts")
    | st.fixed_dictionaries({"data": objects("bad", "normal", "template"), "training": objects("best", "steps")}),
    st.binary(max_size=60) | values.map(json.dumps).map(str.encode),
)
def test_records_of_runs(record: dict[str, Any], evaluation: bytes) -> None:
    with folder() as here:
        (here / "adapter").mkdir()
        (here / "adapter" / "adapter_config.json").write_text("{}")
        (here / "record.json").write_text(json.dumps(record))
        (here / "eval.json").write_bytes(evaluation)
        with named():
            open_run(here)
        with named():
            read_story(here)
        assert len(find_runs(here)) == 1
