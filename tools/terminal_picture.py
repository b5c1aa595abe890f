"""What a command printed, as an SVG of a terminal.

    COMMAND 2>&1 | python tools/terminal_picture.py TITLE OUT.svg

`--last N` keeps the last lines only; `--columns N` is the width. No font is fetched: the viewer's own is used.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

_FETCHED_FONTS = re.compile(r"@font-face\s*\{.*?\}", re.S)


def picture(text: str, title: str, columns: int) -> str:
    """The text in a terminal of so many columns; colours are kept where it has any."""
    console = Console(record=True, width=columns, file=io.StringIO(), highlight=False)
    console.print(Text.from_ansi(text), soft_wrap=False)
    svg = console.export_svg(title=title, unique_id=re.sub(r"\W+", "-", title)[:20].strip("-").lower())
    return _FETCHED_FONTS.sub("", svg).replace("Fira Code", "ui-monospace, Menlo, Consolas")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("title")
    parser.add_argument("output", type=Path)
    parser.add_argument("--last", type=int, default=0)
    parser.add_argument("--columns", type=int, default=96)
    args = parser.parse_args()
    lines = [line.rstrip() for line in sys.stdin.read().splitlines()]
    kept = lines[-args.last :] if args.last else lines
    args.output.write_text(picture("\n".join(kept), args.title, args.columns), encoding="utf-8")


if __name__ == "__main__":
    main()
