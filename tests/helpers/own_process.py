"""Runs a file of cases in a separate process: pytest with only its own plugins and without type checks.

Triton reads `TRITON_INTERPRET` when it is first imported, which may be before any test; and checks of shapes and types
would answer bad input before the errors that the cases expect.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

CASES = Path(__file__).with_name("kernel_cases")
ROOT = Path(__file__).parents[2]


def run_cases(file: Path | str, **environment: str) -> tuple[int, int]:
    """How many cases of a file passed and were skipped, if none failed; the kernels run on a GPU or are interpreted.

    A file without a folder is one of tests/helpers/kernel_cases.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", str(CASES / file)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # other plugins may warn, and warnings are errors
        "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1",
        **environment,
    }
    run = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    counts = [re.search(rf"(\d+) {outcome}", run.stdout.splitlines()[-1]) for outcome in ("passed", "skipped")]
    passed, skipped = (0 if count is None else int(count[1]) for count in counts)
    return passed, skipped
