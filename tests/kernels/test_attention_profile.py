"""Runs the cases of attention profiles in a process of their own; see test_hybrid_attention.py for why."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

CASES = Path(__file__).parents[1] / "helpers" / "attention_profile_cases.py"


def test_attention_profile():
    gpu = torch.cuda.is_available()
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, "TRITON_INTERPRET": "0" if gpu else "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CASES.parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    skipped = re.search(r"(\d+) skipped", done.stdout)
    assert passed > 28
    assert (0 if skipped is None else int(skipped.group(1))) == (0 if gpu else 12), "what only a GPU can run is skipped"
