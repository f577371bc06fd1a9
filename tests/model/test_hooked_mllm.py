"""HookedMLLM against plain transformers: the same bits without hooks, whatever the inputs, attention and dtype."""

import inspect

import pytest
import torch
from accelerate import dispatch_model

from helpers.tiny import ALL_FAMILIES, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, tiny_image, tiny_processor
from helpers.wrapped import LAYERS, VISION_LAYERS, fresh, in_place, model_inputs, plain, wrapped
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import HookNameError, HookValueError, InputError, NumericsError

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


def test_the_loss_of_a_sample_is_that_of_its_answer(family):
    model = wrapped(family)
    sample = model.prepare("What is this?", images=tiny_image(), answer="the answer is red")
    loss = model(sample, return_type="loss")
    log_probs = model(sample).log_softmax(-1)[0]
    ids, answer = sample.inputs["input_ids"][0], sample.mask("answer")[0].nonzero()[:, 0]
    by_hand = -torch.stack([log_probs[i - 1, ids[i]] for i in answer.tolist()]).mean()
    torch.testing.assert_close(loss, by_hand)


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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["vision.blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern", "blocks.0.hook_mlp_out"])
@torch.no_grad()
def test_after_an_error_in_a_hook_the_model_is_clean(family, name, error):
    inputs, model = model_inputs(family), wrapped(family)
    model(inputs)  # transformers hangs hooks of its own when some towers first run
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf_model.modules()]

    def fail(x, hook):
        raise error("in the hook")

    for run in (
        lambda: model.run_with_hooks(inputs, fwd_hooks=[("hook_embed", in_place("hook_embed")), (name, fail)]),
        lambda: model.run_with_hooks(inputs, fwd_hooks=[(name, fail)], stop_at_layer=2),
    ):
        with pytest.raises(error, match="in the hook"):
            run()
    with pytest.raises(error), model.hooks([(name, fail)]):
        model.run_with_cache(inputs)
    assert model.list_hooks() == {}
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf_model.modules()] == before
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)


def test_float16_that_overflows_is_an_error(family):
    hf = fresh(family, dtype=torch.float16)
    hf.model.language_model.layers[1].mlp.down_proj.weight.fill_(6e4)
    model, inputs = HookedMLLM.from_model(hf, check=False), model_inputs(family)
    for run in (model, lambda i: model.generate(i, max_new_tokens=2), lambda i: model.run_with_cache(i)):
        with pytest.raises(NumericsError, match="overflowed in float16.*dtype='bfloat16'"):
            run(inputs)
    assert model.list_hooks() == {}


def test_sizes_and_facts(family):
    model, cfg = wrapped(family), wrapped(family).cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads, cfg.d_model, cfg.d_head) == (
        LAYERS,
        HEADS,
        KV_HEADS,
        HIDDEN,
        HEAD_DIM,
    )
    assert (cfg.d_mlp, cfg.d_vocab, cfg.vision_n_layers, cfg.vision_n_heads, cfg.vision_d_model, cfg.vision_d_head) == (
        48,
        VOCAB,
        VISION_LAYERS,
        2,
        32,
        16,
    )
    assert cfg.n_deepstack == (2 if family == "qwen3_vl" else 0)
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert model.info.attention == "sdpa" and model.info.n_kv_heads == KV_HEADS
    with model.hooks([("*hook_z", lambda z, hook: None)]):
        assert model.info.attention == "sdpa"  # what the model runs, hooked or not
    assert type(model.hf_model).__name__ in repr(model) and "3 layers x 4 heads (2 key-value)" in repr(model)


def test_unembed_takes_ids_and_words(family):
    model = wrapped(family)
    weight = model.hf_model.lm_head.weight
    assert torch.equal(model.unembed(7, 2), weight[[7, 7]])
    assert torch.equal(model.unembed([7, 9], 2), weight[[7, 9]])
    assert torch.equal(model.unembed(torch.tensor([7, 9]), 2), weight[[7, 9]])
    token = model.processor.tokenizer.encode("the", add_special_tokens=False)
    assert len(token) == 1 and torch.equal(model.unembed("the", 1), weight[token])
    for tokens, message in (
        ("What colour is the mug?", r"is \d+ tokens; expected one"),
        ([1, 2, 3], "one for each of 2 samples; got 3"),
        (VOCAB, "outside the vocabulary"),
        (-1, "outside the vocabulary"),
    ):
        with pytest.raises(InputError, match=message):
            model.unembed(tokens, 2)


def test_without_a_processor_everything_but_prepare_works(family):
    model = HookedMLLM.from_model(fresh(family))
    assert torch.equal(model(model_inputs(family)), plain(family)(**model_inputs(family)).logits)
    with pytest.raises(InputError, match="processor"):
        model.prepare("What is this?", images=tiny_image())
    with pytest.raises(InputError, match="needs a processor; give its id"):
        model.unembed("the", 1)


def test_to_moves_and_casts(family):
    model = HookedMLLM.from_model(fresh(family), tiny_processor(family), check=False)
    assert model.to(torch.bfloat16) is model and model.dtype == torch.bfloat16
    inputs = model_inputs(family)
    assert torch.equal(model(inputs), plain(family, "sdpa", torch.bfloat16)(**inputs).logits)


@torch.no_grad()
def test_a_model_spread_by_accelerate_works_and_stays_where_it_is(family):
    """Every module carries accelerate's hooks, as on several devices, though here all of them are one."""
    hf = fresh(family)
    parts = {"model": "cpu", "lm_head": "cpu"}
    model = HookedMLLM.from_model(dispatch_model(hf, device_map=parts, force_hooks=True), tiny_processor(family))
    inputs = model_inputs(family)
    hooks = [("*hook_z", lambda z, hook: z * 0.5), ("*hook_resid_mid", lambda x, hook: x * 2)]
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)
    assert torch.equal(
        model.run_with_hooks(inputs, fwd_hooks=hooks), wrapped(family).run_with_hooks(inputs, fwd_hooks=hooks)
    )
    with pytest.raises(InputError, match="spread by device_map"):
        model.to("cpu")


def test_options_that_are_not_there_are_refused(family):
    model, inputs = wrapped(family), model_inputs(family)
    with pytest.raises(InputError, match="'stop_at_layr' and would ignore it. Did you mean 'stop_at_layer'"):
        model(inputs, stop_at_layr=1)
    with pytest.raises(InputError, match="takes no argument 'pixel_value' and would ignore it"):
        model(**inputs, pixel_value=None)
    with pytest.raises(HookValueError, match="return_type is 'logits', 'loss', 'both', 'output' or None; got 'logit'"):
        inspect.unwrap(HookedMLLM.run)(model, model.resolve(inputs), "logit")
