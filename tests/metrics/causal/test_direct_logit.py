"""Direct logit attribution against matrix products in NumPy on unwrapped models."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchFeature

from helpers.intervention_witness import batch, sample
from helpers.tiny import HEAD_DIM, HEADS, tiny_processor
from helpers.wrapped import LAYERS, fresh, plain, wrapped
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import CacheFileError, HeadError, InputError
from hooked_mllm.metrics import DirectLogitAttribution, LogitDecomposition
from hooked_mllm.toys import VisualRetrieval

CORRECT, WRONG = 7, [11, 30, 200]


def numbers(tensor):
    return tensor.detach().double().numpy()


def plain_attribution(model, inputs):
    """Attributions [layer head] of a sample's last position, and the logit difference itself."""
    text, z, final, handles = model.model.language_model, {}, [], []
    for layer, block in enumerate(text.layers):
        at = block.self_attn.o_proj
        handles.append(at.register_forward_pre_hook(lambda _, args, at=layer: z.update({at: args[0][0, -1]})))
    handles.append(text.norm.register_forward_pre_hook(lambda _, args: final.append(args[0][0, -1])))
    try:
        logits = numbers(model(**inputs, use_cache=False).logits[0, -1])
    finally:
        for handle in handles:
            handle.remove()
    unembed, stream = numbers(model.lm_head.weight), numbers(final[0])
    direction = unembed[CORRECT] - unembed[WRONG].mean(0)
    folded = direction * numbers(text.norm.weight) / np.sqrt((stream**2).mean() + text.norm.variance_epsilon)
    out = np.zeros((LAYERS, HEADS))
    for layer, block in enumerate(text.layers):
        weight = numbers(block.self_attn.o_proj.weight)
        for head in range(HEADS):
            part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            out[layer, head] = weight[:, part] @ numbers(z[layer][part]) @ folded
    return out, logits[CORRECT] - logits[WRONG].mean()


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe", "llava_onevision", "internvl"])
def test_heads_and_the_sum_of_everything(name):
    like = "qwen3_vl" if name.endswith("moe") else name
    samples = [sample(like, 0), sample(like, 1)]
    metric = DirectLogitAttribution(CORRECT, wrong=WRONG)
    found = metric.decompose(wrapped(name), samples, progress=False)
    due, totals = zip(*(plain_attribution(plain(name), s.inputs) for s in samples), strict=True)
    np.testing.assert_allclose(found.sample_heads.values, due, atol=1e-5)
    np.testing.assert_allclose(metric.run(wrapped(name), samples, progress=False).values, np.mean(due, 0), atol=1e-5)
    np.testing.assert_allclose(found.total, totals, atol=1e-4)
    np.testing.assert_allclose(found.values.sum(0), found.total, atol=1e-4)
    stacked = {f"{layer}_deepstack" for layer in range(2)} if like == "qwen3_vl" else set()
    rest = {"embed", *(f"{layer}_mlp_out" for layer in range(LAYERS)), *stacked}
    assert set(found.labels) == rest | {f"L{layer}H{head}" for layer in range(LAYERS) for head in range(HEADS)}
    assert all(found[label] == 0 for label in stacked)  # the last position sees no image of its own
    assert found["L1H2"] == pytest.approx(np.mean(due, 0)[1, 2], abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_of_unequal_samples(family, side):
    metric = DirectLogitAttribution(CORRECT, wrong=WRONG)
    padded = batch(family, side)
    together = metric.decompose(wrapped(family), padded, progress=False)
    apart = metric.decompose(wrapped(family), list(padded), progress=False)
    assert together.labels == apart.labels
    torch.testing.assert_close(together.values, apart.values, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(together.values.sum(0), together.total, atol=1e-4, rtol=1e-4)


def test_biases_are_components():
    hf_model = fresh("internvl")
    noise = torch.Generator().manual_seed(0)
    for block in hf_model.model.language_model.layers:
        block.self_attn.o_proj.bias = nn.Parameter(torch.randn(32, generator=noise), requires_grad=False)
    hf_model.lm_head.bias = nn.Parameter(torch.randn(448, generator=noise), requires_grad=False)
    model = HookedMLLM.from_model(hf_model, tiny_processor("internvl"), check=False)
    found = DirectLogitAttribution(CORRECT, wrong=WRONG).decompose(model, sample("internvl", 0), progress=False)
    bias = numbers(hf_model.lm_head.bias)
    assert found["unembed_bias"] == pytest.approx(bias[CORRECT] - bias[WRONG].mean(), abs=1e-6)
    assert all(abs(found[f"{layer}_attn_bias"]) > 1e-3 for layer in range(LAYERS))
    torch.testing.assert_close(found.values.sum(0), found.total, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_toy_and_the_corrupted_answer(dtype):
    model, task = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype=dtype), VisualRetrieval(seed=3, pages=1)
    examples, samples = list(task.examples(6)), task.samples(model, 6, answer=True)
    clean = 0
    other = next(i for i, e in enumerate(examples) if e.answer != examples[clean].answer)
    pair = (samples[clean], samples[other])
    found = DirectLogitAttribution().decompose(model, pair, progress=False)
    named = DirectLogitAttribution(examples[clean].answer, wrong=examples[other].answer)
    torch.testing.assert_close(named.decompose(model, samples[:1], progress=False).values, found.values)
    assert found.total.item() > 5
    off = {"float32": 1e-3, "bfloat16": 0.3}[dtype]  # bfloat16 rounds the stream after every term
    assert found.values.sum().item() == pytest.approx(found.total.item(), abs=off)
    assert found.provenance["sample_ids"] == [samples[clean].id]
    assert found.heads.provenance["config"] == {"correct": None, "wrong": None}


def test_saved_and_read_again(tmp_path):
    found = DirectLogitAttribution(CORRECT, wrong=WRONG).decompose(
        wrapped("internvl"), sample("internvl", 0), progress=False
    )
    found.save(tmp_path / "a.safetensors")
    again = LogitDecomposition.load(tmp_path / "a.safetensors")
    assert torch.equal(again.values, found.values) and torch.equal(again.total, found.total)
    assert (again.labels, again.shape, again.provenance) == (found.labels, found.shape, found.provenance)
    (tmp_path / "b").write_bytes(b"\x80\x04")
    with pytest.raises(CacheFileError, match="pickle"):
        LogitDecomposition.load(tmp_path / "b")


def test_one_input_several_and_pairs(family):
    model, two = wrapped(family), batch(family)
    metric = DirectLogitAttribution(CORRECT, wrong=WRONG)
    expected = metric.decompose(model, list(two), progress=False).values
    feature = BatchFeature(dict(two.inputs))
    for samples in (two, feature, [feature], iter(two), [(two[0], two[1]), two[1]], ((two[0], two[1]), two[1])):
        found = metric.decompose(model, samples, progress=False).values
        np.testing.assert_allclose(found, expected, atol=1e-5)
    # a tuple of two samples is one pair, of which the first is attributed
    np.testing.assert_allclose(metric.decompose(model, (two[0], two[1]), progress=False).values, expected[:, :1])


def test_what_is_rejected():
    model = wrapped("qwen3_vl")
    with pytest.raises(InputError, match="no wrong token"):
        DirectLogitAttribution(CORRECT).run(model, sample("qwen3_vl", 0), progress=False)
    with pytest.raises(InputError, match="is empty"):
        DirectLogitAttribution(CORRECT, wrong=WRONG).run(model, [])
    found = DirectLogitAttribution(CORRECT, wrong=WRONG).decompose(model, sample("qwen3_vl", 0).inputs, progress=False)
    with pytest.raises(HeadError, match="no component 'L9H9'"):
        found["L9H9"]


def test_the_table_of_a_notebook_has_the_largest_components_in_order():
    values = torch.tensor([[0.1, 0.3], [-2.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
    parts = LogitDecomposition(values, ("embed", "L0H0", "<b>"), values.sum(0), (1, 1))
    html = parts._repr_html_()
    assert "LogitDecomposition: 3 components, 2 samples" in html and "the total is -0.800" in html
    assert html.index("-1.500") < html.index("+0.500") < html.index("+0.200")
    assert "&lt;b&gt;" in html and "<b>" not in html
