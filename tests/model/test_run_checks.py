"""Runs that would give wrong numbers are errors."""

import inspect

import pytest
import torch

from helpers.tiny import tiny_image
from helpers.wrapped import fresh, model_inputs, wrapped
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import HookValueError, InputError, NumericsError
from hooked_mllm.model.run_checks import check_arguments, check_half, checking_half, labels_of

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def test_padding_on_the_right_is_rejected(family):
    with pytest.raises(InputError, match="padded on the right.*padding_side='left'"):
        wrapped(family).generate(model_inputs(family, 1, 2, False, "right"), **GREEDY)


def test_the_loss_of_a_sample_is_that_of_its_answer(family):
    model = wrapped(family)
    sample = model.prepare("What is this?", images=tiny_image(), answer="the answer is red")
    loss = model(sample, return_type="loss")
    log_probs = model(sample).log_softmax(-1)[0]
    ids, answer = sample.inputs["input_ids"][0], sample.mask("answer")[0].nonzero()[:, 0]
    by_hand = -torch.stack([log_probs[i - 1, ids[i]] for i in answer.tolist()]).mean()
    torch.testing.assert_close(loss, by_hand)


def test_float16_that_overflows_is_an_error(family):
    hf = fresh(family, dtype=torch.float16)
    hf.model.language_model.layers[1].mlp.down_proj.weight.fill_(6e4)
    model, inputs = HookedMLLM.from_model(hf, check=False), model_inputs(family)
    for run in (model, lambda i: model.generate(i, max_new_tokens=2), lambda i: model.run_with_cache(i)):
        with pytest.raises(NumericsError, match="overflowed in float16.*dtype='bfloat16'"):
            run(inputs)
    assert model.list_hooks() == {}


def test_options_that_are_not_there_are_rejected(family):
    model, inputs = wrapped(family), model_inputs(family)
    with pytest.raises(InputError, match="'stop_at_layr' and would ignore it. Did you mean 'stop_at_layer'"):
        model(inputs, stop_at_layr=1)
    with pytest.raises(InputError, match="takes no argument 'pixel_value' and would ignore it"):
        model(**inputs, pixel_value=None)
    with pytest.raises(HookValueError, match="return_type is 'logits', 'loss', 'both', 'output' or None; got 'logit'"):
        inspect.unwrap(HookedMLLM.run)(model, model.resolve(inputs), "logit")


def test_labels_are_the_answers_tokens_or_those_that_are_given(family):
    model = wrapped(family)
    sample = model.prepare("What is this?", images=tiny_image(), answer="the answer is red")
    ids, answer = sample.inputs["input_ids"][0].tolist(), sample.mask("answer")[0].tolist()
    labels = labels_of(model.resolve(sample))
    assert labels[0].tolist() == [token if own else -100 for token, own in zip(ids, answer, strict=True)]
    given = torch.full_like(sample.inputs["input_ids"], 7)
    assert labels_of(model.resolve({**sample.inputs, "labels": given})) is given


@pytest.mark.parametrize("name", ["use_cache", "logits_to_keep", "output_hidden_states", "pixel_values"])
def test_arguments_of_the_model_and_of_transformers_are_accepted(family, name):
    assert check_arguments(wrapped(family).hf_model, [name]) is None


@pytest.mark.parametrize("last", [float("nan"), float("inf")])
def test_only_float16_logits_of_the_last_position_are_checked(last):
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 0] = torch.nan  # of padding, which may be anything
    check_half(logits.half())
    logits[0, -1, 1] = last
    check_half(logits.bfloat16())
    with pytest.raises(NumericsError, match="overflowed in float16"):
        check_half(logits.half())


def test_the_check_of_float16_leaves_no_hook():
    for dtype, hooks in ((torch.float16, 1), (torch.float32, 0)):
        model = fresh("internvl", dtype=dtype)
        with checking_half(model):
            assert len(model._forward_hooks) == hooks
        assert not model._forward_hooks


def test_unknown_keys_of_a_mapping_are_rejected(family):
    model, inputs = wrapped(family), dict(model_inputs(family))
    mistyped = {("attention_masks" if name == "attention_mask" else name): value for name, value in inputs.items()}
    for run in (model, lambda i: model.generate(i, max_new_tokens=1), model.run_with_cache, lambda i: model(**i)):
        with pytest.raises(InputError, match="takes no argument 'attention_masks' .*Did you mean 'attention_mask'"):
            run(mistyped)
    with pytest.raises(InputError, match="attention_masks"):
        model.generate(**mistyped, max_new_tokens=1)
    outputs = {**inputs, "special_tokens_mask": torch.zeros_like(inputs["input_ids"])}
    assert model.resolve(outputs).tensors.keys() == outputs.keys()
    assert torch.equal(model.generate(**inputs, **GREEDY), model.generate(inputs, **GREEDY))
