"""Scores, sweeps and reports of a model under hybrid attention, and what is rejected when it is set."""

import json

import numpy as np
import pytest
import torch
from transformers import InternVLForConditionalGeneration

from helpers.cache_witness import batch as padded
from helpers.cache_witness import hooked, sample
from helpers.hybrid_witness import DENSE, SINK, WINDOW, keep_half_of_the_heads
from helpers.tiny import tiny_config, tiny_processor
from helpers.wrapped import fresh, model_inputs, plain, wrapped
from hooked_mllm import AttentionKnockout, HeadAblation, HeadSet, HookedMLLM, HybridAttention, metrics, toys
from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.routing import PerLayer, QueryAwareHeads, StaticHeads
from hooked_mllm.errors import HeadError, HookValueError, InputError, UnsupportedModelError
from hooked_mllm.kernels.hybrid_attention import hybrid_attention
from hooked_mllm.measuring.shared_prefix import SharedPrefix
from hooked_mllm.objectives import LogitDifference
from hooked_mllm.sweep import Sweep

HEADS = [(layer, head) for layer, heads in DENSE.items() for head in heads]


def hybrid(dense=HEADS, sink=SINK, window=WINDOW):
    return HybridAttention(dense, sink=sink, window=window, implementation="naive")


class Policy:
    """Chooses the heads of `DENSE`, and counts."""

    def __init__(self):
        self.calls = []

    def choose(self, q, k, mask, scale, layer):
        assert mask.streaming is None and q.shape[2] == mask.q_length and k.shape[2] == mask.kv_length
        self.calls.append(layer)
        return DENSE.get(layer, ())

    def validate(self, n_layers, n_heads):
        if n_heads != 4:
            raise HeadError(f"a policy for 4 heads, not {n_heads}")

    def describe(self):
        return {"policy": "fixed"}


# -- tools that run the model ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_are_those_of_the_hybrid_pattern(family):
    model, pair = hooked(family), padded(family)
    with model.attention(hybrid()):
        _, cache = model.run_with_cache(pair, names_filter="*hook_pattern")
        ram, ktr = model.measure(pair, [metrics.RetrievalAttentionMass(), metrics.KeyTokenRatio()], progress=False)
    dense = model.measure(pair, metrics.RetrievalAttentionMass(), progress=False)
    question, target = pair.mask("question"), pair.mask("target")
    for layer in range(3):
        pattern = cache["pattern", layer].double()
        mass = [pattern[b][:, question[b]][:, :, target[b]].sum(-1).mean(-1) for b in range(2)]
        torch.testing.assert_close(ram.values[layer].double(), torch.stack(mass).mean(0), atol=1e-5, rtol=1e-4)
    assert (ram.values - dense.values).abs().max() > 0.01
    assert ram.provenance["attention"] == "hybrid(4 heads dense, sink=2, window=5; sdpa)"
    assert ktr.provenance["attention_settings"]["dense"] == ["L1H2", "L2H0", "L2H1", "L2H3"]


@torch.no_grad()
def test_a_sweep_is_a_loop_of_forward_passes(family):
    model, pair = hooked(family), padded(family)
    heads = [HeadAblation([(layer, head)], mode="zero", phase="prefill") for layer in range(3) for head in range(4)]
    variants = [*heads, AttentionKnockout(["L1H2"], queries="last", keys="target", phase="prefill")]
    with model.attention(hybrid()):
        sweep = Sweep(model, pair, LogitDifference(5, wrong=9), batch_size=5)
        got, expected = sweep.run(variants), []
        for variant in variants:
            with model.intervene(variant):
                logits = model(pair)[pair.mask("last")]
            expected.append((logits[:, 5] - logits[:, 9]).double())
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-4, rtol=1e-4)
    plain_sweep = Sweep(model, pair, LogitDifference(5, wrong=9))
    assert (sweep.clean - plain_sweep.clean).abs().max() > 0.01


