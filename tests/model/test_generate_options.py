"""Options that `generate` does not take raise before the first forward pass; errors of hooks stay as they are."""

import pytest
import torch
from transformers import LogitsProcessorList

from hooked_mllm import HookedMLLM, toys
from hooked_mllm.errors import InputError


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_pretrained("toy-qwen3-vl", check=False)


@pytest.fixture(scope="module")
def sample(model):
    return toys.VisualRetrieval(pages=1).samples(model, 1)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": "many"},
        {"max_new_tokens": -1},
        {"max_new_tokens": torch.tensor(2.5)},
        {"max_new_tokens": 1, "num_beams": [2]},
        {"max_new_tokens": 1, "no_such_option": 1},
        {"max_new_tokens": 1, "stopping_criteria": "stop"},
        {"max_new_tokens": 1, "logits_processor": [None]},
        {"max_new_tokens": 1, "past_key_values": 3},
        {"max_new_tokens": 1, "generation_config": {"a": 1}},
    ],
)
def test_wrong_options(model, sample, options):
    for call in (lambda: model.generate(sample, **options), lambda: model.run_with_cache(sample, generate=options)):
        with pytest.raises(InputError, match="generate|KV cache"):
            call()
    assert not model.hf_model._forward_pre_hooks


def test_right_options_give_the_tokens_of_transformers(model, sample):
    options = {"max_new_tokens": 2, "do_sample": False, "logits_processor": LogitsProcessorList([lambda ids, x: -x])}
    assert torch.equal(model.generate(sample, **options), model.hf_model.generate(**sample.inputs, **options))


def test_errors_of_hooks_stay(model, sample):
    def fail(z, hook):
        raise KeyError("of the user")

    with model.hooks([("blocks.0.attn.hook_z", fail)]), pytest.raises(KeyError, match="of the user"):
        model.generate(sample, max_new_tokens=1)
    assert not model.hf_model._forward_pre_hooks
