"""One forward pass: the same bits as transformers, what it returns, and where it stops."""

import pytest
import torch

from helpers.tiny import ALL_FAMILIES, tiny_image
from helpers.wrapped import LAYERS, model_inputs, plain, wrapped
from hooked_mllm import SampleBatch
from hooked_mllm.errors import HookNameError, HookValueError, InputError

INPUTS = {
    "an image": {},
    "several images": {"images": 3},
    "a video": {"images": 0, "video": True},
    "images and a video": {"images": 2, "video": True},
    "a batch, left": {"images": 2, "batch": 2},
    "a batch, right": {"batch": 2, "padding_side": "right"},
    "a batch of videos": {"images": 1, "batch": 2, "video": True},
}
TEXT = {"input_ids": torch.arange(20, 32)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", ALL_FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers_bit_for_bit_with_everything_cached_too(name, kind, attn):
    inputs, model = model_inputs(name, **INPUTS[kind]), wrapped(name, attn)
    expected = plain(name, attn)(**inputs).logits
    assert torch.equal(model(inputs), expected)
    cached, cache = model.run_with_cache(inputs)
    assert torch.equal(cached, expected)
    assert set(cache) == set(model.hook_dict)
    assert torch.equal(model(inputs), expected)  # and nothing of it stays


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_bit_identical_in_other_dtypes(family, attn, dtype):
    # transformers' eager attention in float64 makes NaN of padding, and then of everything: one sample there
    batch = 1 if (attn, dtype) == ("eager", torch.float64) else 2
    inputs, model = model_inputs(family, 2, batch), wrapped(family, attn, dtype)
    expected = plain(family, attn, dtype)(**inputs).logits
    assert torch.isfinite(expected).all()
    assert torch.equal(model(inputs), expected)
    assert torch.equal(model.run_with_cache(inputs)[0], expected)


@torch.no_grad()
def test_a_list_of_samples_runs_as_a_batch_padded_on_the_left(family):
    model = wrapped(family)
    samples = [model.prepare(text, images=tiny_image(seed=i)) for i, text in enumerate(("Which?", "What is this?"))]
    batch = SampleBatch.collate(samples, "left")
    expected = plain(family)(**batch.inputs).logits
    assert torch.equal(model(samples), expected) and torch.equal(model.run_with_cache(samples)[0], expected)
    assert torch.equal(model.run_with_hooks(tuple(samples)), expected)
    assert torch.equal(model([samples[0]]), plain(family)(**samples[0].inputs).logits)
    options = {"max_new_tokens": 2, "do_sample": False}
    assert torch.equal(model.generate(samples, **options), plain(family).generate(**batch.inputs, **options))
    for other in ([], [samples[0], batch], ["Which?"], [batch]):
        with pytest.raises(InputError):
            model(other)


@torch.no_grad()
def test_return_types_of_runs_with_hooks_and_caches(family):
    model = wrapped(family)
    sample = model.prepare("Which?", images=tiny_image(), answer="this")
    logits, loss = model.run_with_hooks(sample, return_type="both")
    assert torch.equal(logits, model(sample)) and loss.ndim == 0
    assert model.run_with_hooks(sample, return_type=None) is None
    for return_type in ("logits", "loss", None):
        with pytest.raises(HookValueError, match="run_with_cache returns logits, and takes no return_type"):
            model.run_with_cache(sample, return_type=return_type)


@torch.no_grad()
def test_text_alone_is_served(family):
    model = wrapped(family)
    expected = plain(family)(**TEXT).logits
    assert torch.equal(model(TEXT), expected)
    logits, cache = model.run_with_cache(TEXT)
    assert torch.equal(logits, expected)
    assert not any(n.startswith(("vision", "projector")) for n in cache)


@torch.no_grad()
def test_gradients_and_inference_mode_change_no_bit(family):
    inputs, model = model_inputs(family), wrapped(family)
    expected = plain(family)(**inputs).logits
    with torch.enable_grad():
        assert torch.equal(model(inputs), expected)
    with torch.inference_mode():
        assert torch.equal(model(inputs), expected)
        assert torch.equal(model.run_with_cache(inputs)[0], expected)


def test_what_forward_returns(family):
    inputs, model = model_inputs(family), wrapped(family)
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 20, -100)
    expected = plain(family)(**inputs, labels=labels)
    given = {**inputs, "labels": labels}
    assert torch.equal(model(given, return_type="loss"), expected.loss)
    logits, loss = model(given, return_type="both")
    assert torch.equal(logits, expected.logits) and torch.equal(loss, expected.loss)
    assert torch.equal(model(inputs, return_type="output").logits, expected.logits)
    assert torch.equal(model(inputs, logits_to_keep=1), plain(family)(**inputs, logits_to_keep=1).logits)
    fired = []
    with model.hooks([("blocks.*.hook_resid_post", lambda x, hook: fired.append(x))]):
        assert model(inputs, return_type=None) is None
    assert len(fired) == LAYERS
    with pytest.raises(InputError, match="A loss needs `labels`"):
        model(inputs, return_type="loss")


@pytest.mark.parametrize("layer", [0, 1, LAYERS - 1, LAYERS, -1, -LAYERS])
@torch.no_grad()
def test_stop_at_layer_gives_the_stream_entering_a_block_and_runs_no_further(family, layer):
    inputs, model, fired, full = model_inputs(family), wrapped(family), [], {}
    model.run_with_hooks(inputs, fwd_hooks=[("*", lambda x, hook: full.__setitem__(hook.name, x.clone()))])
    with model.hooks([("*", lambda x, hook: fired.append(hook.name))]):
        stopped = model(inputs, stop_at_layer=layer)
    first_not_run = layer % LAYERS if layer != LAYERS else LAYERS
    expected = f"blocks.{first_not_run}.hook_resid_pre"
    if first_not_run == LAYERS:
        expected = f"blocks.{LAYERS - 1}.hook_resid_post"
    assert torch.equal(stopped, full[expected])
    assert {int(n.split(".")[1]) for n in fired if n.startswith("blocks.")} == set(range(first_not_run))
    assert "ln_final.hook_scale" not in fired and "hook_logits" not in fired
    residual, cache = model.run_with_cache(inputs, stop_at_layer=layer)
    assert torch.equal(residual, stopped) and set(cache) == set(fired)
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)


@pytest.mark.parametrize("layer", [LAYERS + 1, -LAYERS - 1])
def test_a_layer_to_stop_at_that_is_not_there(family, layer):
    with pytest.raises(HookNameError, match=f"stop_at_layer={layer} is out of range: the model has {LAYERS} blocks"):
        wrapped(family)(model_inputs(family), stop_at_layer=layer)
