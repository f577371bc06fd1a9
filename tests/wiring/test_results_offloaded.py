"""Models that accelerate offloads to the CPU and to disk: every number is that of the model in memory."""

from functools import cache

import pytest
import torch

from hooked_mllm import HookedMLLM, metrics, objectives
from hooked_mllm.cache.activation_cache import ActivationCache
from hooked_mllm.toys import VisualRetrieval

TASK = VisualRetrieval(pages=1)
TOYS = ["toy-qwen3-vl", "toy-internvl"]


@cache
def in_memory(name):
    return HookedMLLM.from_pretrained(name, dtype="float32", check=False)


@pytest.fixture(scope="module", params=TOYS)
def pair(request, tmp_path_factory):
    """A model with all modules offloaded, most to disk, and the model in memory."""
    reference = in_memory(request.param)
    on_cpu = (".visual", ".vision_tower", ".multi_modal_projector")
    names = [n for n, m in reference.hf_model.named_modules() if n.count(".") == 1 and n != "model.language_model"]
    names += [f"model.language_model.{n}" for n, _ in reference.hf_model.model.language_model.named_children()]
    layers = f"{names.pop(names.index('model.language_model.layers'))}."
    names += [f"{layers}{i}" for i in range(reference.cfg.n_layers)]
    device_map = {n: "cpu" if n.endswith((*on_cpu, ".0", ".1")) else "disk" for n in [*names, "lm_head"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("offload"))
        model = HookedMLLM.from_pretrained(request.param, dtype="float32", device_map=device_map, offload_folder="disk")
        assert model.lm_head.weight.is_meta and model.output_projection(5).weight.is_meta
        yield model, reference


@pytest.fixture
def sample(pair):
    return TASK.samples(pair[1], 1, answer=True)[0]


@torch.no_grad()
def test_results_and_residual_tools(pair, sample, tmp_path):
    assert {m.device for m in pair} == {torch.device("cpu")}
    (logits, cache), (expected, known) = (m.run_with_cache(sample) for m in pair)
    assert torch.equal(logits, expected)
    for name in known:
        torch.testing.assert_close(cache[name], known[name], atol=1e-5, rtol=1e-4)
    for of in (
        lambda c: c.logit_lens(slice(None)),
        lambda c: c.logit_attrs(c.decompose_resid(), 5, 9),
        lambda c: c.stack_head_results(apply_ln=True),
        lambda c: c.accumulated_resid(apply_ln=True),
    ):
        torch.testing.assert_close(of(cache), of(known), atol=1e-4, rtol=1e-4)
    cache.save(tmp_path / "cache.safetensors")
    loaded = ActivationCache.load(tmp_path / "cache.safetensors")
    torch.testing.assert_close(loaded["result", 5], known["result", 5], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["attn.hook_result", "hook_attn_out", "ln2.hook_scale", "ln1.hook_normalized"])
@torch.no_grad()
def test_edits(pair, sample, name):
    def change(x, hook):
        return x * 1.5

    for point in (f"blocks.5.{name}", f"vision.blocks.1.{name}"):
        edited, expected = (m.run_with_hooks(sample, fwd_hooks=[(point, change)]) for m in pair)
        torch.testing.assert_close(edited, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_metrics(pair, sample):
    direct = metrics.DirectLogitAttribution(wrong=TASK.answers)
    parts = [direct.decompose(m, [sample], progress=False).values for m in pair]
    torch.testing.assert_close(*parts, atol=1e-4, rtol=1e-4)
    effect = metrics.AblationEffect(mode="zero", phase="both", layers=[1, 5])
    effects = [effect.run(m, [sample], objective=objectives.AnswerLogProb(), progress=False).values for m in pair]
    torch.testing.assert_close(*effects, atol=1e-4, rtol=1e-4, equal_nan=True)
    scores = [m.measure([sample], metrics.RetrievalAttentionMass(), progress=False).values for m in pair]
    torch.testing.assert_close(*scores, atol=1e-6, rtol=1e-5)
