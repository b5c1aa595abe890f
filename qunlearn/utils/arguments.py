"""Arguments of the public functions: checked against their signatures, as the command line checks its own."""

from __future__ import annotations

import functools
import inspect
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from qunlearn.errors import ConfigError

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _is_path(value: object) -> bool:
    return isinstance(value, (str, os.PathLike))


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


# An annotation as it is written: what its values are, and what they are called.
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "FilePath": (_is_path, "a path"),
    "str": (lambda value: isinstance(value, str), "a text"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "int": (lambda value: _is_number(value, numbers.Integral), "a whole number"),
    "float": (lambda value: _is_number(value, numbers.Real), "a number"),
    "Mapping[str, Any]": (lambda v: isinstance(v, Mapping) and all(isinstance(key, str) for key in v), "a dict"),
    "Sequence[FilePath]": (
        lambda value: isinstance(value, Sequence) and not _is_path(value) and all(map(_is_path, value)),
        "a list of paths",
    ),
}


def typed(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a public function refuse, by name, what is of another kind than its signature says; a path is a text too.

    The function then raises ConfigError.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            parameter = signature.parameters[name]
            if parameter.kind is not parameter.VAR_KEYWORD:
                given.arguments[name] = _checked(f"{function.__name__}({name})", value, str(parameter.annotation))
        return function(*given.args, **given.kwargs)

    return call


def _checked(where: str, value: Any, annotation: str) -> Any:
    kind = annotation.removesuffix(" | None")
    if value is None and kind != annotation:
        return None
    if kind == "str" and isinstance(value, os.PathLike):
        value = os.fspath(value)
    fits, words = _KINDS[kind]
    if not fits(value):
        message = f"must be {words}; it is of type {type(value).__name__}"  # the value may be rows to forget
        raise ConfigError(message, where=where, hint="the function's help() says what it takes")
    return value
