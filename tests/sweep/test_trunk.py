"""A recorded run, resumed at any block and any position, against whole runs."""

import pytest
import torch

from helpers.intervention_witness import batch, sample
from helpers.wrapped import LAYERS, noise, plain, wrapped
from hooked_mllm.objectives import gather_logits
from hooked_mllm.sweep import Trunk

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(params=["one sample", "padded batch"])
def recorded(request, family):
    """Model, inputs, the trunk of a run, and all logits of a whole run."""
    model = wrapped(family)
    inputs = sample(family) if request.param == "one sample" else batch(family)
    resolved = model.resolve(inputs)
    with torch.no_grad():
        whole = model(inputs)
    return model, inputs, Trunk.record(model, resolved), whole


def positions_of(inputs):
    """The last position of each sample."""
    return torch.full((len(inputs.inputs["input_ids"]), 1), inputs.inputs["input_ids"].shape[1] - 1)


@torch.no_grad()
def test_the_recorded_streams_are_those_of_a_cache(recorded):
    model, inputs, trunk, _ = recorded
    _, cache = model.run_with_cache(inputs)
    assert trunk.n_layers == LAYERS and len(trunk.residual) == LAYERS + 1
    for layer in range(LAYERS):
        torch.testing.assert_close(trunk.residual[layer], cache["resid_pre", layer])
        assert torch.equal(trunk.start(layer, 2)[::2], trunk.residual[layer])
    torch.testing.assert_close(trunk.attention[1].k.transpose(1, 2), cache["rot_k", 1])


@pytest.mark.parametrize("layer", range(LAYERS + 1))
@torch.no_grad()
def test_resumed_at_any_block_it_has_the_logits_of_the_run(recorded, layer):
    _, inputs, trunk, whole = recorded
    residual = trunk.resume(layer, trunk.start(layer, repeats=2))
    logits = trunk.logits(residual, positions_of(inputs))
    expected = gather_logits(whole, positions_of(inputs)).repeat_interleave(2, 0)
    torch.testing.assert_close(logits, expected, **CLOSE)


@torch.no_grad()
def test_resumed_from_a_later_position(recorded):
    _, inputs, trunk, whole = recorded
    first = inputs.inputs["input_ids"].shape[1] - 4
    residual = trunk.resume(1, trunk.start(1, repeats=3, first=first), first=first)
    assert residual.shape[1] == 4
    torch.testing.assert_close(residual[::3], trunk.residual[-1][:, first:], **CLOSE)
    early = torch.cat([positions_of(inputs), positions_of(inputs) - 10], 1)  # one before `first`
    expected = gather_logits(whole, early).repeat_interleave(3, 0)
    torch.testing.assert_close(trunk.logits(residual, early, first), expected, **CLOSE)


@torch.no_grad()
def test_an_edited_stream_gives_what_a_hook_on_the_plain_model_gives(family):
    model, inputs = wrapped(family), sample(family)
    trunk = Trunk.record(model, model.resolve(inputs))
    edited = trunk.start(2, 1) + noise(trunk.start(2, 1))
    got = trunk.logits(trunk.resume(2, edited), positions_of(inputs))
    block = plain(family).model.language_model.layers[2]

    def replace(module, args, kwargs):
        return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

    handle = block.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        expected = plain(family)(**inputs.inputs).logits[:, -1:]
    finally:
        handle.remove()
    torch.testing.assert_close(got, expected, **CLOSE)


@torch.no_grad()
def test_it_stops_before_a_block(recorded):
    _, _, trunk, _ = recorded
    middle = trunk.resume(0, trunk.start(0, 1), stop=2)
    torch.testing.assert_close(middle, trunk.residual[2], **CLOSE)


@torch.no_grad()
def test_hooks_act_when_it_is_resumed_and_nothing_is_left(family):
    model, inputs = wrapped(family), sample(family)
    hook = ("blocks.1.attn.hook_z", lambda z, hook: z * 0)
    with model.hooks([hook]):
        expected = model(inputs)[:, -1:]
        trunk = Trunk.record(model, model.resolve(inputs))
        assert not trunk.alone
        got = trunk.logits(trunk.resume(1, trunk.start(1, 1)), positions_of(inputs))
        torch.testing.assert_close(got, expected, **CLOSE)
    assert trunk.alone and model.list_hooks() == {} and not any(site.taps for site in model.wiring.text)
    with model.attention(lambda q, k, v, mask, scale, layer: q.transpose(1, 2)):
        assert not trunk.alone
