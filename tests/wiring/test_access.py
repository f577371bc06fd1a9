"""The batch axis of packed towers, and the interface that every access to an activation has."""

import pytest
import torch

from helpers.wrapped import model_inputs, wrapped
from hooked_mllm.wiring.access import Access, add_batch_axis, remove_batch_axis


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (5, 2, 4)])
def test_only_packed_towers_lack_the_batch_axis(packed, shape):
    x = torch.randn(shape) if packed else torch.randn(3, *shape)
    batched = add_batch_axis(x, packed)
    assert batched.shape == ((1, *shape) if packed else (3, *shape))
    assert batched.data_ptr() == x.data_ptr(), "an edit in place reaches the module's tensor"
    assert torch.equal(remove_batch_axis(batched, packed), x)


def test_an_access_reads_and_writes():
    with pytest.raises(TypeError, match=r"abstract.*get.*put"):
        type("Neither", (Access,), {})()
    both = type("Both", (Access,), {"get": lambda self, call: None, "put": lambda self, call, value: None})
    assert both().watchers() == []


def test_packed_activations_have_a_batch_of_one():
    name = "vision.blocks.0.hook_resid_pre"
    _, cache = wrapped("qwen3_vl").run_with_cache(model_inputs("qwen3_vl", 2), names_filter=name)
    assert cache[name].shape[0] == 1 and cache[name].dim() == 3
