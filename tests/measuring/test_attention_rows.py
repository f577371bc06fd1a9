"""Attention rows against attention in float64 NumPy, whatever the padding, mask, dtype and chunking."""

import numpy as np
import pytest
import torch

from helpers.attention_reference import BUDGETS, CASES, random_layers, softmax_attention
from hooked_mllm import HookedMLLM, metrics, toys
from hooked_mllm.attention.hybrid import HybridAttention
from hooked_mllm.attention.streaming import StreamingHeads
from hooked_mllm.errors import HookValueError, InputError
from hooked_mllm.measuring.attention_view import AttentionView


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_profile_is_the_mean_row(case, budget):
    layers = random_layers(**case)
    view = layers.view(max_bytes=budget)
    profile = view.profile("question")
    assert profile.dtype == torch.float32
    np.testing.assert_allclose(profile.numpy(), layers.profile("question"), atol=2e-6)
    view.check()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rows_are_the_attention_of_each_query_and_zero_where_a_sample_has_fewer(case, budget):
    layers = random_layers(**case)
    rows = layers.view(max_bytes=budget).rows("question").numpy()
    for b, question in enumerate(layers.masks["question"].numpy()):
        n = question.sum()
        np.testing.assert_allclose(rows[:, b, :, :n], layers.attention[:, b][:, :, question], atol=2e-6)
        assert not rows[:, b, :, n:].any()


