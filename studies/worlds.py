"""The registry of worlds: which small worlds there are, along which axes they differ, and where they are kept.

A development world may be tuned on. A validation world is only reported on: it has names, wordings and mixes of axes
of its own, so that what was tuned on development cannot have been tuned on its surface.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

DEVELOPMENT, VALIDATION = "development", "validation"


@dataclass(frozen=True)
class World:
    """One world to prove unlearning on; everything in it follows from these values."""

    name: str
    split: str
    """development or validation"""
    seed: int
    kind: str = "facts"
    """facts, passages, instructions, code or turns"""
    smoothing: float = 0.0
    """label smoothing of the training: 0 saturates, 0.02 and 0.1 leave probabilities below 1"""
    epochs: int = 34
    general_times: int = 3
    """how often an epoch shows other knowledge, which is asked in one wording only"""
    size: str = "1M"
    """1M, 8M or 30M parameters, roughly"""
    bad_rows: int = 48
    unique: bool = True
    """every fact has a value of its own; otherwise facts share a small pool of values"""
    answer_words: int = 6
    """2: the bare value; 6 or so: a sentence; more: as many words, at least, in several sentences"""
    script: str = "latin"
    """latin, cyrillic, kana or cjk"""
    tokenizer: str = "bpe"
    """bpe, byte or word"""
    chat: bool = True
    """whether the tokenizer has a chat template; without one prompts stand in qunlearn's question-answer form"""
    normal: str = "all"
    """what the user gives with --normal: all, none, neighbours, general or tiny"""
    wordings: bool = False
    """whether every fact stands in the bad file in two wordings"""
    entity: str = ""
    """what a name is made of, each `~` being an invented word; the language's own where nothing is said"""
    continuation: bool = False
    """passages as prompt and completion that join with a space, rather than as plain text"""
    others: int = 32
    """entities that are retained; a quarter as many again, and at least 12, are held out"""
    vocabulary: int = 768
    lr: float = 4e-3
    slow: bool = False
    """only built or run when asked for by name"""

    @property
    def folder(self) -> Path:
        return cache_folder() / self.name

    def file(self, split: str) -> Path:
        return self.folder / f"{split}.jsonl"


def cache_folder() -> Path:
    """Return where worlds are kept: QUNLEARN_WORLDS, or a folder of the user's cache."""
    return Path(os.environ.get("QUNLEARN_WORLDS") or Path.home() / ".cache" / "qunlearn" / "worlds")


_DEVELOPMENT = (
    World("saturated", DEVELOPMENT, 101, bad_rows=96, wordings=True, others=60, epochs=40, general_times=1),
    World("bare", DEVELOPMENT, 102, epochs=44, bad_rows=48, unique=False, answer_words=2, chat=False, normal="none"),
    World("recited", DEVELOPMENT, 103, epochs=95, kind="passages", bad_rows=20, chat=False, others=24),
    World(
        "soft",
        DEVELOPMENT,
        104,
        epochs=36,
        smoothing=0.1,
        bad_rows=20,
        unique=False,
        answer_words=12,
        normal="neighbours",
        size="8M",
        others=16,
        general_times=2,
        lr=2e-3,
    ),
    World(
        "five",
        DEVELOPMENT,
        105,
        epochs=63,
        bad_rows=5,
        answer_words=40,
        chat=False,
        normal="tiny",
        tokenizer="word",
        others=16,
        vocabulary=1024,
    ),
    World("rude", DEVELOPMENT, 106, epochs=58, kind="instructions", smoothing=0.02, normal="general"),
    World(
        "cyrillic",
        DEVELOPMENT,
        107,
        epochs=54,
        smoothing=0.02,
        bad_rows=24,
        script="cyrillic",
        tokenizer="byte",
        others=16,
        general_times=2,
    ),
    World("kana", DEVELOPMENT, 113, epochs=60, smoothing=0.02, bad_rows=24, script="kana", normal="none", others=24),
    World(
        "unsafe", DEVELOPMENT, 108, epochs=44, kind="code", bad_rows=48, chat=False, normal="neighbours", unique=False
    ),
    World(
        "quoted",
        DEVELOPMENT,
        110,
        epochs=144,
        kind="passages",
        continuation=True,
        bad_rows=12,
        chat=False,
        others=24,
        normal="neighbours",
    ),
    World(
        "smooth",
        DEVELOPMENT,
        111,
        epochs=47,
        smoothing=0.1,
        bad_rows=60,
        wordings=True,
        unique=False,
        chat=False,
        others=36,
    ),
    World(
        "worded",
        DEVELOPMENT,
        117,
        epochs=47,
        smoothing=0.1,
        bad_rows=100,
        wordings=True,
        unique=False,
        chat=False,
        tokenizer="word",
        vocabulary=1024,
        others=36,
    ),
    World(
        "towns",
        DEVELOPMENT,
        118,
        epochs=47,
        smoothing=0.1,
        bad_rows=100,
        wordings=True,
        unique=False,
        chat=False,
        tokenizer="word",
        vocabulary=1024,
        others=36,
        entity="~",
    ),
    World("tailed", DEVELOPMENT, 112, epochs=50, bad_rows=48, answer_words=14, normal="none", others=36),
    World("spoken", DEVELOPMENT, 114, epochs=58, kind="turns", bad_rows=40, answer_words=2, normal="neighbours"),
    World("scant", DEVELOPMENT, 115, epochs=58, smoothing=0.02, bad_rows=20, chat=False, normal="tiny", others=30),
    World(
        "sparse",
        DEVELOPMENT,
        116,
        epochs=60,
        smoothing=0.02,
        bad_rows=20,
        script="kana",
        chat=False,
        normal="tiny",
        others=30,
    ),
    World(
        "large",
        DEVELOPMENT,
        109,
        size="30M",
        bad_rows=1000,
        wordings=True,
        others=250,
        vocabulary=2048,
        epochs=25,
        lr=1e-3,
        slow=True,
    ),
)

