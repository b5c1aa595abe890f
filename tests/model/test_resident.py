"""Memory that a library keeps for every shape it has seen: bounded, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@pytest.mark.parametrize(("theirs", "kept"), [({}, "32"), ({CAPACITIES[1]: "7"}, "7")])
def test_few_compiled_products_are_kept_unless_the_user_says_otherwise(theirs: dict[str, str], kept: str) -> None:
    """What the test below depends on: set where any model is loaded, before torch reads it."""
    code = f"import os, qunlearn.model; print(*(os.environ[name] for name in {CAPACITIES}))"
    environment = {k: v for k, v in os.environ.items() if k not in CAPACITIES} | theirs
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.split() == ["32", kept]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone tells what is in use")
def test_steps_of_ever_other_sizes_keep_no_memory() -> None:
    """oneDNN keeps up to 1,024 compiled products with their buffers: 15 MiB a step with even the smallest model."""
    tiny = [sys.executable, str(ROOT / "benchmarks" / "bench_resident.py"), "--tiny", "--steps", "10"]
    environment = {k: v for k, v in os.environ.items() if k not in CAPACITIES}
    ran = subprocess.run(tiny, capture_output=True, text=True, check=True, env=environment | {"OMP_NUM_THREADS": "1"})
    in_use = {int(line.split()[0]): int(line.split()[2]) for line in ran.stdout.splitlines()[:3]}
    assert sorted(in_use) == [1, 3, 10]
    assert in_use[1] > 50
    assert in_use[10] - in_use[3] < 20
