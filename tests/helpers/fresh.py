"""What a new Python process has imported after a piece of code."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRINT = "\nimport json as _json, sys as _sys\nprint('\\n' + _json.dumps(sorted(_sys.modules)))"


def modules_after(code: str) -> set[str]:
    """Names of the modules that are imported once `code` has run; a warning or an error fails."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code + PRINT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))
