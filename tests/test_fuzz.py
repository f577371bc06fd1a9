"""Odd calls over the public API give a value or one of the package's errors, and never an error from below.

They run in a process of their own, without the checks of types that the tests install: as users call the package.
"""

import importlib
import json
import os
import subprocess
import sys

import pytest

import hooked_mllm
from helpers.fresh import ROOT

#: public names whose calls are not tried, and why
NOT_CALLED = {
    "AttentionBackend": "a Protocol",
    "AttentionView": "made by `measure`; metrics call it in tests/measuring",
    "HeadMetric": "a base class",
    "Intervention": "a base class",
    "HookedConfig": "made by the model",
    "TokenLayout": "made by `prepare`; its methods are called",
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The calls by door, and those that failed; in a folder of their own, as odd titles are names of files."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "helpers.odd_calls"]
    folder = tmp_path_factory.mktemp("odd")
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=550)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout[run.stdout.rindex('{\n "calls"') :])


def test_at_least_500_calls(outcome):
    assert sum(outcome["calls"].values()) >= 500
    assert min(outcome["calls"].values()) >= 4


def test_every_call_gives_a_value_or_an_error_of_ours(outcome):
    assert not outcome["failures"], json.dumps(outcome["failures"], indent=1)


def test_every_public_callable_is_called(outcome):
    names = {name for name in vars(hooked_mllm)["__all__"] if callable(getattr(hooked_mllm, name))}
    names = {name for name in names if not name.endswith("Error")} - NOT_CALLED.keys()
    assert names <= {door.partition(".")[0] for door in outcome["calls"]}
    for package in ("objectives", "corruptions", "plots"):
        module = importlib.import_module(f"hooked_mllm.{package}")
        functions = {
            name for name, value in vars(module).items() if getattr(value, "__module__", "").startswith(module.__name__)
        }
        functions = {
            name for name in functions if not isinstance(getattr(module, name), type) and not name.startswith("_")
        }
        assert functions <= {door.partition(".")[0] for door in outcome["calls"]}, package


def test_the_methods_of_the_model_are_called(outcome):
    methods = {
        n for n in dir(hooked_mllm.HookedMLLM) if not n.startswith("_") and callable(getattr(hooked_mllm.HookedMLLM, n))
    }
    methods -= {"check", "hook_points", *dir(object)}  # two have no arguments; nnsight gives every object a method
    assert methods <= outcome["calls"].keys()