def test_a_sweep_under_a_policy_and_gates_under_a_backend_are_rejected():
    model = hooked("internvl")
    with (
        model.attention(hybrid(Policy())),
        pytest.raises(HookValueError, match="policy selects dense heads for all"),
    ):
        Sweep(model, sample("internvl"), LogitDifference(5, wrong=9))
    with model.attention(hybrid()), pytest.raises(HookValueError, match=r"leave model.attention\(...\) first"):
        metrics.DuoGate(steps=2).run(model, sample("internvl"), progress=False)


@torch.no_grad()
def test_samples_with_a_shared_beginning_are_run_whole(family):
    model, one = hooked(family), sample(family)
    shared = SharedPrefix.collate([one, metrics.NullQuery("Where is the dog?").sample(model, one)])
    ram = metrics.RetrievalAttentionMass
    reused = model.measure(shared, ram(), progress=False)
    with model.attention(hybrid()):
        together = model.measure(shared, ram(), progress=False)
        alone = model.measure(list(shared.samples), ram(), progress=False)
    assert reused.provenance["shared_prefix"] != together.provenance["shared_prefix"]
    torch.testing.assert_close(together.values, alone.values, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_policy_is_called_once_a_layer_of_a_prompt(family):
    inputs, model, policy = model_inputs(family, 1, 2), wrapped(family), Policy()
    with model.attention(hybrid()):
        expected = model.generate(inputs, max_new_tokens=3, do_sample=False)
        logits = model(inputs)
    with model.attention(hybrid(policy)):
        got = model.generate(inputs, max_new_tokens=3, do_sample=False)
        assert torch.equal(got, expected) and policy.calls == [0, 1, 2]
        hooks = [("*hook_pattern", lambda x, hook: x), ("*hook_rot_q", lambda x, hook: None)]
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=hooks), logits) and policy.calls == [0, 1, 2] * 2
        assert model.info.attention_settings["dense"] == {"policy": "fixed"}


@torch.no_grad()
def test_a_trace_of_nnsight_sees_it():
    model = HookedMLLM.from_model(fresh("internvl"), check=False)  # nnsight leaves a mark on every module
    inputs = model_inputs("internvl", 1, 2)
    with model.attention(hybrid()):
        logits, cache = model.run_with_cache(inputs, names_filter=["*hook_z", "*hook_pattern"])
        with model.nnsight.trace(inputs, hooks="blocks.1.attn.hook_pattern"):
            pattern = model.nnsight["blocks.1.attn.hook_pattern"].save()
            z = model.nnsight["blocks.1.attn.hook_z"].save()
            got = model.nnsight["hook_logits"].save()
    assert torch.equal(z, cache["z", 1]) and torch.equal(got, logits)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(pattern.transpose(1, 2)[real], cache["pattern", 1].transpose(1, 2)[real])


# -- choosing it -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_name_inside_of_it_is_the_plain_model_for_as_long(family):
    inputs, model = model_inputs(family), wrapped(family)
    own = plain(family)(**inputs).logits
    with model.attention(hybrid()):
        inner = model(inputs)
        with model.attention("sdpa"):
            assert torch.equal(model(inputs), own) and model.info.attention == "sdpa"
            with model.attention(hybrid([])):
                assert not torch.equal(model(inputs), inner)
            assert torch.equal(model(inputs), own)
        assert torch.equal(model(inputs), inner)
        with pytest.raises(HookValueError, match="no attention implementation"), model.attention("spda"):
            pytest.fail("entered")
        assert torch.equal(model(inputs), inner)
    assert torch.equal(model(inputs), own) and model.info.attention_settings is None