@pytest.mark.parametrize("budget", BUDGETS)
def test_reduced_rows_equal_reducing_all_rows(budget):
    layers = random_layers(lengths=(23, 18), window=6)
    view = layers.view(max_bytes=budget)
    entropy = lambda rows: -(rows * rows.clamp(min=1e-30).log()).sum(-1)  # noqa: E731
    reduced = view.rows("question", reduce=entropy)
    assert torch.allclose(reduced, entropy(view.rows("question")), atol=1e-6)
    mean = view.average(reduced, "question").numpy()
    for b, question in enumerate(layers.masks["question"].numpy()):
        rows = layers.attention[:, b][:, :, question]
        expected = -(rows * np.log(np.maximum(rows, 1e-300))).sum(-1).mean(-1)
        np.testing.assert_allclose(mean[:, b], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_q_and_k_give_float32_rows(dtype):
    layers = random_layers(dtype=dtype, d_head=32, lengths=(37,))
    # the reference reads the very same half-precision q and k: what is left is the error of float32 arithmetic
    np.testing.assert_allclose(layers.view().profile("question").numpy(), layers.profile("question"), atol=3e-6)


def test_scores_beyond_the_range_of_float16_do_not_overflow():
    layers = random_layers(dtype=torch.float16)
    q, k = [300 * t for t in layers.q], [300 * t for t in layers.k]
    view = AttentionView(range(3), q, k, layers.mask, [1.0] * 3, layers.masks.__getitem__, 3)
    sums = view.profile("question").sum(-1)
    view.check()
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


def test_contiguous_and_transposed_inputs_agree_exactly():
    layers = random_layers(lengths=(23, 19))
    q, k = ([t.contiguous() for t in tensors] for tensors in (layers.q, layers.k))
    other = AttentionView(range(3), q, k, layers.mask, layers.scale, layers.masks.__getitem__, 3)
    assert torch.equal(layers.view().profile("question"), other.profile("question"))


def streamed(side):
    """Layers of which two have streaming heads, and what each head sees, by hand: [layer batch head query key]."""
    layers = random_layers(lengths=(23, 17), padding_side=side)
    kinds = [None, StreamingHeads((0, 3), 4, 2, 5), StreamingHeads((), 4, 0, 1)]
    i, j = np.arange(23)[:, None], np.arange(23)[None]
    seen = np.zeros((3, 2, 4, 23, 23), dtype=bool)
    for (layer, b, head), _ in np.ndenumerate(seen[..., 0, 0]):
        real = ~layers.masks["padding"][b].numpy()
        start, kind = int(real.argmax()), kinds[layer]
        seen[layer, b, head] = (j <= i) & real[None] & real[:, None]
        if kind is not None and head not in kind.dense:
            seen[layer, b, head] &= (j > i - kind.window) | (j < start + kind.sink)
    layers.mask = [m if kind is None else m.streamed(kind) for m, kind in zip(layers.mask, kinds, strict=True)]
    for layer in range(3):
        q, k = layers.q[layer].numpy(), layers.k[layer].numpy()
        for head in range(4):
            own = softmax_attention(
                q[:, head : head + 1], k[:, head // 2 : head // 2 + 1], seen[layer, :, head], layers.scale[layer]
            )
            layers.attention[layer, :, head] = own[:, 0]
    return layers, seen


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_where_heads_stream_all_follows_what_each_head_sees(side, budget):
    layers, seen = streamed(side)
    view = AttentionView(
        range(3), layers.q, layers.k, layers.mask, layers.scale, layers.masks.__getitem__, 3, max_bytes=budget
    )
    expected = layers.profile("question")
    np.testing.assert_allclose(view.profile("question"), expected, atol=2e-6)
    rows, chance = view.rows("question").numpy(), view.chance("question", "target").numpy()
    for b in range(2):
        question, target = layers.masks["question"][b].numpy(), layers.masks["target"][b].numpy()
        np.testing.assert_allclose(rows[:, b, :, : question.sum()], layers.attention[:, b][:, :, question], atol=2e-6)
        np.testing.assert_allclose(
            view.mass("question", "target")[:, b], expected[:, b][..., target].sum(-1), atol=2e-6
        )
        visible = seen[:, b][:, :, question]
        np.testing.assert_allclose(chance[:, b], ((visible & target).sum(-1) / visible.sum(-1)).mean(-1), atol=1e-6)
    assert not np.allclose(chance[1, :, 0], chance[1, :, 1])
    best = view.top("question", 0.1)
    assert (expected[best.numpy()].min() > 0) and best[2, :, :, :3].sum() == 0  # the window of one is at the question


def test_rows_kept_by_name_are_all_that_is_needed():
    layers = random_layers(lengths=(23, 20))
    selection = layers.view()._selections.queries("question")
    kept = {"question": [selection.take(q, slice(0, selection.length)) for q in layers.q]}
    view = AttentionView(range(3), kept, layers.k, layers.mask, layers.scale, layers.masks.__getitem__, 3)
    whole = layers.view()
    assert torch.equal(view.profile("question"), whole.profile("question"))
    assert torch.equal(view.rows("question"), whole.rows("question"))
    assert torch.equal(view.chance("question", "target"), whole.chance("question", "target"))
    with pytest.raises(InputError, match=r"rows of the 'last' query tokens were not kept.*only question"):
        view.profile("last")


def test_the_kernel_is_rejected_where_it_cannot_run(monkeypatch):
    layers = random_layers()  # heads of width 8
    with pytest.raises(HookValueError, match="runs on a GPU; k is on cpu. 'torch' runs anywhere"):
        layers.view(implementation="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(HookValueError, match="head dims 16 to 256"):
        layers.view(implementation="triton")
    with pytest.raises(HookValueError, match="'auto', 'triton' or 'torch'"):
        layers.view(implementation="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_the_profile_is_that_of_float64(dtype):
    layers = random_layers(dtype=dtype, d_head=64, lengths=(97, 64), heads=8, kv_heads=2)
    device = torch.device("cuda")
    q, k = ([t.to(device) for t in tensors] for tensors in (layers.q, layers.k))
    mask = [m.to(device) for m in layers.mask]
    view = AttentionView(range(3), q, k, mask, layers.scale, layers.masks.__getitem__, 3)
    np.testing.assert_allclose(view.profile("question").cpu().numpy(), layers.profile("question"), atol=5e-6)
    assert torch.equal(view.top("question", 0.1).cpu(), layers.view().top("question", 0.1))
    view.release()
    view.check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_metrics_by_the_kernel_are_those_by_torch(monkeypatch):
    model = HookedMLLM.from_pretrained("toy-qwen3-vl", device_map="cuda", dtype="bfloat16")
    samples = toys.VisualRetrieval(pages=2).samples(model, 3)
    found = {}
    for how in ("auto", "torch"):
        monkeypatch.setattr("hooked_mllm.measuring.attention_rows.IMPLEMENTATION", how)
        three = [metrics.RetrievalAttentionMass(), metrics.KeyTokenRatio(), metrics.VisionMass(queries="last")]
        with model.attention(HybridAttention([(0, 0), (1, 1)], sink=4, window=16)):
            hybrid = model.measure(samples, three, progress=False)
        found[how] = [*hybrid, *model.measure(samples, [type(m)() for m in three], progress=False)]
    for kernel, torch_rows in zip(found["auto"], found["torch"], strict=True):
        off = (kernel.values - torch_rows.values).abs()
        assert off.max() < 1e-5 if kernel.name != "KeyTokenRatio" else (off > 1e-9).float().mean() < 0.02  # near-ties
    assert not torch.allclose(found["auto"][0].values, found["auto"][3].values, atol=1e-3)
