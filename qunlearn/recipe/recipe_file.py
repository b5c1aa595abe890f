"""Find, read and check recipe files."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qunlearn.config.resolve import RECIPE, read_config_file, read_yaml
from qunlearn.data.importers import NAMES
from qunlearn.errors import ConfigError, OutputError
from qunlearn.evaluation.catalog import SUITES
from qunlearn.sandbox import KINDS

FOLDER = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class PublicData:
    """A public data set: what `qunlearn data import` is given."""

    format: str
    source: str
    subset: str | None = None
    part: str | None = None
    side: str | None = None
    skip: int = 0
    rows: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A story. `settings`: what differs from a run's defaults, by "section.name"."""

    name: str
    path: Path
    about: str
    sandbox: str
    suite: str
    settings: Mapping[str, Any]
    bad: PublicData
    normal: PublicData
    harm_classifier: str | None = None


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a recipe that comes with the package, or of one's own. Raises ConfigError."""
    path = FOLDER / f"{name}.yaml"
    if name in names():
        return path
    own = Path(name)
    if own.suffix in (".yaml", ".yml") and own.is_file():
        return own
    close = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(names())}, or a YAML file"
    raise ConfigError(f"no recipe {name!r}", where="recipe", hint=hint)


def read(name: str) -> Recipe:
    """Read and check a recipe. Raises ConfigError naming every unknown key."""
    path = find(name)
    raw = read_yaml(path)
    section = raw.get(RECIPE) if isinstance(raw, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(
            f"has no section {RECIPE!r}", where=str(path), hint="see `qunlearn recipe show hallucination`"
        )
    known = [f.name for f in dataclasses.fields(Recipe) if f.name not in ("name", "path", "settings")]
    problems = _unknown(section, known, RECIPE)
    values: dict[str, Any] = {key: section[key] for key in known if key in section}
    for side in ("bad", "normal"):
        values[side] = _public(section.get(side), side, problems)
    for key, choices in (("sandbox", KINDS), ("suite", tuple(SUITES))):
        if section.get(key) not in choices:
            problems.append(f"{RECIPE}.{key} must be one of {', '.join(choices)}, not {section.get(key)!r}")
    if not isinstance(section.get("about"), str):
        problems.append(f"{RECIPE}.about must be a text")
    if problems:
        raise ConfigError("\n  ".join(problems), where=str(path))
    return Recipe(name=path.stem, path=path, settings=read_config_file(path), **values)


def _public(raw: object, side: str, problems: list[str]) -> PublicData | None:
    known = {f.name: f for f in dataclasses.fields(PublicData)}
    where = f"{RECIPE}.{side}"
    if not isinstance(raw, dict):
        problems.append(f"{where} must say format and source")
        return None
    before = len(problems)
    problems += _unknown(raw, list(known), where)
    for key in ("format", "source"):
        if not isinstance(raw.get(key), str):
            problems.append(f"{where}.{key} must be a text")
    if isinstance(raw.get("format"), str) and raw["format"] not in NAMES:
        problems.append(f"{where}.format must be one of {', '.join(NAMES)}, not {raw['format']!r}")
    for key in ("skip", "rows", "limit"):
        value = raw.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < (key != "skip"):
            problems.append(f"{where}.{key} must be a whole number, not {value!r}")
    return PublicData(**raw) if len(problems) == before else None


def _unknown(section: Mapping[Any, Any], known: list[str], where: str) -> list[str]:
    problems = []
    for key in section:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            problems.append(f"unknown key {f'{where}.{key}'[:60]!r}{hint}")
    return problems


def copy(name: str, output: Path) -> None:
    """A recipe as a file of one's own, to be changed and run. Raises ConfigError, OutputError."""
    text = find(name).read_text(encoding="utf-8")
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError("exists", where=str(output), hint="choose another --output") from None
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=str(output)) from error
