"""Runs the cases of hybrid attention in a process of their own.

Triton reads `TRITON_INTERPRET` when it is first imported, which may be before any test, and its compiler reads the
source of kernels, which the shape checks of the other tests would wrap.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HELPERS = Path(__file__).parents[1] / "helpers"


def passed(name, **environment):
    """How many cases of a file passed, if none failed and none was skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", str(HELPERS / name)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HELPERS.parents[1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
    return int(re.search(r"(\d+) passed", done.stdout).group(1))


def test_hybrid_attention():
    assert passed("hybrid_attention_cases.py", TRITON_INTERPRET="0" if torch.cuda.is_available() else "1") > 65


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels as they are compiled, at full size")
def test_hybrid_attention_on_a_gpu():
    assert passed("hybrid_attention_gpu_cases.py", TRITON_INTERPRET="0") > 80
