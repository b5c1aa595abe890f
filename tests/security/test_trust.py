"""Code that a model brings runs where the command line says so, whatever a file or a run folder says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import call
from test_writer import make_adapter

from qunlearn.config.resolve import read_config_file
from qunlearn.errors import ModelError
from qunlearn.evaluation.request import EvalRequest, Wish
from qunlearn.runs.base_model import run_config
from qunlearn.sandbox import data_file

SAYS_SO = "model:\n  trust_remote_code: true\n"


@pytest.fixture
def base(tmp_path: Path, sandbox_folder: Path) -> Path:
    """The sandbox's model with a Python file that leaves a mark when it is imported."""
    folder = Path(shutil.copytree(sandbox_folder, tmp_path / "base"))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n", encoding="utf-8")
    named = {"config.json": {"AutoConfig": "own.C"}, "tokenizer_config.json": {"AutoTokenizer": [None, "own.T"]}}
    for name, auto_map in named.items():
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | {"auto_map": auto_map}), encoding="utf-8")
    return folder


def given_run(folder: Path, base: Path) -> Path:
    """A run folder from elsewhere that claims to be trusted."""
    make_adapter(folder / "adapter", base)
    (folder / "config.yaml").write_text(SAYS_SO, encoding="utf-8")
    (folder / "record.json").write_text(json.dumps({"model": {"location": str(base)}}), encoding="utf-8")
    return folder


def test_a_recipe_cannot_trust_the_model_it_names(base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "given.yaml"
    recipe.write_text(SAYS_SO + f"  name: {base}\n", encoding="utf-8")
    argv = ("forget", "-c", recipe, "--bad", data_file("harm", "forget"), "-o", tmp_path / "run", "--device", "cpu")
    ran = call(*argv, "--dry-run", "--json")
    assert ran.code == 0, ran.stderr
    assert ran.json["config"]["model"]["trust_remote_code"] is False
    assert not (tmp_path / "ran").exists()
    assert "model.trust_remote_code" not in read_config_file(recipe)
    assert call(*argv, "--dry-run", "--trust-remote-code").code in (0, 6)
    assert (tmp_path / "ran").exists(), "the file does run where it is trusted"


def test_a_run_folder_cannot_trust_its_base(base: Path, tmp_path: Path) -> None:
    run, files = given_run(tmp_path / "run", base), {"forget": data_file("harm", "forget")}
    assert not run_config(run).model.trust_remote_code
    assert run_config(run, trust=True).model.trust_remote_code
    for trust in (False, True):
        request = EvalRequest.check(run, None, files, wish=Wish(trust=trust))
        assert request.config.model.trust_remote_code is trust
        assert EvalRequest.check(None, str(base), files, wish=Wish(trust=trust)).config.model.trust_remote_code is trust


def test_a_base_that_needs_its_code_is_used_where_it_is_trusted(base: Path, tmp_path: Path) -> None:
    """Runs on an architecture of its own could be made, and then neither merged, asked, evaluated nor exported."""
    run, files = given_run(tmp_path / "run", base), {"forget": data_file("harm", "forget")}
    content = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(content | {"model_type": "brandnew"}), encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        EvalRequest.check(run, None, files)
    assert "--trust-remote-code" in str(caught.value.hint)
    assert EvalRequest.check(run, None, files, wish=Wish(trust=True)).model.folder == base
    for command in (("merge",), ("ask",), ("chat",), ("eval",), ("export",), ("recipe", "run")):
        assert "--trust-remote-code" in call(*command, "--help").stdout
