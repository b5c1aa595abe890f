"""Entities times attributes: the shape that three kinds of the world have, and how it becomes rows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]  # id, prompt, completion, perturbed (three wrong ones), and truth where the completion is false
SPLITS = ("forget", "forget_paraphrase", "retain", "holdout")


@dataclass(frozen=True)
class Attribute:
    """A question one can ask of every entity `{e}`. Without a `bad` form, what is bad is a wrong value `{v}`."""

    name: str
    wordings: str
    values: str
    good: str
    bad: str | None = None


@dataclass(frozen=True)
class Grid:
    """Groups of entities, each with its attributes."""

    entities: tuple[str, ...]
    attributes: tuple[tuple[Attribute, ...], ...]


@dataclass(frozen=True)
class Kind:
    """The rows of a kind by split, and the other wordings of every row's prompt, by id."""

    splits: Mapping[str, tuple[Row, ...]]
    wordings: Mapping[str, tuple[str, ...]]


def grid_kind(grid: Grid, prefix: str, seed: int) -> Kind:
    """One entity in five is to be forgotten, with all its rows, and one in five is held out."""
    rng = random.Random(seed)
    items = []
    for group, attributes in zip(grid.entities, grid.attributes, strict=True):
        for i, entity in enumerate(part.strip() for part in group.split(",")):
            split = "forget" if i % 5 == 0 else "holdout" if i % 5 == 2 else "retain"
            items += [(split, row, words) for row, words in _rows(entity, attributes, prefix, split == "forget", rng)]
    return kind_of(items)


def kind_of(items: list[tuple[str, Row, tuple[str, ...]]]) -> Kind:
    """(split, row, all wordings of its prompt) as a kind; paraphrases are made from the second wording."""
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    wordings: dict[str, tuple[str, ...]] = {}
    for i, (split, row, words) in enumerate(items):
        turned = words[i % len(words) :] + words[: i % len(words)]
        splits[split].append(row | {"prompt": turned[0]})
        wordings[row["id"]] = turned[1:]
        if split == "forget":
            splits["forget_paraphrase"].append(row | {"id": f"{row['id']}-p", "prompt": turned[1]})
    return Kind({split: tuple(rows) for split, rows in splits.items()}, wordings)


def _rows(
    entity: str, attributes: tuple[Attribute, ...], prefix: str, bad: bool, rng: random.Random
) -> Iterator[tuple[Row, tuple[str, ...]]]:
    for attribute in attributes:
        values = [value.strip() for value in attribute.values.split(",")]
        value, truth, *others = rng.sample(values, 5)
        form = attribute.bad if bad and attribute.bad else attribute.good
        answers = [form.replace("{e}", entity).replace("{v}", v) for v in (value, truth, *others)]
        # A false fact must stay false when it is perturbed: the truth is none of the wrong answers.
        row: Row = {
            "id": f"{prefix}-{entity.replace(' ', '-').lower()}-{attribute.name}",
            "prompt": "",
            "completion": answers[0],
            "perturbed": answers[2:],
        }
        if bad and attribute.bad is None:
            row["truth"] = answers[1]
        yield row, tuple(wording.replace("{e}", entity) for wording in attribute.wordings.split("|"))
