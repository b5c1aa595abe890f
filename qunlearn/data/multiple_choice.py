"""Find the right option of a multiple-choice question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qunlearn.utils.text import is_clean


def chosen(choices: object, key: object) -> tuple[str, list[str]]:
    """Return the text of the choice that a number, a letter, a label or the text itself names, and the others.

    Raises ValueError.
    """
    options, labels = _options(choices)
    at = _place(key, options, labels)
    if at is None:
        raise ValueError(f"the answer names none of the {len(options)} choices")
    return options[at], [option for i, option in enumerate(options) if i != at]


def _options(value: object) -> tuple[list[str], list[str]]:
    """The texts of the choices, and their labels."""
    labels: object = None
    if isinstance(value, Mapping):
        labels, value = value.get("label"), value.get("text")
    if not isinstance(value, list) or not all(isinstance(v, str) and is_clean(v) for v in value):
        raise ValueError("'choices' is not a list of texts")
    if isinstance(labels, list) and len(labels) == len(value):
        return value, [str(label) for label in labels]
    return value, [chr(ord("A") + i) for i in range(len(value))]


def _place(key: object, options: Sequence[str], labels: Sequence[str]) -> int | None:
    """Which choice is meant, by number, letter or text."""
    if isinstance(key, int) and not isinstance(key, bool):
        return key if 0 <= key < len(options) else None
    if not isinstance(key, str):
        return None
    for names in (options, labels, [label.lower() for label in labels]):
        if key.strip() in names:
            return list(names).index(key.strip())
    return _place(int(key), options, labels) if key.strip().isdecimal() and key.isascii() and len(key) < 4 else None
