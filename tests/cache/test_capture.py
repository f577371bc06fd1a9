"""`run_with_cache` keeps what its filter names, with any hooks registered before, and leaves no hook."""

import re

import pytest
import torch

from helpers.cache_witness import batch, close, film, hooked, sample, text_sample
from helpers.tiny import tiny_model
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import HookNameError, HookValueError, LayoutError


def same(a, b):
    """Close, and NaN at the same positions, which a sample lacks."""
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, equal_nan=True)


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    yield
    for family in ("qwen3_vl", "llava_onevision", "internvl"):
        model = hooked(family)
        assert not model.list_hooks()
        assert not any(site.taps for site in (*model.wiring.text, *model.wiring.vision))
        assert model.hf_model.config.text_config._attn_implementation == "sdpa"


# -- which names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "held"),
    [
        ("blocks.1.attn.hook_z", ["blocks.1.attn.hook_z"]),
        ("blocks.*.hook_resid_post", [f"blocks.{i}.hook_resid_post" for i in range(3)]),
        (re.compile(r"^blocks\.[02]\.attn\.hook_k$"), ["blocks.0.attn.hook_k", "blocks.2.attn.hook_k"]),
        (lambda n: n.endswith("mlp.hook_pre") and "vision" not in n, [f"blocks.{i}.mlp.hook_pre" for i in range(3)]),
        (("hook_logits", "hook_embed"), ["hook_embed", "hook_logits"]),
        ({"hook_embed"}, ["hook_embed"]),
        (["hook_embed", "projector.*", "hook_embed"], ["projector.hook_in", "projector.hook_out", "hook_embed"]),
        (lambda n: False, []),
    ],
)
def test_forms_of_names_filter(family, names, held):
    _, cache = hooked(family).run_with_cache(sample(family), names)
    assert list(cache) == held


@pytest.mark.parametrize(
    "names", ["blocks.1.attn.hook_zz", "blocks.9.*", ["hook_embed", "hook_nothing"], re.compile("nonsense")]
)
def test_a_name_that_is_not_there_is_rejected_even_among_good_ones(family, names):
    with pytest.raises(HookNameError, match=r"has no hook point|No hook point of"):
        hooked(family).run_with_cache(sample(family), names)
    with pytest.raises(HookValueError, match="name filter"):
        hooked(family).run_with_cache(sample(family), ["hook_embed", 3])


def test_what_one_name_caches_is_what_all_names_cache(family):
    model, inputs = hooked(family), film(family)
    _, everything = model.run_with_cache(inputs)
    for name in [n for n in model.hook_dict if ".1." in n or "blocks" not in n]:
        _, one = model.run_with_cache(inputs, name, return_logits=name == "hook_logits")
        assert list(one) == [name]
        assert torch.equal(one[name], everything[name]), name


# -- where and how much ----------------------------------------------------------------------------------------------


def test_rows_and_columns_kept_are_those_of_the_whole(family):
    model, inputs = hooked(family), batch(family)
    _, full = model.run_with_cache(inputs, "blocks.*")
    question, visual = inputs.mask("question"), inputs.mask("visual")
    n = question.shape[1]
    ways = [
        ("question", None),
        (question, "visual"),
        ([3, n - 1], slice(2, 9)),
        (slice(-4, None), None),
        (-1, [0, -1]),
        (None, "last"),
        ("last", visual),
    ]
    for queries, keys in ways:
        _, cache = model.run_with_cache(inputs, "blocks.*", queries=queries, keys=keys)
        expected = full.pattern(1, queries, keys)
        same(cache["pattern", 1], expected)
        same(cache.pattern(1, queries, keys), expected)
        same(cache.pattern(1, queries, keys, heads=[2]), expected[:, [2]])
        same(cache["attn_scores", 1], full.pattern(1, queries, keys, scores=True))
        assert torch.equal(cache["z", 1], full["z", 1])
        some = int(cache.query_positions[0].max()) if queries is not None else 5
        first = keys[:1] if isinstance(keys, torch.Tensor) else keys
        close(cache.sample(0).pattern(1, some, first), full.sample(0).pattern(1, some, first), 1e-6)


