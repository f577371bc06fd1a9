"""Runs that are killed at random moments; benchmarks/kill.py kills 100 times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the script forks its runs")
def test_three_kills_leave_nothing_and_change_nothing():
    command = [sys.executable, str(ROOT / "benchmarks" / "kill.py"), "--kills", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert run.returncode == 0, run.stderr + run.stdout
    lines = run.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["measure", "sweep", "score"]
    assert all(line.endswith("bit-equal, nothing left behind") for line in lines)
