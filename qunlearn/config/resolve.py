"""Resolve files, `--set` texts and flags to a configuration: overlays over the defaults, later ones winning."""

from __future__ import annotations

import dataclasses
import difflib
import os
import reprlib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qunlearn.config.fields import Setting
from qunlearn.config.objective import PRESETS, WEIGHS_ITSELF
from qunlearn.config.settings import SETTINGS, Config
from qunlearn.errors import ConfigError
from qunlearn.utils.json_files import read_text
from qunlearn.utils.units import parse_size

TRUST = "model.trust_remote_code"  # said on the command line, or by a caller; a file that came from elsewhere cannot
RECIPE = "recipe"  # a file's section that is no setting of a run: what `qunlearn recipe` does with it
_MAX_RECIPE_BYTES = 1 << 20
PATHS = ("model.name", "data.bad", "data.normal", "data.holdout", "objective.instead", "output.folder")


def resolve(*overlays: tuple[str, Mapping[str, Any]]) -> Config:
    """Lay overlays (name, {"section.key": value}) over the defaults, later ones winning.

    Raises ConfigError naming every unknown key (with a suggestion) and every value out of its range.
    """
    problems: list[str] = []
    values: dict[str, dict[str, Any]] = {f.name: {} for f in dataclasses.fields(Config)}
    for origin, overlay in overlays:
        for key, value in overlay.items():
            setting = SETTINGS.get(key)
            if setting is None:
                problems.append(f"{origin}: unknown key {key[:80]!r}{_suggest(key)}")
                continue
            try:
                section, name = key.split(".", 1)
                values[section][name] = _coerce(setting, value)
            except ValueError as error:
                problems.append(f"{origin}: {error}")
    problems += _without_effect(values["objective"])
    if values["train"].get("more_steps") and values["train"].get("schedule", "settle") != "settle":
        problems.append("train.more_steps has no effect: only the schedule settle waits for the target")
    if problems:
        raise ConfigError("\n  ".join(problems), hint="see `qunlearn forget --help`; keys are section.name")
    name = str(values["objective"].get("name", SETTINGS["objective.name"].default))
    for key, value in PRESETS[name].items():
        section, leaf = key.split(".")
        values[section].setdefault(leaf, value)
    hints = typing.get_type_hints(Config)
    return Config(**{name: hints[name](**leaves) for name, leaves in values.items()})


def _without_effect(objective: Mapping[str, Any]) -> list[str]:
    """Return what to say of weights that an objective ignores: any but its own, and 0, which leaves a term out."""
    name = objective.get("name")
    if name not in WEIGHS_ITSELF:
        return []
    problems = []
    for leaf in ("eps1", "eps2", "eps3", "eps5", "retain_budget"):
        own = PRESETS[name].get(f"objective.{leaf}", SETTINGS[f"objective.{leaf}"].default)
        if objective.get(leaf, own) not in (own, 0, None):
            problems.append(f"objective.{leaf} has no effect: {name} takes the weights from the gradients themselves")
    return problems


def _suggest(key: str) -> str:
    known = list(SETTINGS)
    close = [k for k in known if k.split(".")[1] == key.split(".")[-1].replace("-", "_")]
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _shown(value: object) -> str:
    """A value in a message: of an alias bomb its whole repr would not fit into memory."""
    short = reprlib.Repr()
    short.maxlevel = 2
    return short.repr(value)[:80]


def _coerce(setting: Setting, value: Any) -> Any:
    kind, key = setting.base_type, setting.key
    if value is None or (setting.optional and isinstance(value, str) and value.lower() in ("auto", "none", "null")):
        if setting.optional:
            return None
        raise ValueError(f"{key} needs a value")
    if kind is bool:
        return _coerce_bool(key, value)
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{key} must be a text, not {_shown(value)}")
        if setting.choices and value not in setting.choices:
            raise ValueError(f"{key} must be one of {', '.join(setting.choices)}, not {_shown(value)}")
        if key == "model.vram":
            _coerce_size(value)
        # No shell has seen the text of a file; what is no home stays as it is.
        return os.path.expanduser(value) if key in PATHS else value  # noqa: PTH111
    return _coerce_number(setting, value)