def test_rows_that_were_not_kept_are_not_made_up(family):
    model, inputs = hooked(family), sample(family)
    _, full = model.run_with_cache(inputs, "blocks.*hook_pattern")
    for keys in (None, "visual"):
        _, cache = model.run_with_cache(inputs, "blocks.*hook_pattern", queries=[3, 5], keys=keys)
        assert cache.nbytes < full.nbytes / 2
        close(cache.pattern(0, queries=[5]), cache["pattern", 0][:, :, [1]])
        for wrong in (4, -1, "question", slice(None)):
            with pytest.raises(LayoutError, match="did not keep"):
                cache.pattern(0, queries=wrong)
    with pytest.raises(LayoutError, match="did not keep"):
        cache.pattern(0, queries=3, keys=0)  # the first token is text
    for wrong in (99999, [0, -99999], torch.zeros(1, len(inputs), dtype=torch.bool), torch.ones(5).bool()):
        with pytest.raises(LayoutError):
            model.run_with_cache(inputs, queries=wrong)


def test_pos_slice_cuts_positions_and_pattern_rows_as_copies(family):
    model, inputs = hooked(family), sample(family)
    _, full = model.run_with_cache(inputs)
    for cut, places in (
        (slice(2, 5), [2, 3, 4]),
        ((3, 6), [3, 4, 5]),
        ([3, 6], [3, 6]),
        (-1, [len(inputs) - 1]),
        ("question", None),
        ([7, 1], [7, 1]),
    ):
        places = inputs.mask("question")[0].nonzero().flatten().tolist() if places is None else places
        _, cache = model.run_with_cache(inputs, pos_slice=cut)
        for name in cache:
            expected = full[name]
            if not name.startswith(("vision", "projector")):
                dim = 2 if name.endswith(("pattern", "attn_scores")) else 1
                expected = expected.index_select(dim, torch.tensor(places))
            torch.testing.assert_close(cache[name], expected, msg=name)
    _, z = model.run_with_cache(inputs, "blocks.*hook_z", pos_slice=-1)
    assert z.nbytes == 3 * 32 * 4
    with pytest.raises(HookValueError, match="positions"):
        cache.decompose_resid()


def test_two_numbers_are_a_range_and_other_tuples_that_transformer_lens_slices_by_are_rejected(family):
    model, inputs = hooked(family), sample(family)
    _, full = model.run_with_cache(inputs, "blocks.1.attn.hook_z")
    _, cache = model.run_with_cache(inputs, "blocks.1.attn.hook_z", pos_slice=(-4, -1))
    assert torch.equal(cache["z", 1], full["z", 1][:, -4:-1])
    for several, advice in (((3,), r"slice\(3,\)"), ((3, 8, 2), r"slice\(3, 8, 2\).*\[3, 8, 2\]")):
        with pytest.raises(HookValueError, match=advice):
            model.run_with_cache(inputs, pos_slice=several)
    with pytest.raises(LayoutError, match="empty"):
        model.run_with_cache(inputs, pos_slice=(8, 3))


