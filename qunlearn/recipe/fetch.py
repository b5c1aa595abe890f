"""Fetch a recipe's data, the sandbox's, the user's or a public set's, and split it without common prompts."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qunlearn.config.settings import Config
from qunlearn.data.importers import TEXT, Source, Wanted, import_data, show_imported
from qunlearn.data.paths import data_path
from qunlearn.data.records import Dataset, FieldNames, Record, read_dataset, write_jsonl
from qunlearn.data.statistics import overlap, prompt_key
from qunlearn.errors import ConfigError, DataError, OutputError
from qunlearn.recipe.recipe_file import PublicData, Recipe
from qunlearn.roles.wordings import opened
from qunlearn.sandbox import data_file
from qunlearn.utils.files import output_error

# Split of an evaluation -> file in the data folder. What begins with forget, and paraphrase, should be gone.
FILES: Mapping[str, str] = {
    "forget": "bad.jsonl",
    "forget_unseen": "unseen.jsonl",
    "paraphrase": "paraphrase.jsonl",
    "forget_reworded": "reworded.jsonl",
    "retain": "retain.jsonl",
    "holdout": "holdout.jsonl",
    "general": "general.jsonl",
}
NORMAL = "normal.jsonl"  # what the run is given to keep; measured as retain
_SANDBOX = {
    "forget": "forget",
    "paraphrase": "forget_paraphrase",
    "retain": "retain",
    "holdout": "holdout",
    "general": "general",
}
_TEXT_ENDINGS = (".txt", ".txt.gz", ".md")


@dataclass(frozen=True)
class Given:
    """Files the user named, in place of the recipe's own. `test_percent`: prompts held back, to be asked unseen."""

    bad: Path | None = None
    normal: Path | None = None
    paraphrase: Path | None = None
    holdout: Path | None = None
    test_percent: int = 20
    seed: int = 0
    fields: FieldNames = field(default_factory=FieldNames)

    @property
    def files(self) -> dict[str, Path]:
        named = {"bad": self.bad, "normal": self.normal, "paraphrase": self.paraphrase, "holdout": self.holdout}
        return {name: path for name, path in named.items() if path is not None}


def named(given: Given, recipe: Recipe, config: Config) -> Given:
    """Add the files that a recipe's configuration names; those that a flag names win. Raises ConfigError.

    A recipe's own `data.bad` is the sandbox's file, so that `qunlearn forget -c` takes it too: only another is a wish.
    """
    own = f"sandbox:{recipe.sandbox}/forget"
    wishes = {
        "bad": config.data.bad if config.data.bad != own else "",
        "normal": config.data.normal,
        "holdout": config.data.holdout,
    }
    if config.output.overwrite:
        hint = "a recipe goes on in its folder; choose another --output to begin again"
        raise ConfigError("output.overwrite is of no use to a recipe", where="recipe", hint=hint)
    files: dict[str, Any] = {side: data_path(text) for side, text in wishes.items() if text}
    return replace(given, **(files | given.files))


def fetch(recipe: Recipe, given: Given, folder: Path, *, sandbox: bool) -> dict[str, Any]:
    """Fill the data folder anew, whole or not at all; returns the rows of each file. Raises QunlearnErrors."""
    new, old = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    try:
        for left in (new, old):  # by a process that was killed, or by data that were refused: those can be looked at
            if left.exists():
                shutil.rmtree(left)
        new.mkdir(mode=0o700, parents=True)
        counts = _fill(recipe, given, new, sandbox=sandbox)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise output_error(error, folder) from error
    return counts


def check_given(given: Given, folder: Path) -> None:
    """Refuse files that lie where the recipe itself writes: it would replace them. Raises OutputError."""
    for name, path in given.files.items():
        if Path(os.path.realpath(path)).is_relative_to(folder):
            hint = "copy it elsewhere, or choose another --output"
            raise OutputError(f"lies in {folder}, which the recipe fills itself", where=f"--{name} {path}", hint=hint)


def _fill(recipe: Recipe, given: Given, folder: Path, *, sandbox: bool) -> dict[str, Any]:
    if sandbox and given.bad is None:
        for split, name in _SANDBOX.items():
            _copy(data_file(recipe.sandbox, name), folder / FILES[split])
        if given.normal is not None:  # there is a holdout already: nothing is held back
            whole = replace(given, test_percent=0)
            _divide(recipe.normal, given.normal, whole, folder, (NORMAL, FILES["holdout"]))
    else:
        _divide(recipe.bad, given.bad, given, folder, (FILES["forget"], FILES["forget_unseen"]))
        if given.normal is not None or given.bad is None:
            _divide(recipe.normal, given.normal, given, folder, (NORMAL, FILES["holdout"]))
    for name in ("paraphrase", "holdout"):
        path = given.files.get(name)
        if path is not None:
            write_jsonl(folder / FILES[name], _rows(read_dataset(path, given.fields, role=f"--{name}").records))
    _reword(folder)
    check_splits(folder)
    return {path.name: _row_count(path) for path in sorted(folder.iterdir())}


