"""Parse and print sizes and dates as people write them."""

from __future__ import annotations

import datetime
import re

from qunlearn.errors import ConfigError

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {f"{letter}{i}": 1 << 10 * n for n, letter in enumerate("kmgt", 1) for i in ("", "ib")}

_MOST_BYTES = 1 << 60  # far beyond any machine


def parse_size(text: str, where: str) -> int:
    """Bytes of 6GiB, 6144MiB or 6G (powers of 1024), or of 6GB (10^9). Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-zA-Z]+)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or not 0 < float(match[1]) * unit <= _MOST_BYTES:
        hint = "a number and a unit: 6GiB, 6144MiB or 6G in powers of 1024, 6GB in powers of 1000"
        raise ConfigError(f"not a size: {text[:40]!r}", where=where, hint=hint)
    return int(float(match[1]) * unit)


def date_of(seconds: float) -> str:
    """Return a moment, in seconds since 1970, as ISO 8601 in UTC: 2026-11-29T12:00:00+00:00."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")


def show_size(size: float) -> str:
    """A size for people, in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
