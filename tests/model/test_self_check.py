"""The check on loading names what is wrong, for each thing that can be."""

import dataclasses

import pytest
import torch

from helpers.tiny import ALL_FAMILIES, tiny_image, tiny_processor
from helpers.tiny import FAMILIES as FAMILY_NAMES
from helpers.wrapped import fresh, model_inputs, plain
from hooked_mllm import HookedMLLM
from hooked_mllm.attention import site
from hooked_mllm.errors import UnsupportedModelError
from hooked_mllm.families import InternVL, LlavaOnevision, Qwen3VL
from hooked_mllm.families.registry import FAMILIES
from hooked_mllm.model import self_check
from hooked_mllm.wiring import head_results


def wired_as(monkeypatch, family):
    for model_type in family.model_types:
        monkeypatch.setitem(FAMILIES, model_type, family)


def parts(tower, **changes):
    return dataclasses.replace(tower, block=dataclasses.replace(tower.block, **changes))


@pytest.mark.parametrize(
    ("name", "attn", "dtype"),
    [(f, a, torch.float32) for f in ALL_FAMILIES for a in ("sdpa", "eager")]
    + [(f, "sdpa", d) for f in ALL_FAMILIES for d in (torch.bfloat16, torch.float16)]
    + [(f, "sdpa", torch.float64) for f in FAMILY_NAMES],  # torch has no float64 mixture of experts
    ids=str,
)
def test_sound_models_pass_with_and_without_a_processor(name, attn, dtype):
    for processor in (tiny_processor(name), None):
        model = HookedMLLM.from_model(fresh(name, attn, dtype), processor)
    model.check()
    assert model.list_hooks() == {}
    inputs = model_inputs(name)
    with torch.no_grad():
        assert torch.equal(model(inputs), plain(name, attn, dtype)(**inputs).logits)


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_a_wrong_module_for_v_is_found(monkeypatch, tower):
    family = LlavaOnevision()
    setattr(family, tower, parts(getattr(LlavaOnevision, tower), v="self_attn.k_proj"))
    wired_as(monkeypatch, family)
    with pytest.raises(UnsupportedModelError, match=f"the pattern of {tower} layer 0 times v is not that layer's z"):
        HookedMLLM.from_model(fresh("llava_onevision"), tiny_processor("llava_onevision"))


def test_a_missing_module_is_found(monkeypatch):
    family = InternVL()
    family.text = parts(InternVL.text, o="self_attn.output_projection")
    wired_as(monkeypatch, family)
    with pytest.raises(UnsupportedModelError, match="InternVLForCond.* lacks a part.*self_attn.output_proj"):
        HookedMLLM.from_model(fresh("internvl"))


def test_a_point_that_never_fires_is_found(monkeypatch):
    family = Qwen3VL()
    family.n_deepstack = lambda model: 3  # one more than there is
    wired_as(monkeypatch, family)
    with pytest.raises(UnsupportedModelError, match="did not call the hooks on blocks.2.hook_deepstack"):
        HookedMLLM.from_model(fresh("qwen3_vl"), tiny_processor("qwen3_vl"))


def test_hooked_attention_that_differs_is_found(monkeypatch):
    def another(module, base):
        run = site_implementation(module, base)
        return lambda *args, **kwargs: (run(*args, **kwargs)[0] * (1 + 1e-3), None)

    site_implementation = site.implementation
    monkeypatch.setattr(site, "implementation", another)
    with pytest.raises(UnsupportedModelError, match=r"hooked logits differ from plain ones by up to \d.*check=False"):
        HookedMLLM.from_model(fresh("internvl"), tiny_processor("internvl"))


def test_an_attention_scale_that_patterns_do_not_have_is_found():
    """As in a version of transformers that divides scores by something else."""

    def sharper(q, k, v, mask, scale, layer):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = (3 * scale * q @ k.transpose(2, 3)).masked_fill(~mask.full()[:, None], torch.finfo(q.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    model = HookedMLLM.from_model(fresh("internvl"), tiny_processor("internvl"), check=False)
    with model.attention(sharper), pytest.raises(UnsupportedModelError, match="of text layer 0 times v is not"):
        model.check()
    model.check()


def test_a_processor_of_other_sizes_is_found():
    processor = tiny_processor("internvl")
    processor.image_seq_length = 9  # the model makes 4 tokens of a tile
    with pytest.raises(UnsupportedModelError, match="failed its check on loading"):
        HookedMLLM.from_model(fresh("internvl"), processor)


def test_a_layout_that_counts_otherwise_is_found(monkeypatch):
    model = HookedMLLM.from_model(fresh("qwen3_vl"), tiny_processor("qwen3_vl"))
    small, large = (model.prepare("What is this?", images=tiny_image(w, 24)) for w in (24, 32))
    monkeypatch.setattr(self_check, "probe", lambda _: (small.inputs, dataclasses.replace(small, layout=large.layout)))
    with pytest.raises(UnsupportedModelError, match="the layout counts 12 visual tokens, the model 9"):
        model.check()


def test_the_check_needs_a_model_without_hooks():
    model = HookedMLLM.from_model(fresh("internvl"), check=False)
    model.add_hook("hook_embed", lambda x, hook: None)
    with pytest.raises(UnsupportedModelError, match="call `reset_hooks` first"):
        model.check()
    model.reset_hooks()
    model.check()


def test_head_results_that_do_not_sum_to_the_attention_output_are_found(monkeypatch):
    model = HookedMLLM.from_model(fresh("internvl"), tiny_processor("internvl"))
    monkeypatch.setattr(self_check, "head_results", lambda *args, **how: 1.1 * head_results(*args, **how))
    with pytest.raises(UnsupportedModelError, match="heads of text layer 0 do not sum to its attention output"):
        model.check()
    monkeypatch.setattr(self_check, "head_results", head_results)
    model.check()


@pytest.mark.parametrize("error", [AttributeError("CB"), StopIteration(), AssertionError(), RuntimeError("shape")])
def test_whatever_a_run_raises_is_reported(monkeypatch, error):
    """What damaged weights raise in the libraries that run them."""
    model = HookedMLLM.from_model(fresh("internvl"))

    def failing(*args):
        raise error

    monkeypatch.setattr(self_check, "cached_forward", failing)
    with pytest.raises(UnsupportedModelError, match=f"check on loading: .* raised {type(error).__name__}"):
        model.check()


def test_the_probe_is_small():
    """One tile of InternVL, as the smallest picture of the processor: 12 tiles would be 13 times the memory."""
    processor = tiny_processor("internvl")
    processor.image_processor.max_patches = 12
    model = HookedMLLM.from_model(fresh("internvl"), processor)
    inputs, sample = self_check.probe(model)
    assert len(inputs["pixel_values"]) == 1
    assert int(sample.mask("visual").sum()) == processor.image_seq_length


def test_the_check_keeps_few_activations(monkeypatch):
    """Of every layer, the last rows of z and of the attention output, and q and k of its pattern."""
    kept = []
    model = HookedMLLM.from_model(fresh("qwen3_vl"), tiny_processor("qwen3_vl"))

    def keeping(*args):
        output, cache = cached_forward(*args)
        kept.extend(cache)
        return output, cache

    cached_forward = self_check.cached_forward
    monkeypatch.setattr(self_check, "cached_forward", keeping)
    model.check()
    assert kept and all(name.endswith("hook_pattern") for name in kept)