@pytest.mark.parametrize("generate", [False, True])
def test_positions_that_a_sample_lacks_are_nan_and_never_zeros(family, generate):
    model, inputs = hooked(family), batch(family)
    names = ["*hook_resid_post", "*hook_z", "*hook_result", "*hook_pattern", "*hook_attn_scores", "*.attn.hook_in"]
    options = {"generate": {"max_new_tokens": 2, "do_sample": False}} if generate else {}
    _, full = model.run_with_cache(inputs, names)
    _, cache = model.run_with_cache(inputs, names, pos_slice="question", **options)
    cache = cache.steps[0] if generate else cache
    mask = inputs.mask("question")
    counts = mask.sum(1)
    assert counts[0] != counts[1]
    for name in [name for name in cache if name.startswith("blocks.")]:
        dim = 2 if name.endswith(("pattern", "attn_scores")) else 1
        kept, whole = cache[name].movedim(dim, 1), full[name].movedim(dim, 1)
        for b in range(2):
            torch.testing.assert_close(kept[b, : counts[b]], whole[b, mask[b]], atol=1e-5, rtol=1e-4, msg=name)
            assert kept[b, counts[b] :].isnan().all(), name
    edits = [("blocks.*.hook_pattern", lambda p, hook: p), ("blocks.*.hook_z", lambda z, hook: z)]
    with model.hooks(edits):  # patterns are then kept as they are
        _, edited = model.run_with_cache(inputs, "blocks.1.attn.hook_pattern", queries="question")
    torch.testing.assert_close(edited["pattern", 1], cache["pattern", 1], atol=1e-5, rtol=1e-4, equal_nan=True)


def test_device(family):
    model, inputs = hooked(family), sample(family)
    _, cache = model.run_with_cache(inputs, device="meta", names_filter="blocks.*hook_z")
    assert cache["z", 0].device.type == "meta"
    _, cache = model.run_with_cache(inputs, device="cpu")
    close(cache["pattern", 0], model.run_with_cache(inputs)[1]["pattern", 0])


# -- how the run ends ------------------------------------------------------------------------------------------------


def test_stopping_at_a_layer_caches_what_was_run(family):
    model, inputs = hooked(family), sample(family)
    _, full = model.run_with_cache(inputs)
    for layer in (0, 1, 3, -1):
        residual, cache = model.run_with_cache(inputs, stop_at_layer=layer)
        stop = layer % 3 if layer < 0 else layer
        end = full["resid_pre", stop] if stop < 3 else full.accumulated_resid()[-1]
        assert torch.equal(residual, end)
        ran = [n for n in full if not n.startswith(("blocks.", "ln_final", "hook_logits"))]
        ran += [n for n in full if n.startswith("blocks.") and int(n.split(".")[1]) < stop]
        assert set(cache) == set(ran)
        for name in cache:
            assert torch.equal(cache[name], full[name])
        if stop:
            close(cache.decompose_resid(stop).sum(0), residual)
    with pytest.raises(HookNameError, match="3 blocks"):
        model.run_with_cache(inputs, stop_at_layer=4)


def test_without_logits_and_without_a_cache_object(family):
    model, inputs = hooked(family), sample(family)
    logits, full = model.run_with_cache(inputs)
    nothing, cache = model.run_with_cache(inputs, return_logits=False)
    assert nothing is None and set(full) - set(cache) == {"hook_logits"}
    assert all(torch.equal(cache[n], full[n]) for n in cache)
    again, plain = model.run_with_cache(inputs, return_cache_object=False)
    assert type(plain) is dict and torch.equal(again, logits)
    assert all(torch.equal(plain[n], full[n]) for n in full) and len(plain) == len(full)


def test_an_error_in_the_middle_leaves_no_hook(family):
    def fail(x, hook):
        raise RuntimeError("in the middle")

    model = hooked(family)
    with model.hooks([("blocks.1.hook_mlp_out", fail)]):
        with pytest.raises(RuntimeError, match="in the middle"):
            model.run_with_cache(sample(family))
        assert list(model.list_hooks()) == ["blocks.1.hook_mlp_out"]


# -- with hooks that edit --------------------------------------------------------------------------------------------


