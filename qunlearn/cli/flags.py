"""Make flags from the settings, so that help text and default come from one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from qunlearn.config.fields import Setting
from qunlearn.config.resolve import parse_set, read_config_file, resolve
from qunlearn.config.settings import SETTINGS, Config
from qunlearn.errors import ConfigError

# One file has one name in all commands, and the paper's letters have words.
ALIASES = {
    "--output": "-o",
    "--bad": "--forget",
    "--normal": "--retain",
    "--eps1": "--forget-weight",
    "--eps2": "--mismatch-weight",
    "--eps3": "--retain-weight",
}
_PANELS = {
    "model": "Model",
    "data": "Data",
    "lora": "Adapter (LoRA)",
    "objective": "Objective",
    "train": "Training",
    "stop": "Early stopping",
    "output": "Output",
}


def configured(options: dict[str, Any], *, resume: bool = False) -> Config:
    """The configuration from a command's options; takes those that lay it down out of them.

    With `resume` the settings of the unfinished run in --output come before all others.
    """
    return resolve(*overlays_of(options, resume=resume))


def overlays_of(options: dict[str, Any], *, resume: bool = False) -> list[tuple[str, Mapping[str, Any]]]:
    """Return what `configured` resolves, later ones winning; takes the options out of `options` likewise."""
    recipe: Path | None = options.pop("config")
    assignments = options.pop("set")
    flags = {s.key: options[_name(s.key)] for s in SETTINGS.values() if options.get(_name(s.key)) is not None}
    overlays: list[tuple[str, Mapping[str, Any]]] = []
    if resume and flags.get("output.folder"):
        from qunlearn.training.resume import stored_settings

        overlays.append(("the unfinished run", stored_settings(Path(flags["output.folder"]))))
    if recipe is not None:
        overlays.append((str(recipe), read_config_file(recipe)))
    return [*overlays, ("--set", parse_set(assignments or [])), ("command line", flags)]


def check_unused(by: str, given: Mapping[str, bool]) -> None:
    """Refuse flags that were given and would do nothing. Raises ConfigError."""
    unused = [flag for flag, was_given in given.items() if was_given]
    if unused:
        raise ConfigError(f"of no use with {by}", where=", ".join(unused), hint="leave it out")


def _name(key: str) -> str:
    return key.replace(".", "_")


def option(kind: Any, default: Any, *names: str, **info: Any) -> Any:
    return Annotated[kind, typer.Option(*names, **info)], default


def add_flags(body: Callable[..., None], keys: Sequence[str] | None = None, **own: tuple[Any, Any]) -> None:
    """Give a command a flag for each setting that has one (or for `keys`), and options of its own."""
    made: dict[str, tuple[Any, Any]] = {
        "config": option(Optional[Path], None, "--config", "-c", help="A recipe or a run's config.yaml; flags win."),  # noqa: UP045
        "set": option(Optional[list[str]], None, "--set", help="Any other setting: section.key=value."),  # noqa: UP045
        **own,
        "json": option(bool, False, "--json", help="One machine-readable result on stdout."),
    }
    for setting in SETTINGS.values():
        if setting.flag is None or (keys is not None and setting.key not in keys):
            continue
        info: dict[str, Any] = {"rich_help_panel": _PANELS[setting.key.split(".")[0]]}
        kind: Any = Optional[str]  # noqa: UP045
        if setting.base_type is bool:
            kind = Optional[bool]  # noqa: UP045
        else:
            info["metavar"] = _metavar(setting)
        names = [setting.flag, *([ALIASES[setting.flag]] if setting.flag in ALIASES else [])]
        help_text = setting.help + _default_text(setting)
        made[_name(setting.key)] = option(kind, None, *names, help=help_text, show_default=False, **info)
    _sign(body, made)


def take_parameters(body: Callable[..., None], function: Callable[..., Any], kinds: Mapping[str, Any]) -> None:
    """Give a command the parameters of a public function as options of these kinds, in this order: names and defaults
    are the function's own. `show` is left to --json."""
    found = inspect.signature(function).parameters
    assert kinds.keys() == found.keys() - {"show"}
    made = {name: (kind, found[name].default) for name, kind in kinds.items()}
    _sign(body, made | {"json": option(bool, False, "--json", help="One machine-readable result on stdout.")})


def _sign(body: Callable[..., None], made: Mapping[str, tuple[Any, Any]]) -> None:
    """Typer reads names and defaults from the signature and from __annotations__; both are made, not written."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, keyword, annotation=kind, default=default) for name, (kind, default) in made.items()
    ]
    body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    body.__annotations__ = {name: kind for name, (kind, _) in made.items()}


def _metavar(setting: Setting) -> str:
    if setting.choices:
        return "|".join(setting.choices)
    return {int: "INTEGER", float: "NUMBER"}.get(setting.base_type, "TEXT")


def _default_text(setting: Setting) -> str:
    if setting.base_type is bool or setting.default == "" or (setting.default is None and setting.base_type is str):
        return ""
    return f" (default: {'auto' if setting.default is None else setting.default})"