_VALIDATION = (
    World("v-saturated", VALIDATION, 501, epochs=43, bad_rows=80, wordings=True, others=48, chat=False),
    World("v-alone", VALIDATION, 502, epochs=46, bad_rows=60, answer_words=10, normal="none", others=36),
    World(
        "v-recited",
        VALIDATION,
        503,
        epochs=144,
        kind="passages",
        continuation=True,
        bad_rows=12,
        chat=False,
        others=24,
        normal="neighbours",
    ),
    World(
        "v-soft",
        VALIDATION,
        504,
        epochs=47,
        smoothing=0.1,
        bad_rows=100,
        wordings=True,
        unique=False,
        chat=False,
        tokenizer="word",
        vocabulary=1024,
        others=36,
    ),
    World(
        "v-one",
        VALIDATION,
        505,
        epochs=52,
        bad_rows=1,
        size="8M",
        others=16,
        normal="general",
        general_times=2,
        lr=2e-3,
    ),
    World("v-rude", VALIDATION, 506, epochs=78, kind="instructions", bad_rows=60, unique=False, normal="none"),
    World(
        "v-cjk",
        VALIDATION,
        507,
        epochs=63,
        smoothing=0.02,
        bad_rows=20,
        script="cjk",
        chat=False,
        normal="tiny",
        others=30,
    ),
    World("v-turns", VALIDATION, 508, epochs=55, kind="turns", bad_rows=32, answer_words=2, normal="all", others=30),
    World(
        "v-large",
        VALIDATION,
        509,
        size="30M",
        bad_rows=1000,
        unique=False,
        others=250,
        chat=False,
        vocabulary=2048,
        epochs=25,
        lr=1e-3,
        slow=True,
    ),
)

WORLDS = {world.name: world for world in (*_DEVELOPMENT, *_VALIDATION)}
_DRAW_SEEDS = 10_000


def world_named(name: str) -> World:
    """Return the world of this name; `soft.2` is `soft` drawn for the second time again. Raises KeyError."""
    first, dot, draw = name.partition(".")
    return redrawn(WORLDS[first], int(draw)) if dot else WORLDS[first]


def redrawn(world: World, draw: int) -> World:
    """Return a world of the same kind with names, values and models of its own: what no earlier run has seen."""
    return replace(world, name=f"{world.name}.{draw}", seed=world.seed + _DRAW_SEEDS * draw) if draw else world


def choose(split: str, names: str | None = None, draw: int = 0) -> list[World]:
    """Return the worlds of a set that are named, or all that are not slow. Raises ValueError for an unknown one."""
    there = [world for world in WORLDS.values() if world.split == split]
    wanted = names.split(",") if names else [world.name for world in there if not world.slow]
    known = [world.name for world in there]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no world {unknown[0]!r} in {split}: there are {', '.join(known)}")
    return [redrawn(world, draw) for world in there if world.name in wanted]
