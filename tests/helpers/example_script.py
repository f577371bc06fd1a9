"""Imports the scripts of the examples folder."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def import_example(name: str) -> ModuleType:
    """A script as a module; the scripts that it imports are found next to it."""
    if not (EXAMPLES / f"{name}.py").is_file():
        pytest.skip("the examples are not next to the tests")
    sys.path.insert(0, str(EXAMPLES))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))
