"""beartype cannot be imported after nnsight; the package can, and then does not check arguments."""

import subprocess
import sys

from helpers.fresh import ROOT, modules_after

AFTER_NNSIGHT = """
import warnings
import nnsight

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import hooked_mllm
    from hooked_mllm import Box, HookedMLLM, metrics, objectives, plots
    from hooked_mllm.metrics import functional
    from hooked_mllm.checks import shapes, typechecker
messages = [str(warning.message) for warning in caught if "beartype" in str(warning.message)]
assert len(messages) == 1 and "Import hooked_mllm first" in messages[0], messages
assert typechecker.typechecker is None and shapes.typechecker is None
assert Box(1, 2, 3, 4).x1 == 3
model = HookedMLLM.from_pretrained("toy-qwen3-vl")
assert model.prepare("Where is the red digit?").id is None
"""


def test_the_package_is_imported_after_nnsight():
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", AFTER_NNSIGHT]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_arguments_are_checked_before_nnsight():
    code = """
import hooked_mllm, nnsight
from hooked_mllm.checks import typechecker
assert typechecker.typechecker is not None
try:
    hooked_mllm.Box("1", 2, 3, 4)
except hooked_mllm.InputError as error:
    assert str(error).startswith("Box: expected x0 as"), error
else:
    raise AssertionError("a text is no coordinate")
"""
    assert "nnsight" in modules_after(code)
