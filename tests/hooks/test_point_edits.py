"""Edits that autograd's version counter misses: they have the effect of a returned edit at every hook point."""

import pytest
import torch

from helpers.tiny import ALL_FAMILIES
from helpers.wrapped import edit, model_inputs, returned, wrapped
from hooked_mllm.errors import HookValueError
from hooked_mllm.hooks import HookPoint


def by_data(name):
    change = edit(name)

    def fn(x, hook):
        x.data.copy_(change(x.data))

    return fn


def by_numpy(name):
    change = edit(name)

    def fn(x, hook):
        x.detach().numpy()[...] = change(x.detach()).numpy()

    return fn


def by_new_data(name):
    change = edit(name)

    def fn(x, hook):
        x.data = change(x.data)

    return fn


STYLES = (by_data, by_numpy, by_new_data)
#: each style in two modes
MODES = {
    torch.enable_grad: (by_data, by_numpy),
    torch.no_grad: (by_data, by_new_data),
    torch.inference_mode: (by_numpy, by_new_data),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_every_edit_that_autograd_misses_is_that_of_a_returned_tensor(name, mode):
    model, inputs = wrapped(name), model_inputs(name)
    with mode():
        base = model(inputs)
        # the mixture of experts has Qwen3-VL's own tower
        tried = [n for n in model.hook_dict if n.startswith("blocks.") or not name.endswith("moe")]
        for hook_name in tried:
            expected = model.run_with_hooks(inputs, fwd_hooks=[(hook_name, returned(hook_name))])
            assert (expected - base).abs().max() > 1e-3, hook_name
            for style in MODES[mode]:
                got = model.run_with_hooks(inputs, fwd_hooks=[(hook_name, style(hook_name))])
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, msg=f"{hook_name} {style.__name__}")
        assert torch.equal(model(inputs), base)


@pytest.mark.parametrize("style", STYLES)
def test_parameters_that_train_change_nothing_about_it(family, style):
    model, inputs = wrapped(family), model_inputs(family)
    text = ["blocks.0.hook_resid_mid", "blocks.1.attn.hook_pattern", "blocks.1.hook_mlp_out"]
    names = ["vision.blocks.0.attn.hook_q", *text]
    expected = model.run_with_hooks(inputs, fwd_hooks=[(n, returned(n)) for n in names])
    model.hf_model.requires_grad_(True)
    try:
        got = model.run_with_hooks(inputs, fwd_hooks=[(n, style(n)) for n in names])
        got.sum().backward()
    finally:
        model.hf_model.requires_grad_(False).zero_grad()
    torch.testing.assert_close(got.detach(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.transpose_(0, 1), lambda x: x.unsqueeze_(0), lambda x: setattr(x, "data", x.data[:1])],
    ids=["transpose_", "unsqueeze_", "data"],
)
@pytest.mark.parametrize("live", [False, True])
def test_a_shape_that_was_changed_in_place_is_an_error(change, live):
    point = HookPoint("blocks.3.attn.hook_z", tower="text", block=3)
    point.live = live
    point.add_hook(lambda x, hook: [change(x)].clear())
    with pytest.raises(HookValueError, match=r"hook_z changed in place shape and dtype .*; expected"):
        point.run(torch.zeros(2, 3))


@pytest.mark.parametrize("live", [False, True])
def test_edits_after_new_data_reach_the_model_too(live):
    point = HookPoint("blocks.3.attn.hook_z", tower="text", block=3)
    point.live = live
    point.add_hook(lambda x, hook: setattr(x, "data", torch.ones(2)))
    point.add_hook(lambda x, hook: x.add_(1))
    value, edited = point.run(torch.zeros(2))
    assert edited and value.tolist() == [2, 2]
