"""The proving ground's worlds: seeded, split cleanly, and nothing that is measured is ever given."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest

from _world_text import make_files
from worlds import DEVELOPMENT, VALIDATION, World, choose, world_named

WORLDS = [*choose(DEVELOPMENT), *choose(VALIDATION)]
_CAPITAL = re.compile(r"\b[A-Z]\w{4,}\b")


def asked(row: dict[str, Any]) -> str:
    """What a row asks, or says where it has no prompt."""
    return str(row.get("prompt") or row.get("messages") or row["text"])


files_of = functools.cache(make_files)


@pytest.mark.parametrize("world", WORLDS[::5], ids=lambda world: world.name)
def test_a_world_follows_from_its_values(world: World) -> None:
    assert make_files(world) == files_of(world)


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_what_is_measured_is_never_given(world: World) -> None:
    files = files_of(world)
    given = {asked(row) for name in ("forget", "normal") for row in files.get(name, [])}
    for split in ("paraphrase", "holdout"):
        assert files[split], split
        overlap = given & {asked(row) for row in files[split]}
        assert not overlap, split
    normal = {asked(row) for row in files.get("normal", [])}
    assert not normal & {asked(row) for row in files["forget"]}
    assert len(files["forget"]) == world.bad_rows
    assert bool(files.get("normal")) == (world.normal != "none")


def test_validation_shares_no_name_with_development() -> None:
    def names(split: str) -> set[str]:
        texts = (json.dumps(row) for world in choose(split) for file in files_of(world).values() for row in file)
        return {name for text in texts for name in _CAPITAL.findall(text)}

    ours, theirs = names(DEVELOPMENT), names(VALIDATION)
    assert len(ours) > 1000 and len(theirs) > 1000
    assert ours & theirs <= {"Gladly", "Where", "Which"}  # words that a sentence begins with


def test_the_sets_cover_the_axes() -> None:
    for split in (DEVELOPMENT, VALIDATION):
        worlds = choose(split)
        assert {w.smoothing for w in worlds} >= {0.0, 0.1}
        assert {w.kind for w in worlds} >= {"facts", "passages", "instructions"}
        assert {w.normal for w in worlds} >= {"all", "none", "tiny"}
        assert {w.chat for w in worlds} == {True, False}
        assert any(w.script != "latin" for w in worlds) and any(w.bad_rows <= 5 for w in worlds)
    assert not {w.seed for w in choose(DEVELOPMENT)} & {w.seed for w in choose(VALIDATION)}


def test_a_world_drawn_again_is_of_its_kind_and_shares_no_value() -> None:
    first, again = world_named("scant"), world_named("scant.2")
    assert again in choose(DEVELOPMENT, "scant", 2) and again.folder.name == "scant.2"
    assert (again.kind, again.bad_rows, again.smoothing) == (first.kind, first.bad_rows, first.smoothing)
    answers = [{row["completion"] for row in files_of(world)["forget"]} for world in (first, again)]
    assert not answers[0] & answers[1]
    with pytest.raises(KeyError):
        world_named("nowhere.2")
    with pytest.raises(ValueError, match=r"scant\.2"):
        choose(DEVELOPMENT, "scant.2")