@torch.no_grad()
def test_it_is_given_when_a_model_is_loaded():
    heads = HeadSet(["L2H4"], n_layers=6, n_heads=8)
    attention = HybridAttention(heads, sink=4, window=16, implementation="naive")
    model = HookedMLLM.from_pretrained("toy-qwen3-vl", attention={"text": attention, "vision": "eager"})
    one = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
    assert model.info.attention.startswith("hybrid(1 heads dense")
    assert model.wiring.switches["vision"].base == "eager"
    other = HookedMLLM.from_pretrained("toy-qwen3-vl", attention=attention)
    with model.attention("sdpa", tower="vision"):
        assert torch.equal(model(one), other(one))
    model.check()  # patterns and z agree under it
    with pytest.raises(InputError, match="for 'text', 'vision' or both"):
        HookedMLLM.from_pretrained("toy-qwen3-vl", attention={"ear": attention})
    with pytest.raises(UnsupportedModelError, match="a vision tower is not"):
        HookedMLLM.from_pretrained("toy-qwen3-vl", attention={"vision": attention}, check=False)
    with (
        pytest.raises(HeadError, match=r"of 6 x 8 \(layers x heads\); this model has 3 x 4"),
        wrapped("internvl").attention(attention),
    ):
        pytest.fail("entered")


def test_heads_of_another_model_and_other_towers_are_rejected_when_they_are_set(family):
    model = wrapped(family)
    for wrong, error, message in (
        (hybrid(["L3H0"]), HeadError, "Layer 3 of head L3H0 is not there"),
        (hybrid([(0, 4)]), HeadError, "Head 4 of L0H4 is not there"),
        (
            hybrid(HeadSet([], n_layers=3, n_heads=2)),
            HeadError,
            r"of 3 x 2 \(layers x heads\); this model has 3 x 4.*to_query",
        ),
        (HybridAttention, HookValueError, "Expected a name or a callable"),
    ):
        with pytest.raises(error, match=message), model.attention(wrong):
            pytest.fail("entered")
        assert model.info.attention == "sdpa"
    with pytest.raises(UnsupportedModelError, match="leave the tower on attention='sdpa'"):
        with model.attention(hybrid(), tower="vision"):
            pytest.fail("entered")


@torch.no_grad()
def test_a_part_of_the_heads_is_rejected(family):
    hf_model = fresh(family)
    keep_half_of_the_heads(hf_model.get_decoder().layers)
    model = HookedMLLM.from_model(hf_model, tiny_processor(family), check=False)
    with model.attention(hybrid()), pytest.raises(HeadError, match=r"has 2 heads, the model 4.*device_map"):
        model(model_inputs(family))


def test_what_is_no_hybrid_attention():
    for sink, window in ((-1, 5), (2, 0), (True, 5), (2, True)):
        with pytest.raises(InputError, match="sink >= 0 and window >= 1"):
            HybridAttention([], sink=sink, window=window)
    with pytest.raises(HookValueError, match="implementation is one of"):
        HybridAttention([], implementation="fast")
    for heads in ([[0, 1]], [3], 3, ["H3"], [(0, -1)], None, {"2": [4]}, {2: "45"}, {2: [True]}):
        with pytest.raises(HeadError):
            HybridAttention(heads)
    with pytest.raises(HeadError, match=r"a mapping of layers to query heads such as \{2: \[4, 5\]\}.*got \('2', 4\)"):
        HybridAttention(json.loads('{"2": [4]}'))
    assert HybridAttention({2: 4}).describe()["dense"] == ["L2H4"]


@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])  # Qwen3-VL makes its positions of a mask of 2 axes
@torch.no_grad()
def test_masks_that_are_not_causal_with_padding_are_rejected(family):
    inputs, model = model_inputs(family), wrapped(family)
    n = inputs["input_ids"].shape[1]
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    mask[:, 3] = False
    mask[3, 3] = True
    with model.attention(hybrid()), pytest.raises(UnsupportedModelError, match="Use attention='sdpa' there"):
        model({**inputs, "attention_mask": mask[None, None]})


