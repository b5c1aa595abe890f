"""`make bench`: engine.py and rows.py in one process, for the libraries take a while to come up.

python benchmarks/bench.py [OPTION OF engine.py ...]
"""

from __future__ import annotations

import sys

import engine
import rows


def main() -> None:
    engine.main(["--write", *sys.argv[1:]])
    rows.main(["--write"], typed="make bench")


if __name__ == "__main__":
    main()
