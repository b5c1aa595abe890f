"""Turn a matplotlib figure into SVG for a page: coloured by its theme, without style attributes.

Colours are drawn as placeholders and replaced by CSS variables, so that one drawing serves light, dark and print. Style
attributes become presentation attributes: the page's Content-Security-Policy then forbids inline styles altogether.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# What a colour is for, and the placeholder it is drawn in.
ROLES = (
    "ink",
    "muted",
    "grid",
    "paper",
    "base",
    "adapter",
    "retrained",
    "one",
    "two",
    "three",
    "bad",
    "good",
    "guarded",
)
COLOUR = {role: f"#0{i:x}0{i:x}0{i:x}" for i, role in enumerate(ROLES, 1)}
_VARIABLE = {colour: f"var(--{role})" for role, colour in COLOUR.items()}
_FONT = re.compile(r"(?:^|\s)([\d.]+)px\b")


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an `<svg>` element. `name` makes its ids its own; `label` is what a screen reader says."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        _plain(element, name)
    for attribute in ("width", "height"):  # the page decides
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-label", label)
    root.set("class", "plot")
    return ET.tostring(root, encoding="unicode")


def _plain(element: ET.Element, name: str) -> None:
    """Turn a style attribute into presentation attributes, and make ids the figure's own."""
    for declaration in element.attrib.pop("style", "").split(";"):
        key, _, value = declaration.partition(":")
        key, value = key.strip(), value.strip()
        if key == "font":
            size = _FONT.search(value)
            if size:
                element.set("font-size", size[1])
            if "bold" in value or "700" in value:
                element.set("font-weight", "bold")
        elif key:
            element.set(key, _VARIABLE.get(value, value))
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif value.startswith("#") and key.endswith("href"):
            element.set(key, f"#{name}-{value[1:]}")
        elif value.startswith("url(#"):
            element.set(key, f"url(#{name}-{value[5:]}")
        elif value in _VARIABLE:
            element.set(key, _VARIABLE[value])
