"""`import hooked_mllm` loads little, names load on first use, and all of them are there."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hooked_mllm
from helpers.fresh import ROOT, modules_after

LAZY = ["hooked_mllm", "hooked_mllm.bench"]
OPTIONAL = {"scipy.stats", "scipy.ndimage", "matplotlib", "av", "nnsight", "torchmetrics", "jinja2"}
CLASSES = "Qwen3VLForConditionalGeneration, LlavaOnevisionForConditionalGeneration, InternVLForConditionalGeneration"


def declared(package):
    """The names of `from module import name as name` in a package's `__init__`, each with its module."""
    tree = ast.parse(Path(importlib.import_module(package).__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.asname: node.module for node in imports for alias in node.names if alias.asname}


def test_the_package_alone_imports_no_torch():
    imported = modules_after("import hooked_mllm\nassert 'HookedMLLM' in dir(hooked_mllm)\nhooked_mllm.__version__")
    assert not imported & {"torch", "transformers", "numpy", "PIL"}


def test_the_model_class_imports_no_more_than_torch_and_transformers():
    """What plain transformers imports for the three families may be there, and nothing of the rest."""
    plain = modules_after(f"import torch\nfrom transformers import {CLASSES}")
    ours = modules_after("import hooked_mllm\nfrom hooked_mllm import HookedMLLM\nassert isinstance(HookedMLLM, type)")
    assert {"torch", "transformers", "hooked_mllm.model.hooked_mllm"} <= ours
    assert not (ours - plain) & OPTIONAL


@pytest.mark.parametrize("package", LAZY)
def test_names_for_type_checkers_are_those_that_load(package):
    module, names = importlib.import_module(package), declared(package)
    names.pop("__version__", None)
    only = set(module.__all__) ^ names.keys()
    assert not only, f"names in only one half: {only}"
    assert len(module.__all__) == len(names) and set(names) <= set(dir(module))
    for name, source in names.items():
        held = getattr(importlib.import_module(source), name, None) or importlib.import_module(f"{source}.{name}")
        assert getattr(module, name) is held, name


def test_star_import_gives_the_public_names():
    held = {}
    exec("from hooked_mllm import *", held)
    assert held["HookedMLLM"] is hooked_mllm.HookedMLLM and held["metrics"] is hooked_mllm.metrics
    assert set(hooked_mllm.__all__) <= set(held)


def test_sub_packages_are_attributes():
    code = "import hooked_mllm\nassert hooked_mllm.heads.rho_half and hooked_mllm.datasets.RefCOCOg"
    assert {"hooked_mllm.heads", "hooked_mllm.datasets"} <= modules_after(code)


def test_a_name_that_is_not_there_is_an_attribute_error_with_a_suggestion():
    with pytest.raises(AttributeError, match="module 'hooked_mllm' has no attribute 'HookedMLM'"):
        hooked_mllm.HookedMLM
    assert not hasattr(hooked_mllm, "_nothing") and not hasattr(hooked_mllm, "nothing")
    with pytest.raises(ImportError, match="cannot import name 'HookedMLM'"):
        exec("from hooked_mllm import HookedMLM")
    run = subprocess.run(
        [sys.executable, "-c", "import hooked_mllm\nhooked_mllm.HookedMLM"],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "Did you mean: 'HookedMLLM'?" in run.stderr


def test_the_garbage_collector_is_as_it_was():
    """It pauses while a name loads, also where loading fails, and stays off where it was off."""
    code = """
import gc, hooked_mllm
hooked_mllm.HeadSet
assert gc.isenabled() and not hasattr(hooked_mllm, "nothing") and gc.isenabled()
gc.disable()
hooked_mllm.Box
assert not gc.isenabled()
"""
    assert "hooked_mllm.layout" in modules_after(code)


def test_metrics_check_shapes_although_nnsight_was_imported_in_between():
    """nnsight adds `save` to every object, after which beartype cannot be imported: the package imports it first."""
    code = """
import hooked_mllm, nnsight, torch
from hooked_mllm.metrics.functional import checked
assert checked.typechecker is not None
from hooked_mllm import corruptions, metrics, plots, toys
"""
    assert "nnsight" in modules_after(code)
