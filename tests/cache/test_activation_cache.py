"""What is cached must be what other means of looking find, and looking must change nothing."""

import pytest
import torch
from nnsight import NNsight

from helpers.cache_witness import attentions, batch, close, film, hooked, plain, recording, sample, text_sample
from hooked_mllm import ActivationCache, HeadSet
from hooked_mllm.errors import HeadError, HookNameError, HookValueError, LayoutError

INPUTS = [sample, batch, film, text_sample]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("make", INPUTS)
def test_with_everything_cached_the_logits_are_those_of_the_plain_model(family, make, attn):
    inputs = make(family)
    with torch.no_grad():
        expected = plain(family, attn)(**inputs.inputs, use_cache=False).logits
    logits, cache = hooked(family, attn).run_with_cache(inputs)
    assert torch.equal(logits, expected)
    assert torch.equal(cache["logits"], expected)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("make", INPUTS)
def test_patterns_are_those_of_eager_transformers(family, make, attn):
    inputs = make(family)
    _, cache = hooked(family, attn).run_with_cache(inputs, "blocks.*hook_pattern")
    real = ~inputs.mask("padding")
    for layer, expected in enumerate(attentions(family, inputs.inputs)):
        got = cache["pattern", layer]
        assert got.dtype == torch.float32
        for b in range(len(real)):
            close(got[b, :, real[b]], expected[b, :, real[b]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_patterns_of_a_batch_are_those_of_its_samples(family, side):
    model, samples = hooked(family), batch(family, side)
    _, together = model.run_with_cache(samples, "*hook_pattern")
    for b, one in enumerate(samples):
        _, alone = model.run_with_cache(one, "*hook_pattern")
        real = ~samples.mask("padding")[b]
        close(together["pattern", 1][b][:, real][:, :, real], alone["pattern", 1][0])


@pytest.mark.parametrize("make", [sample, film])
def test_vision_patterns_are_those_of_eager_transformers(family, make):
    inputs, hf_model = make(family), plain(family)
    with recording(hf_model.config.vision_config) as seen, torch.no_grad():
        hf_model(**inputs.inputs)
    by_layer: dict[torch.nn.Module, list[torch.Tensor]] = {}
    for module, weights in seen:
        by_layer.setdefault(module, []).append(weights)
    _, cache = hooked(family).run_with_cache(inputs, "vision.*hook_pattern")
    assert len(cache) == len(by_layer) == 3
    for layer, calls in enumerate(by_layer.values()):
        got = cache["vision", "pattern", layer]
        if family == "qwen3_vl":  # one packed row: each image and each pair of frames attends to itself
            blocks = torch.stack([torch.block_diag(*(c[0, h] for c in calls)) for h in range(got.shape[1])])
            close(got, blocks[None])
        else:
            close(got, torch.cat(calls))


def test_z_is_what_nnsight_sees_enter_the_output_projection(family):
    model, inputs = hooked(family), sample(family)
    _, cache = model.run_with_cache(inputs, ["blocks.*hook_z", "blocks.*hook_attn_out"])
    with torch.no_grad():
        witness = NNsight(model.hf_model)
        saved, outs = [], []
        with witness.trace(**inputs.inputs):
            for layer in range(model.cfg.n_layers):
                attention = witness.model.language_model.layers[layer].self_attn
                saved.append(attention.o_proj.input.save())
                outs.append(attention.o_proj.output.save())
    for layer in range(model.cfg.n_layers):
        close(cache["z", layer].flatten(2), saved[layer], 0)
        close(cache["attn_out", layer], outs[layer], 0)


def _rotated(family, model, q, k, inputs):
    """Rotary embedding by transformers' own functions, on `[batch head pos d_head]`."""
    import transformers.models.qwen2.modeling_qwen2 as qwen2
    import transformers.models.qwen3.modeling_qwen3 as qwen3
    import transformers.models.qwen3_vl.modeling_qwen3_vl as qwen3_vl

    module = {"qwen3_vl": qwen3_vl, "llava_onevision": qwen2, "internvl": qwen3}[family]
    seen = {}
    rotary = model.hf_model.model.language_model.rotary_emb
    handle = rotary.register_forward_hook(lambda m, args, out: seen.update(out=out))
    try:
        model(inputs)
    finally:
        handle.remove()
    return module.apply_rotary_pos_emb(q, k, *seen["out"])


def test_q_k_and_v_are_those_made_by_hand(family):
    model, inputs = hooked(family), sample(family)
    _, cache = model.run_with_cache(inputs)
    for layer in range(model.cfg.n_layers):
        block = model.hf_model.model.language_model.layers[layer]
        x = block.input_layernorm(cache["resid_pre", layer])
        attention = block.self_attn
        q, k, v = (getattr(attention, f"{n}_proj")(x).unflatten(-1, (-1, model.cfg.d_head)) for n in "qkv")
        close(cache["v", layer], v, 1e-6)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        close(cache["q", layer], q, 1e-6)
        close(cache["k", layer], k, 1e-6)
        rot_q, rot_k = _rotated(family, model, q.transpose(1, 2), k.transpose(1, 2), inputs)
        close(cache["rot_q", layer], rot_q.transpose(1, 2))
        close(cache["rot_k", layer], rot_k.transpose(1, 2))


def test_scores_before_the_softmax_give_the_pattern(family):
    _, cache = hooked(family).run_with_cache(batch(family))
    scores = cache["attn_scores", 2]
    seen = torch.isfinite(scores).any(-1, keepdim=True)
    close(torch.where(seen, scores.softmax(-1).nan_to_num(), cache["pattern", 2]), cache["pattern", 2])
    assert torch.isneginf(scores[0, 0, 0, 1:]).all()  # the future


@pytest.mark.parametrize("make", INPUTS)
def test_head_results_and_the_bias_sum_to_what_attention_writes(family, make):
    model, inputs = hooked(family), make(family)
    _, cache = model.run_with_cache(inputs, ["*hook_result", "*hook_attn_out"])
    for layer in range(model.cfg.n_layers):
        bias = model.output_projection(layer).bias
        total = cache["result", layer].sum(2) + (0 if bias is None else bias)
        close(total, cache["attn_out", layer])


def test_the_stream_between_the_blocks_adds_up(family):
    _, cache = hooked(family).run_with_cache(film(family))
    for tower, layers in (((), 3), (("vision",), 3)):
        for layer in range(layers):
            pre, mid, post = (cache[(*tower, f"resid_{n}", layer)] for n in ("pre", "mid", "post"))
            close(pre + cache[(*tower, "attn_out", layer)], mid)
            close(mid + cache[(*tower, "mlp_out", layer)], post)


def test_norms_are_cached_as_scale_and_normalized(family):
    model = hooked(family)
    _, cache = model.run_with_cache(sample(family))
    x = cache["resid_mid", 1]
    close(cache["scale", 1, "ln2"], (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt(), 1e-4)
    close(cache["normalized", 1, "ln2"] * cache["scale", 1, "ln2"], x)
    normalized = cache["normalized"] * model.ln_final.weight
    close(model.lm_head(normalized), cache["logits"], 1e-4)


def test_a_mapping_reads_like_one(family):
    _, cache = hooked(family).run_with_cache(sample(family))
    names = list(cache)
    assert names == list(cache.keys()) == [n for n, _ in cache.items()] and len(names) == len(cache)
    assert all(isinstance(v, torch.Tensor) for v in cache.values())
    order = list(hooked(family).hook_dict)
    assert names == [n for n in order if n in cache]
    for key in (("z", 0), ("z", -1), "blocks.0.attn.hook_z", "embed", ("vision", "pattern", 2), ("projector", "out")):
        assert key in cache
    for key in (("z", 99), ("nonsense", 0), "blocks.7.hook_z", 3, None):
        assert key not in cache
    with pytest.raises(HookNameError, match=r"blocks\.0\.attn\.hook_zz.*blocks\.0\.attn\.hook_z"):
        cache["blocks.0.attn.hook_zz"]


def test_repr_lists_what_is_there_and_how_much(family):
    _, cache = hooked(family).run_with_cache(sample(family), ["blocks.*hook_pattern", "blocks.*hook_z"])
    text = repr(cache)
    assert "6 activations" in text and "blocks 0-2" in text and "when read" in text
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for n, t in cache.items() if "hook_z" in n}
    assert cache.nbytes > sum(held.values())


# -- patterns by rows and columns ------------------------------------------------------------------------------------


WAYS = {
    "kind": ("question", "target"),
    "index": (5, 3),
    "indices": ([7, 2], [0, 4, 1]),
    "negative": ([-1, -3], -2),
    "slice": (slice(4, 12, 2), slice(None, 9)),
    "open slice": (slice(-3, None), slice(-6, None)),
    "all": (None, None),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("attn_scores", [False, True])
def test_rows_and_columns_are_those_of_the_whole_pattern(family, way, attn_scores):
    inputs = sample(family)
    _, cache = hooked(family).run_with_cache(inputs)
    whole = cache["attn_scores" if attn_scores else "pattern", 1]
    places = [
        inputs.mask(w)[0].nonzero().flatten()
        if isinstance(w, str)
        else torch.arange(len(inputs))[slice(None) if w is None else w]
        for w in way
    ]
    rows, columns = (torch.atleast_1d(p) for p in places)
    expected = whole[:, :, rows][:, :, :, columns]
    got = cache.pattern(1, *way, scores=attn_scores)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(cache.pattern(1, *way, heads=[3, 0], scores=attn_scores), expected[:, [3, 0]])
    torch.testing.assert_close(cache.pattern(1, *way, heads=2, scores=attn_scores), expected[:, [2]])


def test_in_a_batch_of_unequal_masks_absent_rows_are_nan_and_absent_columns_are_hidden_keys(family):
    inputs = batch(family)
    _, cache = hooked(family).run_with_cache(inputs, "blocks.*")
    mask = inputs.mask("question")
    rows = cache.pattern(0, queries="question", keys=mask)
    counts = mask.sum(1)
    assert rows.shape[2] == rows.shape[3] == counts.max() and counts[0] != counts[1]
    for b in range(2):
        n = int(counts[b])
        close(rows[b, :, :n, :n], cache["pattern", 0][b][:, mask[b]][:, :, mask[b]])
        assert rows[b, :, n:].isnan().all() and not rows[b, :, :n, n:].any()
    scores = cache.pattern(0, queries="question", keys=mask, scores=True)
    fewer = int(counts.argmin())
    assert scores[fewer, :, counts[fewer] :].isnan().all() and not scores[1 - fewer].isnan().any()
    assert (scores[fewer, :, : counts[fewer], counts[fewer] :] == -torch.inf).all()


def test_vision_patterns_are_read_by_rows_too(family):
    _, cache = hooked(family).run_with_cache(sample(family), ["*hook_pattern"], queries="question")
    expected = cache["vision", "pattern", 0][:, :, [1, 5]][..., [0, 2]]
    close(cache.pattern(0, queries=[1, 5], keys=[0, 2], tower="vision"), expected)


def test_positions_that_are_not_there_are_rejected(family):
    model, inputs = hooked(family), sample(family)
    _, cache = model.run_with_cache(inputs)
    for wrong in (len(inputs), -len(inputs) - 1, [0, 999], torch.zeros(1, 3, dtype=torch.bool)):
        with pytest.raises(LayoutError):
            cache.pattern(0, queries=wrong)
    numbers = inputs.inputs["attention_mask"]  # a mask, but of 0 and 1
    for mask in (numbers, numbers[0], numbers.float(), numbers.float()[:, :2]):
        with pytest.raises(LayoutError, match=r"give mask\.bool\(\)"):
            cache.pattern(0, keys=mask)
    flags = [n % 3 == 0 for n in range(len(inputs))]
    close(cache.pattern(0, keys=flags), cache.pattern(0, keys=list(range(0, len(inputs), 3))))
    with pytest.raises(LayoutError, match="mapping of model inputs has no token layout"):
        model.run_with_cache(dict(inputs.inputs))[1].pattern(0, queries="question")
    with pytest.raises(LayoutError):
        model.run_with_cache(text_sample(family))[1].pattern(0, queries="visual")
    with pytest.raises(HookNameError):
        model.run_with_cache(inputs, "*hook_z")[1].pattern(0)


# -- slicing and moving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_of_a_batch(family, side):
    inputs = batch(family, side)
    _, cache = hooked(family).run_with_cache(inputs)
    for b in (0, 1, -1):
        one = cache.sample(b)
        for name in [n for n in cache if not n.startswith(("vision", "projector"))]:
            assert torch.equal(one[name], cache[name][b : b + 1 or None]), name
        mask = inputs.mask("question")[b]
        close(one.pattern(1, queries="question"), cache["pattern", 1][b : b + 1 or None][:, :, mask])
    for all_samples in (slice(0, 2), (0, 2)):
        assert torch.equal(cache.apply_slice_to_batch_dim(all_samples)["pattern", 0], cache["pattern", 0])
    assert torch.equal(cache.apply_slice_to_batch_dim(1)["z", 0], cache["z", 0][1])  # a number removes the axis
    assert cache.has_batch_dim
    for wrong in (2, -3, slice(2, 3)):
        with pytest.raises(HookValueError, match="batch of 2"):
            cache.sample(wrong)
    with pytest.raises(HookValueError, match="batch of one"):
        cache.remove_batch_dim()


def test_without_the_batch_axis_everything_is_read_without_it(family):
    model, inputs = hooked(family), sample(family)
    _, full = model.run_with_cache(inputs)
    _, cache = model.run_with_cache(inputs, remove_batch_dim=True)
    assert not cache.has_batch_dim and cache.remove_batch_dim() is cache
    _, in_place = model.run_with_cache(inputs, "*hook_z")
    assert in_place.remove_batch_dim() is in_place and not in_place.has_batch_dim
    assert torch.equal(in_place["z", 1], full["z", 1][0])
    for name in cache:
        expected = full[name]
        assert torch.equal(cache[name], expected[0] if expected.shape[0] == 1 else expected), name
    assert torch.equal(cache.pattern(1, "question", [0, 3]), full.pattern(1, "question", [0, 3])[0])
    assert torch.equal(cache.decompose_resid(), full.decompose_resid()[:, 0])
    assert torch.equal(cache.accumulated_resid(apply_ln=True), full.accumulated_resid(apply_ln=True)[:, 0])
    assert torch.equal(cache.logit_lens("question"), full.logit_lens("question")[:, 0])
    heads, all_heads = cache.stack_head_results(), full.stack_head_results()
    assert torch.equal(heads, all_heads[:, 0])
    assert torch.equal(cache.apply_ln_to_stack(heads), full.apply_ln_to_stack(all_heads)[:, 0])
    assert torch.equal(cache.logit_attrs(heads, 5, 6), full.logit_attrs(all_heads, 5, 6)[:, 0])
    with pytest.raises(HookValueError, match="batch axis"):
        cache.sample(0)
    with pytest.raises(HookValueError, match="batch of one"):
        model.run_with_cache(batch(family), remove_batch_dim=True)


def test_moving_keeps_what_is_lazy_lazy(family):
    _, cache = hooked(family).run_with_cache(sample(family))
    moved = cache.to("cpu")
    assert isinstance(moved, ActivationCache) and moved.nbytes == cache.nbytes
    for name in cache:
        assert torch.equal(moved[name], cache[name])
    assert torch.equal(moved.pattern(0, "question"), cache.pattern(0, "question"))


def test_heads_of_a_layer_are_specified_in_any_way(family):
    _, cache = hooked(family).run_with_cache(sample(family), "*hook_pattern")
    n_layers, n_heads = hooked(family).cfg.n_layers, hooked(family).cfg.n_heads
    whole = cache["pattern", 1]
    mask = torch.zeros(n_layers, n_heads, dtype=torch.bool)
    mask[1, [0, 2]] = mask[0, 1] = True
    ways = ("L1H0, L1H2", ["L1H0", (1, 2)], [0, 2], (0, 2), mask, mask[1], HeadSet.from_mask(mask), {1: [0, 2]})
    for heads in ways:
        for layer in (1, 1 - n_layers):
            assert torch.equal(cache.pattern(layer, heads=heads), whole[:, [0, 2]])
    assert torch.equal(cache.pattern(1, heads="L1H2"), whole[:, [2]])
    assert torch.equal(cache.pattern(1, heads=-1), whole[:, [n_heads - 1]])
    for heads, message in (
        ("L2H0", "Expected heads of layer 1; got L2H0"),
        (n_heads, f"heads of layer 1 are 0 to {n_heads - 1}"),
        (object(), "Expected a head"),
        (HeadSet(["L1H0"], n_layers=36, n_heads=32), "36 x 32"),
    ):
        with pytest.raises(HeadError, match=message):
            cache.pattern(1, heads=heads)
