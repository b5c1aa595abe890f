"""Say how threads on a CPU wait for each other. Only effective before torch is imported."""

from __future__ import annotations

import os

_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPINS = 1000  # some 20 us: longer than a gap between two operations, far shorter than another program's turn


def spin_briefly() -> None:
    """Let an OpenMP thread that waits spin for microseconds, then sleep, unless the environment says something else.

    By default GNU's OpenMP, which torch's wheels for Linux carry, spins for milliseconds: beside another program that
    computes, threads spin away the turns of those they wait for.
    Source: https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
    """
    if not any(name in os.environ for name in _SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
