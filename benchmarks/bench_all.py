"""`make bench`: steps and rows in one process, for the libraries take a while to come up; then several processes.

python benchmarks/bench_all.py [OPTION OF bench_engine.py ...]
"""

from __future__ import annotations

import sys

import bench_engine as engine
import bench_processes as processes
import bench_rows as rows


def main() -> None:
    engine.main(["--write", *sys.argv[1:]])
    rows.main(["--write"], typed="make bench")
    processes.main(["--write"], typed="make bench")


if __name__ == "__main__":
    main()