def splits(folder: Path) -> dict[str, Path]:
    """The files there are to measure on, by split."""
    found = {split: folder / name for split, name in FILES.items() if (folder / name).is_file()}
    if (folder / NORMAL).is_file():
        found["retain"] = folder / NORMAL
    return {split: found[split] for split in FILES if split in found}


# -- one side of the data --------------------------------------------------------------------------------


def _divide(public: PublicData, path: Path | None, given: Given, folder: Path, names: tuple[str, str]) -> None:
    """Train and test of a public set, of a text, or of a file of rows."""
    train, test = names
    if path is not None and not path.name.lower().endswith(_TEXT_ENDINGS):
        role = "--normal" if train == NORMAL else "--bad"
        _divide_rows(read_dataset(path, given.fields, role=role), given, folder, names)
        return
    source = Source(str(path)) if path else Source(public.source, public.subset, public.part, public.skip, public.rows)
    shares = (100 - given.test_percent, given.test_percent) if given.test_percent else ()
    wanted = Wanted(None if path else public.side, None if path else public.limit, shares, given.seed)
    show_imported(import_data(TEXT if path else public.format, source, folder / "import.jsonl", wanted))
    (folder / ("import.train.jsonl" if shares else "import.jsonl")).rename(folder / train)
    if shares:
        (folder / "import.test.jsonl").rename(folder / test)


def _divide_rows(dataset: Dataset, given: Given, folder: Path, names: tuple[str, str]) -> None:
    """All rows with one prompt on one side; of a file with a single prompt nothing is held back."""
    prompts = sorted({_key(record) for record in dataset.records})
    random.Random(given.seed).shuffle(prompts)
    held_back = min(round(len(prompts) * given.test_percent / 100), len(prompts) - 1)
    test = set(prompts[:held_back])
    write_jsonl(folder / names[0], _rows([r for r in dataset.records if _key(r) not in test]))
    if test:
        write_jsonl(folder / names[1], _rows([r for r in dataset.records if _key(r) in test]))


def _key(record: Record) -> str:
    return prompt_key(record) if record.turns else record.key


def _rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records as rows that read back as the same records."""
    rows: list[dict[str, Any]] = []
    for record in records:
        meta = {name: value for name, value in record.meta.items() if name not in ("prompt", "completion", "text")}
        if not record.turns:
            rows.append({**meta, "text": record.completion})
        elif [role for role, _ in record.turns] == ["user"]:
            rows.append({"prompt": record.prompt, "completion": record.completion, **meta})
        else:
            turns = [*record.turns, ("assistant", record.completion)]
            rows.append({"messages": [{"role": role, "content": content} for role, content in turns], **meta})
    shapes = {next(name for name in ("messages", "prompt", "text") if name in row) for row in rows}
    if len(shapes) == 1:
        return rows
    # Some rows have a system turn and some have not: one file has one shape.
    return [row if "messages" in row else _as_messages(row) for row in rows]


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    turns = [{"role": "user", "content": row.pop("prompt")}, {"role": "assistant", "content": row.pop("completion")}]
    return {"messages": turns, **row}


def _copy(source: Path, target: Path) -> None:
    target.touch(mode=0o600)
    shutil.copyfile(source, target)


def _row_count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


# -- the same in other words, and leaks ------------------------------------------------------------------


def _reword(folder: Path) -> None:
    """Bad rows with an opening before their last question; plain texts have none."""
    records = read_dataset(folder / FILES["forget"], role="bad").records
    made = []
    for i, record in enumerate(record for record in records if record.turns):
        asked = opened(record)
        made.append(asked[i % len(asked)])
    if made:
        write_jsonl(folder / FILES["forget_reworded"], _rows(made))


def check_splits(folder: Path) -> None:
    """Raises DataError when what is asked unseen was given, or when a row is both to go and to stay."""
    found = {
        name: read_dataset(folder / name, role=name) for name in (*FILES.values(), NORMAL) if (folder / name).is_file()
    }
    bad, unseen, paraphrase = FILES["forget"], FILES["forget_unseen"], FILES["paraphrase"]
    holdout, retain = FILES["holdout"], FILES["retain"]
    for here, there in ((unseen, bad), (paraphrase, bad), (holdout, NORMAL)):
        _refuse(found, here, there, prompts=True)
    for here in (bad, unseen, paraphrase):
        for there in (NORMAL, retain, holdout, FILES["general"]):
            _refuse(found, here, there, prompts=False)


def _refuse(found: Mapping[str, Dataset], here: str, there: str, *, prompts: bool) -> None:
    if here not in found or there not in found:
        return
    shared = overlap(found[here], found[there])
    pairs = (*shared.rows, *(shared.prompts if prompts else ()))
    if pairs:
        listed = ", ".join(f"{a} and {b}" for a, b in pairs[:8])
        what = "prompts" if prompts else "rows"
        raise DataError(
            f"{len(pairs)} {what} are in {found[there].path} too, lines {listed}",
            where=f"{found[here].path}:{pairs[0][0]}",
            hint="what is measured must not be what is given: take them out of one of the files",
        )
