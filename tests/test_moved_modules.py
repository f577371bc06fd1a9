"""Modules that moved can be imported by their earlier addresses, which are the same modules."""

import sys
from importlib import import_module

import pytest

from helpers.fresh import modules_after
from hooked_mllm.exports import MOVED_MODULES

#: what the manual of the version before the move listed by module
DOCUMENTED = {
    "attention.context": "ViewContext",
    "attention.protocol": "Metric ModelInfo",
    "attention.view": "AttentionView",
    "nnsight_bridge": "NNsightModel",
    "prepare": "Preparer",
    "sample": "Preparation Sample SampleBatch",
    "shared_prefix": "SharedPrefix reasons_to_run_whole",
    "video": "Video read_video",
    "images": "load_image",
    "measure": "measure",
    "metrics.functional.checked": "checked typechecker",
}


@pytest.mark.parametrize("address", MOVED_MODULES)
def test_earlier_addresses_are_the_modules(address):
    module = import_module(f"hooked_mllm.{address}")
    assert module is import_module(f"hooked_mllm.{MOVED_MODULES[address]}")
    assert module.__name__ == module.__spec__.name == f"hooked_mllm.{MOVED_MODULES[address]}"
    assert all(hasattr(module, name) for name in DOCUMENTED.get(address, "").split())


def test_documented_addresses_are_aliases():
    assert DOCUMENTED.keys() <= MOVED_MODULES.keys()


def test_earlier_addresses_load_on_use():
    addresses = {f"hooked_mllm.{address}" for pair in MOVED_MODULES.items() for address in pair}
    assert not addresses & modules_after("import hooked_mllm")
    loaded = modules_after("from hooked_mllm.sample import SampleBatch\nimport hooked_mllm\nhooked_mllm.video.Video")
    assert {"hooked_mllm.sample", "hooked_mllm.inputs.sample", "hooked_mllm.video"} <= loaded


def test_other_names_are_not_found():
    for name in ("hooked_mllm.nothing", "hooked_mllm.inputs.nothing"):
        with pytest.raises(ModuleNotFoundError, match=name):
            import_module(name)
    assert "hooked_mllm.nothing" not in sys.modules
