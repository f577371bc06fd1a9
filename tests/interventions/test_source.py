"""Caches, tensors and mappings in place of a run's activations, and those that do not fit."""

import pytest
import torch

from helpers.intervention_witness import listen, o_proj, sample, z_replaced
from helpers.tiny import HEAD_DIM, tiny_image
from helpers.wrapped import plain, wrapped
from hooked_mllm import ActivationPatch, HeadPatch
from hooked_mllm.errors import HookValueError, LayoutError


@torch.no_grad()
def test_positions_of_a_run_of_another_length(family):
    model, inputs, other = wrapped(family), sample(family, 0), sample(family, 1)
    assert len(inputs) != len(other)
    _, cache = model.run_with_cache(other)
    with model.intervene(HeadPatch("L1H0 L1H2", cache, positions="last", source_positions="last")):
        got = model(inputs)

    def change(z, layer):
        z[:, -1, [0, 2]] = cache["z", 1][:, -1, [0, 2]]
        return z

    with z_replaced(family, change, [1]) as witness:
        assert torch.equal(got, witness(**inputs.inputs).logits)
    with pytest.raises(LayoutError, match="the numbers must be equal"):
        with model.intervene(ActivationPatch("z", cache, positions="question", source_positions="question")):
            model(inputs)


@torch.no_grad()
def test_tensors_in_place_of_a_cache(family):
    model, inputs = wrapped(family), sample(family)
    n = len(inputs)
    new = torch.randn(1, n, 4, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    handle = listen(o_proj(plain(family), 1), "in", lambda x: new.flatten(2))
    expected = plain(family)(**inputs.inputs).logits
    handle.remove()
    for patch in (
        ActivationPatch("z", new, layers=1),
        ActivationPatch("z", {1: new}),
        ActivationPatch("blocks.1.attn.hook_z", new),
        HeadPatch([(1, h) for h in range(4)], new),
        HeadPatch([(1, h) for h in range(4)], {1: new}),
    ):
        with model.intervene(patch):
            assert torch.equal(model(inputs), expected)
    with pytest.raises(HookValueError, match="patch of blocks.1.attn.hook_z has shape"):
        with model.intervene(ActivationPatch("z", new[..., :5], layers=1)):
            model(inputs)
    with pytest.raises(HookValueError, match="cannot be z of 2 layers"):
        HeadPatch([(0, 0), (1, 0)], new).validate(model)
    with pytest.raises(HookValueError, match="Specify the layer"):
        ActivationPatch("z", new).validate(model)


@torch.no_grad()
def test_a_run_with_other_token_counts_is_named_and_rejected(family):
    model, inputs, other = wrapped(family), sample(family, 0), sample(family, 1)
    _, cache = model.run_with_cache(other)
    visual = [int(s.mask("visual").sum()) for s in (other, inputs)]
    message = rf"{len(other)} \({visual[0]} visual\) tokens; this run has {len(inputs)} \({visual[1]} visual\) tokens"
    for patch in (HeadPatch([(1, 0)], cache), ActivationPatch("pattern", cache, layers=1)):
        with pytest.raises(LayoutError, match=message), model.intervene(patch):
            model(inputs)
    assert not model.list_hooks()


@torch.no_grad()
def test_images_of_other_sizes_do_not_fit_the_vision_tower():
    model = wrapped("qwen3_vl")
    _, cache = model.run_with_cache(sample("qwen3_vl"))
    other = model.prepare("What colour is the mug?", images=tiny_image(16, 16))
    with pytest.raises(LayoutError, match="images are of other sizes"):
        with model.intervene(ActivationPatch("resid_post", cache, layers=0, tower="vision")):
            model(other)


def test_arrays_in_a_mapping_are_rejected():
    for make in (lambda given: ActivationPatch("z", given), lambda given: HeadPatch("L2H0", given)):
        with pytest.raises(HookValueError, match=r"has a ndarray at 2: torch\.as_tensor"):
            make({2: torch.zeros(1, 3, 4, HEAD_DIM).numpy()})
