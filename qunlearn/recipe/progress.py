"""Remember which stages of a recipe are done, in a small file in its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qunlearn.errors import DataError, OutputError
from qunlearn.utils.files import output_error, sha256_of, write_json
from qunlearn.utils.json_files import read_object

LEDGER = "stages.json"
_SHAPE = {"story": {"*": str}, "stages": {"*": {"inputs": str, "seconds": (int, float), "result": dict}}}


@dataclass
class Ledger:
    """`stages`: of each one that is done, the hash of its inputs, what it told, and how long it took."""

    folder: Path
    story: Mapping[str, str]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, story: Mapping[str, str]) -> Ledger:
        """The ledger of a folder, empty for a new one. Raises OutputError for a folder of something else."""
        path, where = folder / LEDGER, str(folder)
        hint = "choose another --output"
        try:
            if not path.is_file():
                if folder.is_dir() and any(folder.iterdir()):
                    raise OutputError("the folder is not empty, and no recipe was run in it", where=where, hint=hint)
                if folder.exists() and not folder.is_dir():
                    raise OutputError("exists and is not a folder", where=where, hint=hint)
                return cls(folder, story)
        except OSError as error:
            raise output_error(error, folder) from error
        found = read_object(path, OutputError, hint=hint, shape=_SHAPE)
        theirs, stages = found["story"], found["stages"]
        if theirs != story and stages:  # where nothing was done a mistyped name may be put right
            said = ", ".join(f"{name} {value}" for name, value in theirs.items())
            raise OutputError(f"another story was told in this folder: {said}", where=where, hint=hint)
        return cls(folder, story, stages)

    def begin(self) -> None:
        """Write down whose folder this is before anything is in it: a first stage that fails can be done again.

        Raises OutputError.
        """
        if not (self.folder / LEDGER).is_file():
            self._write()

    def done(self, name: str, key: str, outputs: Sequence[str]) -> bool:
        """Return whether a stage was done with exactly these inputs, and what it wrote is still there."""
        known = self.stages.get(name, {}).get("inputs") == key
        return known and all((self.folder / output).exists() for output in outputs)

    def keep(self, name: str, key: str, result: Mapping[str, Any], seconds: float) -> None:
        """Write a stage down. Raises OutputError."""
        self.stages[name] = {"inputs": key, "seconds": round(seconds, 1), "result": dict(result)}
        self._write()

    def drop(self, names: Sequence[str]) -> None:
        """Stages whose inputs have changed are not done any more."""
        gone = [self.stages.pop(name, None) for name in names]
        if any(stage is not None for stage in gone):
            self._write()

    def _write(self) -> None:
        path = self.folder / LEDGER
        new = path.with_name(f".{LEDGER}-new")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(new, {"story": self.story, "stages": self.stages})
            new.replace(path)
        except OSError as error:
            raise output_error(error, path) from error


def key_of(*inputs: Any) -> str:
    """A hash of everything a stage depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the sha256 of a file. Raises DataError."""
    try:
        return sha256_of(path)
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise DataError(what, where=str(path)) from error
