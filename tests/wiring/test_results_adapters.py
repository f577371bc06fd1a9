"""Head results, logit attributions and the logit lens with adapters of peft: those of the merged model."""

import copy
from functools import cache

import peft
import pytest
import torch
from torch import nn

from helpers.adapted import adapted, output_weight, written
from helpers.module_witness import VISION_BLOCKS
from helpers.tiny import tiny_processor
from helpers.wrapped import fresh, model_inputs
from hooked_mllm import HookedMLLM, metrics
from hooked_mllm.cache.activation_cache import ActivationCache
from hooked_mllm.errors import HookValueError, UnsupportedModelError
from hooked_mllm.toys import VisualRetrieval

pytestmark = [  # of peft
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]
TEXT_BLOCKS = "model.language_model.layers"
KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


@cache
def of(family, kind="lora"):
    return adapted(family, KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_results_are_those_of_the_merged_weights(kind):
    model, _, merged = of("qwen3_vl", kind)
    inputs = model_inputs("qwen3_vl")
    logits, cache = model.run_with_cache(inputs)
    torch.testing.assert_close(logits, merged(**inputs).logits, atol=1e-4, rtol=1e-4)
    for layer in range(model.cfg.n_layers):
        expected = written(cache["z", layer], output_weight(merged, TEXT_BLOCKS, layer))
        torch.testing.assert_close(cache["result", layer], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(cache["result", layer].sum(-2), cache["attn_out", layer], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_vision_tower(family):
    model, _, merged = of(family)
    _, cache = model.run_with_cache(model_inputs(family))
    expected = written(cache["vision", "z", 0], output_weight(merged, VISION_BLOCKS[family], 0))
    torch.testing.assert_close(cache["vision", "result", 0], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_edited_results(family):
    model, inputs = of(family)[0], model_inputs(family)

    def run(name, fn):
        return model.run_with_hooks(inputs, fwd_hooks=[(name, fn)])

    def drop(x, hook):
        out = x.clone()
        out[:, :, 1] = 0
        return out

    def drop_in_place(x, hook):
        x[:, :, 1] = 0

    plain, cache = model.run_with_cache(inputs)
    for prefix in ("", "vision."):
        result, z = (f"{prefix}blocks.1.attn.hook_{name}" for name in ("result", "z"))
        assert torch.equal(run(result, lambda x, hook: x.clone()), plain)
        torch.testing.assert_close(run(result, lambda x, hook: cache[hook.name]), plain, atol=1e-5, rtol=1e-5)
        without = run(z, drop)
        assert (without - plain).abs().max() > 1e-2
        for fn in (drop, drop_in_place):
            torch.testing.assert_close(run(result, fn), without, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_unembedding_and_the_lens(family):
    """The lens and attributions of an adapted unembedding equal those of the merged model."""
    model, _, merged = of(family)
    reference = HookedMLLM.from_model(copy.deepcopy(merged), tiny_processor(family))
    inputs, tokens = model_inputs(family), torch.tensor([5, 9])
    caches = [m.run_with_cache(inputs)[1] for m in (model, reference)]
    lenses = [c.logit_lens(slice(None)) for c in caches]
    torch.testing.assert_close(*lenses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.unembed(tokens, 2), merged.lm_head.weight[tokens], atol=1e-5, rtol=1e-4)
    attributions = [c.logit_attrs(c.stack_head_results(), 5, 9, slice(None)) for c in caches]
    torch.testing.assert_close(*attributions, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_direct_logit_attribution():
    toy = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32", check=False)
    task = VisualRetrieval(pages=1)
    samples = task.samples(toy, 2, answer=True)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["o_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(0)
    adapter = peft.get_peft_model(toy.hf_model, config).eval()
    merged = HookedMLLM.from_model(copy.deepcopy(adapter).merge_and_unload(), toy.processor)
    model = HookedMLLM.from_model(adapter.get_base_model(), toy.processor)
    metric = metrics.DirectLogitAttribution(wrong=task.answers)
    parts, expected = (metric.decompose(m, samples, progress=False) for m in (model, merged))
    torch.testing.assert_close(parts.values.sum(0), parts.total, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(parts.values, expected.values, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_adapters_that_are_disabled_or_merged():
    model, peft_model, _ = adapted("qwen3_vl")
    inputs, base = model_inputs("qwen3_vl"), fresh("qwen3_vl")
    _, cache = model.run_with_cache(inputs)
    before = cache["result", 1]
    with peft_model.disable_adapter():
        with pytest.raises(HookValueError, match="an adapter was enabled, disabled or merged"):
            cache["result", 1]
        logits, plain = model.run_with_cache(inputs)
        torch.testing.assert_close(logits, base(**inputs).logits)
        expected = written(plain["z", 1], output_weight(base, TEXT_BLOCKS, 1))
        torch.testing.assert_close(plain["result", 1], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(cache["result", 1], before)
    with pytest.raises(HookValueError, match="changed since this run"):
        plain["result", 1]


def test_weights_that_were_written_after_the_run():
    model = HookedMLLM.from_model(fresh("internvl"), check=False)
    _, cache = model.run_with_cache(model_inputs("internvl"))
    with torch.no_grad():
        model.output_projection(1).weight.mul_(2)
    with pytest.raises(HookValueError, match="changed since this run"):
        cache["result", 1]
    assert cache["result", 0].isfinite().all()


def test_dropout_of_an_adapter():
    model, peft_model, _ = adapted("internvl", {"lora_dropout": 0.5})
    inputs = model_inputs("internvl")
    _, cache = model.run_with_cache(inputs, "*hook_result")
    peft_model.train()
    with pytest.raises(UnsupportedModelError, match=r"lora_dropout.*is active.*call `eval\(\)`"):
        HookedMLLM.from_model(peft_model.get_base_model())
    with pytest.raises(HookValueError, match="hf_model.eval.*merge_and_unload"):
        cache["result", 1]
    with pytest.raises(HookValueError, match="hf_model.eval.*merge_and_unload"):
        model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_result", lambda x, hook: x)])
    peft_model.eval()
    assert cache["result", 1].isfinite().all()


@torch.no_grad()
def test_a_saved_cache(tmp_path):
    model = of("qwen3_vl")[0]
    _, cache = model.run_with_cache(model_inputs("qwen3_vl"), "*hook_result")
    cache.save(tmp_path / "cache.safetensors")
    loaded = ActivationCache.load(tmp_path / "cache.safetensors")
    for name in cache:
        torch.testing.assert_close(loaded[name], cache[name], atol=1e-5, rtol=1e-4)


def test_an_adapter_that_is_added_to_a_wrapped_model():
    hf_model, inputs = fresh("internvl"), model_inputs("internvl")
    model = HookedMLLM.from_model(hf_model)
    peft.get_peft_model(hf_model, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)).eval()
    with pytest.raises(HookValueError, match=r"o_proj was a Linear when this model was wrapped.*from_model"):
        model(inputs)
    with torch.no_grad():
        _, cache = HookedMLLM.from_model(hf_model).run_with_cache(inputs)
    torch.testing.assert_close(cache["result", 1].sum(-2), cache["attn_out", 1], atol=1e-5, rtol=1e-4)


def test_a_peft_model_itself():
    peft_model = of("internvl")[1]
    with pytest.raises(UnsupportedModelError, match="get_base_model.*merge_and_unload"):
        HookedMLLM.from_model(peft_model)


@pytest.mark.parametrize("kind", ["modules_to_save", "ln_tuning"])
@torch.no_grad()
def test_adapted_norms(family, kind):
    """The gain of an adapted norm is that of the adapter."""
    hf_model, inputs = fresh(family), model_inputs(family)
    names = [n for n, _ in hf_model.named_modules() if n.endswith(("language_model.norm", "0.norm1", "layer_norm1"))]
    names += ["model.vision_tower.encoder.layer.0.layernorm_before"] if family == "internvl" else []
    if kind == "ln_tuning":
        config = peft.LNTuningConfig(target_modules=names)
    else:
        config = peft.LoraConfig(target_modules=["o_proj"], modules_to_save=names)
    peft_model = peft.get_peft_model(hf_model, config).eval()
    for name, parameter in peft_model.named_parameters():
        if "modules_to_save" in name or "ln_tuning_layers" in name:
            parameter.mul_(1.5)
    model = HookedMLLM.from_model(peft_model.get_base_model(), tiny_processor(family))
    plain, cache = model.run_with_cache(inputs)
    hooks = [(f"*{name}", lambda x, hook: x.clone()) for name in ("hook_scale", "hook_normalized")]
    torch.testing.assert_close(model.run_with_hooks(inputs, fwd_hooks=hooks), plain, atol=1e-4, rtol=1e-4)
    lens = cache.logit_lens(slice(None))[-1]
    torch.testing.assert_close(lens, plain, atol=1e-4, rtol=1e-4)
    direct = cache.logit_attrs(cache.decompose_resid(), 5, positions=slice(None)).sum(0)
    torch.testing.assert_close(direct, plain[..., 5], atol=1e-3, rtol=1e-3)


class Factored(nn.Module):
    """A linear map with a bias, as two factors."""

    def __init__(self, linear, curve=False):
        super().__init__()
        u, s, v = torch.linalg.svd(linear.weight, full_matrices=False)
        self.left, self.right, self.bias = (nn.Parameter(x) for x in (u * s, v, torch.linspace(-1, 1, len(u))))
        self.curve = curve

    def forward(self, x):
        out = x @ self.right.T @ self.left.T + self.bias
        return out.tanh() if self.curve else out


@torch.no_grad()
def test_a_module_in_place_of_a_linear():
    hf_model, inputs = fresh("internvl"), model_inputs("internvl")
    weight = hf_model.model.language_model.layers[1].self_attn.o_proj.weight.clone()
    attention = hf_model.model.language_model.layers[1].self_attn
    attention.o_proj = module = Factored(attention.o_proj)
    model = HookedMLLM.from_model(hf_model, tiny_processor("internvl"))
    plain, cache = model.run_with_cache(inputs)
    torch.testing.assert_close(cache["result", 1], written(cache["z", 1], weight), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cache["result", 1].sum(-2) + module.bias, cache["attn_out", 1], atol=1e-5, rtol=1e-4)
    nothing = [("blocks.1.attn.hook_result", lambda x, hook: torch.zeros_like(x))]
    bias = [("blocks.1.hook_attn_out", lambda x, hook: module.bias.expand_as(x))]
    edited, expected = (model.run_with_hooks(inputs, fwd_hooks=hooks) for hooks in (nothing, bias))
    torch.testing.assert_close(edited, expected, atol=1e-4, rtol=1e-4)
    assert (edited - plain).abs().max() > 1e-2


def test_a_module_that_is_not_linear():
    hf_model = fresh("internvl")
    attention = hf_model.model.language_model.layers[1].self_attn
    attention.o_proj = Factored(attention.o_proj, curve=True)
    with pytest.raises(
        UnsupportedModelError, match="text layer 1 do not sum.*Factored, is not linear.*merge_and_unload"
    ):
        HookedMLLM.from_model(hf_model)


def test_a_plain_linear_is_one_product():
    """The bits of a plain projection are those of one einsum with its weight."""
    model = HookedMLLM.from_model(fresh("qwen3_vl"), check=False)
    with torch.no_grad():
        _, cache = model.run_with_cache(model_inputs("qwen3_vl"))
        z, weight = cache["z", 1], model.output_projection(1).weight
        expected = torch.einsum("bphd,mhd->bphm", z, weight.unflatten(1, (z.shape[2], z.shape[3])))
    assert torch.equal(cache["result", 1], expected)
