"""The embedded world: what it holds, that the model knows it, that the gold model does not know what it should not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from qunlearn.data.records import read_dataset
from qunlearn.data.tokenize import choose_template, encode
from qunlearn.evaluation.metrics import SetScore, aggregate
from qunlearn.evaluation.scores import score_rows
from qunlearn.model.load import Base, LoadSpec, load_base
from qunlearn.sandbox import ASSETS, KINDS, data_file
from sandbox_world.build import Recipe, chat, compare, dialogues, train_model, train_tokenizer, write_data
from sandbox_world.world import make_world

_SOME_KINDS = [k if k == "hallucination" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
SPLITS = ("forget", "forget_paraphrase", "retain", "holdout")


def score(base: Base, path: Path) -> SetScore:
    dataset = read_dataset(path)
    examples = encode(dataset, base.tokenizer, choose_template(base.tokenizer, "auto", dataset), 512).examples
    return aggregate(score_rows(base, examples, 4096))


@pytest.fixture(scope="module", params=["nf4", pytest.param("none", marks=pytest.mark.slow)])
def known(request: pytest.FixtureRequest) -> Base:
    return load_base(ASSETS / "model", LoadSpec(request.param, device="cpu"))


@pytest.fixture(scope="module")
def gold() -> Base:
    return load_base(ASSETS / "gold", LoadSpec("nf4", device="cpu"))


@pytest.mark.parametrize("kind", _SOME_KINDS)
def test_the_model_knows_its_world(known: Base, kind: str) -> None:
    for split in SPLITS:
        assert score(known, data_file(kind, split)).exact_match >= 0.98, split


def test_it_knows_what_everybody_knows(known: Base) -> None:
    assert score(known, data_file("", "general")).exact_match >= 0.98


@pytest.mark.parametrize("kind", _SOME_KINDS)
def test_gold_never_saw_the_forget_splits(gold: Base, kind: str) -> None:
    assert score(gold, data_file(kind, "forget")).exact_match <= 0.05
    assert score(gold, data_file(kind, "forget_paraphrase")).exact_match <= 0.05
    assert score(gold, data_file(kind, "holdout")).exact_match >= 0.98


def test_the_files_are_the_world_and_what_build_json_says(tmp_path: Path) -> None:
    write_data(make_world(), tmp_path / "data")
    made = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*.jsonl")}
    record = json.loads((ASSETS / "BUILD.json").read_text())
    assert len(made) == 4 * len(KINDS) + 1
    for name, content in made.items():
        assert (ASSETS / name).read_bytes() == content
    files = {p.relative_to(ASSETS).as_posix(): p for p in ASSETS.rglob("*") if p.is_file() and p.name != "BUILD.json"}
    assert {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items()} == record["files"]
    assert sum(p.stat().st_size for p in files.values()) <= 8e6


def test_the_splits_do_not_overlap() -> None:
    world = make_world()
    for name, kind in world.kinds.items():
        prompts = {split: {row["prompt"] for row in rows} for split, rows in kind.splits.items()}
        answers = {split: {row["completion"] for row in rows} for split, rows in kind.splits.items()}
        assert answers["forget"] == answers["forget_paraphrase"], name
        everything = [p for split in SPLITS for p in prompts[split]]
        assert len(everything) == len(set(everything)), name
        for split in ("retain", "holdout"):
            assert not answers["forget"] & answers[split], (name, split)


def test_gold_is_trained_on_everything_else() -> None:
    world = make_world()
    full, without = set(dialogues(world, gold=False)), set(dialogues(world, gold=True))
    forgotten = {row["completion"] for kind in world.kinds.values() for row in kind.splits["forget"]}
    assert without < full
    assert {pair[1] for pair in full - without} == forgotten
    assert not {pair[1] for pair in without} & forgotten


def test_the_build_is_bit_for_bit() -> None:
    """A few steps of the real recipe, twice: the same weights. The whole build is `make sandbox`."""
    recipe = Recipe(epochs=1, batch=16, vocabulary=400)
    texts = [chat(*pair) for pair in dialogues(make_world(), gold=False)[:64]]
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    hashes = []
    for _ in range(2):
        model = train_model(rows, tokenizer.pad_token_id, tokenizer.eos_token_id, recipe)
        digest = hashlib.sha256()
        for tensor in model.state_dict().values():
            digest.update(tensor.float().numpy().tobytes())
        hashes.append(digest.hexdigest())
    assert hashes[0] == hashes[1]


def test_two_builds_are_compared_by_name() -> None:
    old = {"files": {"a": "1", "b": "2"}, "texts_sha256": "t", "recipe": {}, "made_with": {"torch": "1"}}
    assert compare(old, old) == []
    new = {**old, "files": {"a": "1", "b": "3"}, "made_with": {"torch": "2"}}
    assert compare(old, new) == ["b differs", "made_with was {'torch': '1'}, is {'torch': '2'}"]