@torch.no_grad()
def test_a_layer_with_a_window_of_its_own_keeps_it():
    config = tiny_config("internvl", vision_layers=2)
    config.text_config.update(
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]}
    )
    torch.manual_seed(0)
    model = HookedMLLM.from_model(
        InternVLForConditionalGeneration(config).eval(), tiny_processor("internvl"), check=False
    )
    inputs = model_inputs("internvl", 1, 2)
    _, own = model.run_with_cache(inputs, names_filter="*hook_pattern")
    with model.attention(hybrid([(0, h) for h in range(4)] + [(1, h) for h in range(4)])):
        got, cache = model.run_with_cache(inputs, names_filter="*hook_pattern")
        assert torch.equal(got, model(inputs))
    for layer in range(3):
        assert torch.equal(cache["pattern", layer], own["pattern", layer])
    assert torch.equal(got, model.hf_model(**inputs).logits)


@torch.no_grad()
def test_called_by_itself_it_is_the_attention_of_one_layer():
    q, k, v = (torch.randn(2, h, 40, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    mask = MaskRows.causal_rows(2, 40, "cpu")
    expected = hybrid_attention(q, k, v, DENSE[1], sink=SINK, window=WINDOW, implementation="naive").transpose(1, 2)
    assert torch.equal(hybrid()(q, k, v, mask, 8**-0.5, 1), expected)
    last = MaskRows(2, 1, 40, "cpu")
    scores = (q[:, :, -1:] @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5).softmax(-1)
    got = hybrid()(q[:, :, -1:], k, v, last, 8**-0.5, 1)
    torch.testing.assert_close(got, (scores @ v.repeat_interleave(2, 1)).transpose(1, 2))


@torch.no_grad()
def test_two_models_of_one_configuration_do_not_disturb_each_other():
    inputs, config = model_inputs("internvl", 1, 2), tiny_config("internvl", vision_layers=2)
    one, two = (HookedMLLM.from_model(InternVLForConditionalGeneration(config).eval(), check=False) for _ in "12")
    own = two(inputs)
    with one.attention(hybrid()):
        assert torch.equal(two(inputs), own)
        two.run_with_hooks(inputs, fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: None)])
        with two.attention("eager"):
            assert (two(inputs) - own)[inputs["attention_mask"].bool()].abs().max() < 1e-3
    assert torch.equal(two(inputs), own)


@pytest.mark.parametrize("dense", ["L2H5, L2H4", [(2, 4), "L2H5"], {2: [5, 4]}, "mask", "set", "lists"], ids=str)
def test_dense_heads_are_specified_in_any_way(dense):
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[2, 4:6] = True
    heads = {"mask": mask, "set": HeadSet.from_mask(mask), "lists": mask.tolist()}
    attention = HybridAttention(heads[dense] if str(dense) in heads else dense)
    attention.validate(6, 8, causal=True)
    assert attention.describe()["dense"] == ["L2H4", "L2H5"] and str(attention).startswith("hybrid(2 heads dense")
    assert attention.policy.by_layer == {2: (4, 5)} and not attention.adaptive


def test_a_policy_of_fixed_heads_is_not_adaptive():
    static = StaticHeads(HeadSet(["L2H4"], n_layers=6, n_heads=8))
    attention = HybridAttention(static, sink=np.int64(4), window=np.int32(16))
    assert not attention.adaptive and HybridAttention(QueryAwareHeads(PerLayer(1))).adaptive
    assert attention.describe() == {
        "backend": "HybridAttention",
        "dense": {"policy": "StaticHeads", "heads": ["L2H4"]},
        "sink": 4,
        "window": 16,
    }
    assert type(attention.sink) is type(attention.window) is int
    for sink, window in ((4.0, 16), (4, "16"), (None, 16), (np.True_, 16)):
        with pytest.raises(InputError, match="whole numbers sink >= 0 and window >= 1"):
            HybridAttention([], sink=sink, window=window)
        with pytest.raises(InputError, match="whole numbers sink >= 0 and window >= 1"):
            QueryAwareHeads(PerLayer(1), sink=sink if sink is not None else -1, window=window)
