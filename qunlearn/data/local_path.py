"""Turn what a person typed into the path of a file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qunlearn.errors import ConfigError

_URL = re.compile(r"(https?|ftp|s3|gs|hf):/", re.IGNORECASE)  # Path() makes one slash of two


def local_path(text: str) -> Path:
    """Return the path that a text names, ~ being the home. Raises ConfigError for an address."""
    if _URL.match(text):
        hint = "download it, and give the file; `qunlearn data import` reads hub:OWNER/NAME"
        raise ConfigError("is an address, not a file", where=text[:200], hint=hint)
    return Path(os.path.expanduser(text))  # noqa: PTH111 - what is no home stays as it is
