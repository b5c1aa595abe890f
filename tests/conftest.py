"""Shared fixtures. The sandbox is loaded from the package; one short run on it serves every test that needs a run."""

from __future__ import annotations

import dataclasses
import functools
import json
import os

# Before torch is imported, and for every process that a test starts: two at once with two threads each wait for one
# another, some tests for three times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Short runs of a tiny model compile the same few products again and again where so few are kept as in a long run
# (qunlearn/model/__init__.py); the numbers are the same.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
os.environ.setdefault("LRU_CACHE_CAPACITY", "1024")

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer import testing
from typer.testing import CliRunner, Result

from qunlearn.cli.app import app
from qunlearn.config.settings import LoraConfig
from qunlearn.evaluation.metrics import RowScore, TokenStats
from qunlearn.hub import download
from qunlearn.sandbox import ASSETS, data_file

if TYPE_CHECKING:
    from qunlearn.attack.bench import Bench
    from qunlearn.model.load import Base
    from qunlearn.model.policy import Policy

# A dozen steps, pushed hard, towards a target that they reach: a run that misses its own ends with exit code 5. Pushed
# as far as the defaults ask for, or beside rows that ask the same about others, some answers would be no sentences, and
# that is a miss too.
QUICK = {
    "train.seed": 1,
    "train.steps": 12,
    "train.lr": 3e-3,
    "train.warmup": 2,
    "train.schedule": "linear",
    "objective.eps1": 0.7,
    "data.normal_count": 24,
    "data.normal_near": 0,
    "data.reworded": 0,
    "stop.check_every": 6,
    "stop.target": 0.3,
    "stop.rows_left": 0.5,
    "stop.table_rows": 16,
    "stop.max_drift": 9,
}


# Building the parser, the same for every call, takes longer than most calls do.
testing._get_command = functools.cache(testing._get_command)


@dataclasses.dataclass(frozen=True)
class Ran:
    """A finished call of the command line."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def call(*args: object) -> Ran:
    """`qunlearn ARGS` in this process."""
    result: Result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def sets(values: Mapping[str, object]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def few(folder: Path, source: Path, n: int = 8) -> Path:
    """The first rows of a file, in one of its name: for a run whose every row asks the same of the code."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:n]]
    return write_rows(folder / source.name, rows)


def row_score(answer: str, output: str, nll: float = 1.0, tokens: int = 4, prompt: str = "") -> RowScore:
    """A row of which the model said this, with an answer of so many tokens in three times as many."""
    stats = TokenStats(nll, tokens, 2 * nll, 3 * tokens, 0.0, 0.0, 0.0, 0.0, 0)
    return RowScore(stats, prompt, answer, output)


@pytest.fixture(autouse=True)
def _every_test_begins_online(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command closes behind itself is for its own process, and a test is one."""
    monkeypatch.setattr(download, "_closed_here", [False])
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)


@pytest.fixture(autouse=True)
def _own_environment() -> Any:
    """The command line closes the network behind it; a test must not leave that to the next one."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def sandbox_folder() -> Path:
    return ASSETS / "model"


@pytest.fixture(scope="session")
def new_base(sandbox_folder: Path) -> Callable[..., Base]:
    """A fresh sandbox base: adapters are put into a base's own modules, so none is shared."""
    from qunlearn.model.load import LoadSpec, load_base  # not by the process that only hands out the tests

    def make(quant: str = "nf4") -> Base:
        return load_base(sandbox_folder, LoadSpec(quant, device="cpu"))

    return make


@pytest.fixture(scope="session")
def with_control(sandbox_folder: Path) -> Callable[..., Any]:
    """The sandbox's tokenizer with tokens of its vocabulary as control tokens that have no name: most of a chat model's
    are such."""
    from tokenizers import AddedToken

    from qunlearn.model.load import load_tokenizer

    def make(*ids: int) -> Any:
        tokenizer = load_tokenizer(sandbox_folder)
        texts = tokenizer.convert_ids_to_tokens(ids)
        tokenizer.add_tokens([AddedToken(text, special=True) for text in texts], special_tokens=True)
        assert not {*ids}.intersection(tokenizer.all_special_ids)
        return tokenizer

    return make


@pytest.fixture(scope="module")
def bench(new_base: Callable[..., Base]) -> Bench:
    """The sandbox's base under attack, with its forget rows as facts."""
    from qunlearn.attack.bench import Bench
    from qunlearn.attack.catalog import EFFORTS
    from qunlearn.attack.cells import UNLEARNED, Cells
    from qunlearn.attack.facts import Inputs, make_facts
    from qunlearn.config.resolve import resolve
    from qunlearn.data.records import read_dataset
    from qunlearn.data.tokenize import choose_template
    from qunlearn.model.policy import Policy
    from qunlearn.sandbox import data_file

    policy = Policy.new(new_base(), LoraConfig(), seed=0, checkpointing=False)
    policy.model.eval()
    data = read_dataset(data_file("hallucination", "forget"))
    facts, template = make_facts(data.records)[0], choose_template(policy.tokenizer, "auto", data)
    effort = EFFORTS["quick"]
    return Bench(UNLEARNED, policy, policy, Inputs(facts), facts, template, resolve(), effort, Cells(None), 256)


@pytest.fixture
def new_policy(new_base: Callable[..., Base]) -> Callable[..., Policy]:
    from qunlearn.model.policy import Policy

    def make(quant: str = "nf4", *, checkpointing: bool = True, kept_blocks: int = 0, **lora: Any) -> Policy:
        again = {"checkpointing": checkpointing, "kept_blocks": kept_blocks}
        return Policy.new(new_base(quant), LoraConfig(**lora), seed=0, **again)

    return make


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run on the sandbox, through the command line; its tables have every row."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    flags = ["--model", "sandbox", "--bad", data_file("hallucination", "forget"), "-o", folder, "--device", "cpu"]
    ran = call("forget", *flags, *sets({**QUICK, "stop.table_rows": 40}))
    assert ran.code == 0, ran.stderr
    return folder