def _coerce_size(value: str) -> None:
    try:
        parse_size(value, "model.vram")
    except ConfigError as error:
        raise ValueError(f"{error}; {error.hint}") from None


def _coerce_bool(key: str, value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(f"{key} must be true or false, not {_shown(value)}")


def _coerce_number(setting: Setting, value: Any) -> Any:
    kind, key = setting.base_type, setting.key
    # A flag's number is a text; int() and float() would read other scripts' digits too.
    texts = isinstance(value, str) and value.isascii()
    if isinstance(value, bool) or not (texts or isinstance(value, (int, float))):
        raise ValueError(f"{key} must be a number, not {_shown(value)}")
    try:
        number = _exact(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{key} must be a number, not {_shown(value)}") from None
    if kind is int and isinstance(number, float):
        if not number.is_integer():
            raise ValueError(f"{key} must be a whole number, not {_shown(value)}")
        number = int(number)
    low, high = setting.least, setting.most
    if number != number or number < low:
        raise ValueError(f"{key} must be at least {low:.12g}, not {_shown(value)}")
    if number > high:
        raise ValueError(f"{key} must be at most {_bound(high)}, not {_shown(value)}")
    return kind(number)


def _exact(value: float | str) -> int | float:
    """A number as it is: a seed beyond 2^53 is no float. Raises ValueError, OverflowError."""
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        return float(value)


def _bound(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def parse_set(assignments: Sequence[str]) -> dict[str, Any]:
    """`--set section.key=value` texts as an overlay. Raises ConfigError."""
    out: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"not of the form section.key=value: {text[:60]!r}", where="--set")
        out[key.strip()] = value.strip()
    return out


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds. Raises ConfigError with the file and line."""
    import yaml

    from qunlearn.config.yaml_core import load_yaml

    try:
        return load_yaml(read_text(path, _MAX_RECIPE_BYTES, pipes=True))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text", where=str(path)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"is not YAML: {getattr(error, 'problem', None) or error}", where=where) from None
    except RecursionError:
        raise ConfigError("is nested too deeply", where=str(path)) from None
    except (ValueError, TypeError, OverflowError, KeyError, AttributeError) as error:
        # dates that are none, numbers of thousands of digits, a NUL in the path: the YAML library lets them through
        raise ConfigError(f"is not YAML that can be read: {str(error)[:200]}", where=str(path)) from None


def read_config_file(path: Path) -> dict[str, Any]:
    """A YAML recipe or a run's config.yaml as an overlay. Relative data paths are kept as they stand.

    Trust in a model's code is left out: who is given a file has not given that. Raises ConfigError with file and line.
    """
    raw = read_yaml(path)
    if raw is None:
        return {}
    if isinstance(raw, dict):
        raw.pop(RECIPE, None)
    sections = {f.name for f in dataclasses.fields(Config)}
    out: dict[str, Any] = {}
    problems: list[str] = []
    for section, leaves in raw.items() if isinstance(raw, dict) else [(None, None)]:
        if section in sections and leaves is None:  # all of it commented out
            continue
        if section in sections and isinstance(leaves, dict):
            out.update({f"{section}.{name}": value for name, value in leaves.items()})
        elif section in sections:
            problems.append(f"section {section!r} holds settings, one a line, not {_shown(leaves)}")
        else:
            close = difflib.get_close_matches(str(section), sections, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; sections are {', '.join(sorted(sections))}"
            what = f"section {str(section)[:40]!r} does not hold settings by name"
            problems.append(what if section in sections else f"unknown section {str(section)[:40]!r}{hint}")
    if problems:
        raise ConfigError("\n  ".join(problems), where=str(path))
    out.pop(TRUST, None)
    return out


def to_yaml(config: Config) -> str:
    """The whole configuration, every value written out, as `read_config_file` reads it."""
    from qunlearn.config.yaml_core import dump_yaml

    return dump_yaml(dataclasses.asdict(config))