def test_what_hooks_made_of_an_activation_is_what_is_cached(family):
    model, inputs = hooked(family), sample(family)
    _, before = model.run_with_cache(inputs)

    def even(pattern, hook):
        pattern[:, 1] = 1 / pattern.shape[-1]

    hooks = [("blocks.1.attn.hook_pattern", even), ("blocks.2.attn.hook_attn_scores", lambda s, hook: s * 0.5)]
    with model.hooks(hooks):
        logits, cache = model.run_with_cache(inputs)
        _, rows = model.run_with_cache(inputs, "*hook_pattern", queries="question", keys=[0, 2])
        bare = model(inputs)
    assert torch.equal(logits, bare) and not torch.equal(logits, before["logits"])
    assert (cache["pattern", 1][:, 1] == 1 / len(inputs)).all()
    close(cache["pattern", 1][:, 0], before["pattern", 1][:, 0])
    close(cache.pattern(1, "question", [0, 2], heads=[1, 3]), rows["pattern", 1][:, [1, 3]])
    v = cache["v", 1].repeat_interleave(2, dim=2)
    close(cache["z", 1], torch.einsum("bhqk,bkhd->bqhd", cache["pattern", 1], v))
    halved = 0.5 * torch.einsum("bqhd,bkhd->bhqk", cache["rot_q", 2], cache["rot_k", 2].repeat_interleave(2, dim=2))
    visible = before["pattern", 2] > 0
    close(cache["attn_scores", 2][visible], (halved * model.cfg.d_head**-0.5)[visible])


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.2.hook_resid_mid"]
)
def test_an_edit_in_place_does_not_reach_back_into_what_is_cached(family, name):
    model, inputs = hooked(family), sample(family)
    _, before = model.run_with_cache(inputs)

    def zero(x, hook):
        x.zero_()

    with model.hooks([(name, zero)]):
        _, cache = model.run_with_cache(inputs)
    place = list(before)
    for earlier in place[: place.index(name)]:
        assert torch.equal(cache[earlier], before[earlier]), earlier
    assert not cache[name].any()


def test_a_model_that_runs_on_does_not_change_what_is_cached(family):
    model = hooked(family)
    _, cache = model.run_with_cache(sample(family))
    values = {n: v.clone() for n, v in cache.items()}
    model.run_with_hooks(batch(family), fwd_hooks=[("*", lambda x, hook: x.mul_(2) if x.is_floating_point() else None)])
    model.generate(text_sample(family), max_new_tokens=2)
    assert all(torch.equal(cache[n], v) for n, v in values.items())


def test_pictures_and_a_video_are_cached_in_the_order_of_the_tower(family):
    model, inputs = hooked(family), film(family)
    calls: dict[str, list[torch.Tensor]] = {}

    def keep(x, hook):
        calls.setdefault(hook.name, []).append(x.clone())

    with model.hooks([(lambda n: n.startswith(("vision", "projector")) and "attn" not in n, keep)]):
        _, cache = model.run_with_cache(inputs)
    assert len(calls["vision.hook_out"]) == (1 if family == "internvl" else 2)
    for name, parts in calls.items():
        assert torch.equal(cache[name], torch.cat(parts, dim=1 if family == "qwen3_vl" else 0)), name
    pattern = cache["vision", "pattern", 1]
    close(pattern.sum(-1), torch.ones(pattern.shape[:3]))
    v = cache["vision", "v", 1]
    close(torch.einsum("bhqk,bkhd->bqhd", pattern, v), cache["vision", "z", 1])


def test_a_second_wrapper_and_a_fresh_model_cache_alike(family):
    fresh = HookedMLLM.from_model(tiny_model(family).requires_grad_(False), check=False)
    _, cache = fresh.run_with_cache(dict(sample(family).inputs))
    _, expected = hooked(family).run_with_cache(sample(family))
    different = [n for n in expected if not torch.equal(cache[n], expected[n])]
    # head results are a product on the CPU with other weights in memory, which may round in another order
    assert [n for n in different if not n.endswith("hook_result")] == []
    for name in different:
        torch.testing.assert_close(cache[name], expected[name], atol=1e-6, rtol=1e-5)
