"""How threads on a CPU wait: set for the command line before torch is there, never against the user's own setting."""

import subprocess
import sys

import pytest

from qunlearn.utils.threads import SPINS

CODE = """
import os, sys
sys.argv = ["qunlearn", "--version"]
from qunlearn.cli.app import main
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, f"{SPINS} None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE")],
)
def test_the_command_line_says_how_long_threads_spin(given, found, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == found
