"""Head results with weights of bitsandbytes, on the CPU: those of the dequantised weights."""

import bitsandbytes
import pytest
import torch
from transformers import BitsAndBytesConfig

from helpers import toy_witness
from helpers.adapted import written
from hooked_mllm import HookedMLLM, metrics
from hooked_mllm.cache.activation_cache import ActivationCache
from hooked_mllm.toys import VisualRetrieval

CONFIGS = {"8-bit": {"load_in_8bit": True}, "4-bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}}
#: 8-bit modules quantise their input, too, and 4-bit ones round it on the CPU
TOLERANCE = {"8-bit": 2e-2, "4-bit": 1e-2}


def dequantized(weight, bits):
    """A weight as bitsandbytes rounds it."""
    if bits == "8-bit":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale
    codes, state = bitsandbytes.functional.quantize_4bit(weight.clone(), blocksize=64, quant_type="fp4")
    return bitsandbytes.functional.dequantize_4bit(codes, state).float()


@pytest.fixture(scope="module", params=CONFIGS)
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def model(bits):
    config = BitsAndBytesConfig(**CONFIGS[bits])
    return HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32", quantization_config=config)


@pytest.fixture(scope="module")
def sample(model):
    return VisualRetrieval(pages=1).samples(model, 1, answer=True)[0]


def close(actual, expected, bits):
    assert (actual - expected).abs().max() <= TOLERANCE[bits] * expected.abs().max()


@torch.no_grad()
def test_results(model, sample, bits):
    _, cache = model.run_with_cache(sample)
    for layer in range(model.cfg.n_layers):
        weight = toy_witness.model().model.language_model.layers[layer].self_attn.o_proj.weight
        close(cache["result", layer], written(cache["z", layer], dequantized(weight, bits)), bits)
        close(cache["result", layer].sum(-2), cache["attn_out", layer], bits)


@torch.no_grad()
def test_edited_results(model, sample, bits):
    plain, cache = model.run_with_cache(sample)
    name = "blocks.2.attn.hook_result"
    assert torch.equal(model.run_with_hooks(sample, fwd_hooks=[(name, lambda x, hook: x.clone())]), plain)
    assert torch.equal(model.run_with_hooks(sample, fwd_hooks=[(name, lambda x, hook: cache[name])]), plain)

    def drop(x, hook):
        out = x.clone()
        out[:, :, 4:] = 0
        return out

    by_result, by_z = (
        model.run_with_hooks(sample, fwd_hooks=[(f"blocks.2.attn.hook_{n}", drop)]) for n in ("result", "z")
    )
    close(by_result, by_z, bits)
    assert (by_z - plain).abs().max() > 1


@torch.no_grad()
def test_logit_attribution(model, sample):
    metric = metrics.DirectLogitAttribution(wrong=VisualRetrieval(pages=1).answers)
    parts = metric.decompose(model, [sample], progress=False)
    torch.testing.assert_close(parts.values.sum(0), parts.total, atol=0.1, rtol=0.01)


@torch.no_grad()
def test_an_unembedding_that_is_quantised():
    bits = "8-bit"  # the 4-bit kernel for CPUs has no vocabulary of this size
    config = BitsAndBytesConfig(**CONFIGS[bits], llm_int8_skip_modules=["visual"])
    model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32", quantization_config=config)
    assert isinstance(model.lm_head, bitsandbytes.nn.Linear8bitLt)
    tokens = torch.tensor([5, 9])
    directions = model.unembed(tokens, 2)
    close(directions, dequantized(toy_witness.model().lm_head.weight, bits)[tokens], bits)
    sample = VisualRetrieval(pages=1).samples(model, 1, answer=True)[0]
    logits, cache = model.run_with_cache(sample)
    close(cache.logit_lens(slice(None))[-1], logits, bits)


@torch.no_grad()
def test_a_saved_cache(model, sample, tmp_path, bits):
    _, cache = model.run_with_cache(sample, "blocks.*.hook_result")
    cache.save(tmp_path / "cache.safetensors")
    loaded = ActivationCache.load(tmp_path / "cache.safetensors")
    for name in cache:
        torch.testing.assert_close(loaded[name], cache[name], atol=1e-4, rtol=1e-4)
