"""Put tools/ and benchmarks/, whose helpers the studies share, on the import path."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
for name in ("benchmarks", "tools"):
    if str(_ROOT / name) not in sys.path:
        sys.path.append(str(_ROOT / name))
