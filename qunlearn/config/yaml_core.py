"""Read YAML by the core schema of YAML 1.2, and refuse duplicate keys.

In YAML 1.1, which the library reads, `on` is true, 010 is eight and 1:30 is ninety; and of a key that is there twice
the first is lost without a word.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as the library declares it

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    problem = f"the key {key.value[:40]!r} is there twice, first in line {seen[key.value]}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen[key.value] = line
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version would read as something else than a text."""


def _int(loader: _Loader, node: Any) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


def _float(loader: _Loader, node: Any) -> float:
    # .inf and .nan are written with a point
    text = loader.construct_scalar(node)
    return float(text.replace(".", "", 1) if text.strip("+-")[1:2].isalpha() else text)


for _name, _pattern, _first in _RESOLVERS:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def load_yaml(text: str) -> Any:
    """Return what a text holds. Raises yaml.YAMLError, and what the library lets through (see `read_yaml`)."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def dump_yaml(tree: Any) -> str:
    """Return a tree as `load_yaml` reads it."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
