"""Heads chosen from the prompt, against estimates and patterns of the model."""

import json

import numpy as np
import pytest
import torch

from helpers.routing_witness import SINK, WINDOW, policy, tensors, witness
from hooked_mllm import HeadScores, HeadSet, HookedMLLM, HybridAttention, routing, toys
from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.routing import PerLayer, QueryAwareHeads, StaticHeads, Total, lost_attention
from hooked_mllm.errors import HeadError, InputError, NumericsError, UnsupportedModelError
from hooked_mllm.inputs.sample import SampleBatch


def test_the_heads_that_lose_most_are_chosen_and_ties_go_to_the_lower():
    q, k, mask = tensors(batch=2)
    lost = lost_attention(q, k, mask, 0.3, sink=SINK, window=WINDOW, queries=6).double().mean(0)
    made = policy(PerLayer(2))
    assert made.choose(q, k, mask, 0.3, 0) == tuple(sorted(lost.topk(2).indices.tolist()))
    np.testing.assert_allclose(made.record[0].lost, lost)
    same, key = q[:, :1].expand(-1, 4, -1, -1), k[:, :1].expand(-1, 2, -1, -1)
    assert made.choose(same, key, mask, 0.3, 1) == (0, 1)
    between = float(lost.sort(descending=True).values[:2].mean())
    assert policy(PerLayer(4), threshold=between).choose(q, k, mask, 0.3, 0) == (int(lost.argmax()),)
    values = torch.zeros(3, 4)
    values[1, 3], values[1, 0] = 1.0, 0.5
    prior = HeadScores(values)
    made = policy(PerLayer(4), prior=prior)
    assert [made.choose(q, k, mask, 0.3, layer) for layer in range(3)] == [(), (0, 3), ()]  # 0 is never above 0
    np.testing.assert_allclose(made.record[1].scores, lost * prior.values[1])


def test_a_budget_is_kept_over_layers_and_starts_again_with_each_prompt():
    q, k, mask = tensors()
    made = policy(Total(4, like="first"))
    for _ in range(2):
        assert [len(made.choose(q, k, mask, 0.3, layer)) for layer in range(3)] == [4, 0, 0]
    assert made.chosen == {0: (0, 1, 2, 3)}
    made = policy(Total(3))
    for layer in (0, 1, 1, 2, 2):  # called twice, a layer is counted once
        assert len(made.choose(q, k, mask, 0.3, layer)) == 1


def test_where_nothing_is_lost_nothing_is_chosen():
    q, k, mask = tensors(q_length=8, kv_length=8)
    made = policy(PerLayer(4))
    assert made.choose(q, k, mask, 0.3, 0) == () and made.record[0].lost == (0.0,) * 4
    longer = tensors(q_length=9, kv_length=9)
    assert made.choose(*longer, 0.3, 0) == (0, 1, 2, 3)


def test_bad_settings_are_rejected_when_they_are_made():
    q, k, mask = tensors()
    negative = HeadScores([[-1.0, 1.0]])
    for settings in (
        {"queries": 0},
        {"queries": True},
        {"order": 3},
        {"keys": "median"},
        {"block": 0},
        {"threshold": -0.1},
        {"threshold": float("nan")},
        {"prior": negative},
        {"prior": HeadScores([[1.0], [1.0]], missing=[0])},
    ):
        with pytest.raises(InputError):
            QueryAwareHeads(PerLayer(1), **settings)
    with pytest.raises(InputError, match=r"PerLayer\(heads\)"):
        QueryAwareHeads(3)
    with pytest.raises(HeadError):
        QueryAwareHeads(PerLayer(1), prior=HeadScores([[1.0, 2.0]])).validate(3, 4)
    with pytest.raises(InputError, match="HybridAttention"):
        QueryAwareHeads(PerLayer(1)).choose(q, k, mask, 0.3, 0)
    with pytest.raises(InputError, match="validate"):
        QueryAwareHeads(PerLayer(1), sink=1, window=2).choose(q, k, mask, 0.3, 0)
    with pytest.raises(HeadError, match="Layer 3"):
        policy(PerLayer(1)).choose(q, k, mask, 0.3, 3)
    with pytest.raises(InputError, match="window=5, the attention has 9"):
        HybridAttention(policy(PerLayer(1)), sink=SINK, window=9)
    with pytest.raises(NumericsError, match="layer 0"):
        policy(PerLayer(1)).choose(q * torch.nan, k, mask, 0.3, 0)
    with pytest.raises(UnsupportedModelError):
        policy(PerLayer(1)).choose(q, k, MaskRows(1, 40, 40, "cpu", causal=True, window=4), 0.3, 0)


@pytest.fixture(scope="module")
def toy():
    model = HookedMLLM.from_pretrained("toy-qwen3-vl-free", dtype="float32", check=False)
    task = [toys.VisualRetrieval(pages=2, seed=5), toys.VideoRetrieval(moments=2, seed=5)]
    return model, [one.samples(model, 1)[0] for one in task]


HYBRID = {"sink": 4, "window": 16, "implementation": "naive"}


def from_qk(cache, layer, scale, rows, start=0, sample=0, order=1):
    q, k = (cache[name, layer][sample].transpose(0, 1) for name in ("rot_q", "rot_k"))
    return witness(q, k, rows, rows, start, scale, 4, 16, order)


@pytest.mark.parametrize("order", [1, 2])
def test_choices_are_those_of_the_models_own_patterns(toy, order):
    model, samples = toy
    for sample in samples:
        made = QueryAwareHeads(PerLayer(2), queries=8, order=order)
        with model.attention(HybridAttention(made, **HYBRID)):
            _, cache = model.run_with_cache(sample)
        _, plain = model.run_with_cache(sample)
        n = plain["pattern", 0].shape[-1]
        i, j = torch.arange(n - 8, n)[:, None], torch.arange(n)
        far = (j >= 4) & (j <= i - 16)
        # layer 0 is the same in both; what enters a deeper one differs, and its streaming heads' patterns are cut
        lost = ((plain["pattern", 0][0, :, -8:] * far) ** order).sum(-1).pow(1 / order).mean(-1)
        np.testing.assert_allclose(made.record[0].lost, lost, rtol=1e-4)
        for layer in range(model.cfg.n_layers):
            due = from_qk(cache, layer, model.cfg.d_head**-0.5, range(n - 8, n), order=order)
            np.testing.assert_allclose(made.record[layer].lost, due, rtol=1e-4)
            assert made.chosen[layer] == tuple(sorted(np.argsort(-due, kind="stable")[:2].tolist()))
            pattern, dense = cache["pattern", layer][0, :, -8:], list(made.chosen[layer])
            found = ((pattern * far) ** order).sum(-1).pow(1 / order).mean(-1)
            np.testing.assert_allclose(found[dense], due[dense], rtol=1e-4)
            assert found[[h for h in range(8) if h not in dense]].max() == 0


def test_a_padded_batch_has_one_set_by_the_mean_of_its_samples(toy):
    model, samples = toy
    made = QueryAwareHeads(PerLayer(3), queries=8)
    with model.attention(HybridAttention(made, **HYBRID)):
        _, cache = model.run_with_cache(SampleBatch.collate(samples))
    length = cache["rot_q", 0].shape[1]
    lengths = [sample.inputs["input_ids"].shape[-1] for sample in samples]
    assert len(set(lengths)) == 2
    for layer in (0, 3):
        due = [
            from_qk(cache, layer, model.cfg.d_head**-0.5, range(length - 8, length), length - n, sample)
            for sample, n in enumerate(lengths)
        ]
        np.testing.assert_allclose(made.record[layer].lost, np.mean(due, 0), rtol=1e-4)


def test_a_forward_pass_is_that_of_the_heads_chosen(toy):
    model, samples = toy
    sample, shape = samples[0], {"n_layers": model.cfg.n_layers, "n_heads": model.cfg.n_heads}
    made = QueryAwareHeads(Total(5), queries=sample.mask("question").view(1, -1), keys="mean", block=8)
    with model.attention(HybridAttention(made, **HYBRID)):
        logits = model(sample)
    chosen = HeadSet([(layer, head) for layer, heads in made.chosen.items() for head in heads], **shape)
    assert len(chosen) == 5
    for dense in (chosen, StaticHeads(chosen)):
        with model.attention(HybridAttention(dense, **HYBRID)):
            assert torch.equal(model(sample), logits)
    with pytest.raises(HeadError, match="6 x 8"):
        with model.attention(HybridAttention(StaticHeads(HeadSet(["L0H0"], n_layers=2, n_heads=8)), **HYBRID)):
            pass


class Answering:
    """A policy that answers what it was description."""

    def __init__(self, answer):
        self.answer = answer

    def choose(self, q, k, mask, scale, layer):
        return self.answer

    def validate(self, n_layers, n_heads):
        assert n_heads == 8

    def describe(self):
        return {"policy": "Answering"}


@pytest.mark.parametrize(
    "answer", [torch.tensor([False] * 4 + [True] * 4), [True, False], [1.0], None, 3, ["L0H1"], [8], [-1]], ids=str
)
def test_what_a_policy_answers_is_checked(toy, answer):
    model, samples = toy
    with model.attention(HybridAttention(Answering(answer), **HYBRID)):
        with pytest.raises(
            HeadError, match=r"Answering\.choose in layer 0: .*(from 0 to 7.*mask\.nonzero|out of range)"
        ):
            model(samples[0])
        assert model.info.attention == "hybrid(Answering dense, sink=4, window=16; sdpa)"  # the same in every process


@pytest.mark.parametrize("answer", [[5, 2, 5], (2, 5), {2, 5}, np.array([2, 5]), torch.tensor([5, 2])], ids=str)
def test_numbers_of_any_kind_are_accepted(toy, answer):
    model, samples = toy
    with model.attention(HybridAttention(Answering(answer), **HYBRID)):
        got = model(samples[0])
    with model.attention(HybridAttention({layer: [2, 5] for layer in range(6)}, **HYBRID)):
        assert torch.equal(model(samples[0]), got)


def test_policies_are_described_as_json(toy):
    core = HeadSet(["L0H3"], n_layers=6, n_heads=8)
    description = StaticHeads(core).describe()
    assert json.loads(json.dumps(description)) == description == {"policy": "StaticHeads", "heads": ["L0H3"]}
    made = QueryAwareHeads(Total(1, like=core), prior=HeadScores(torch.ones(6, 8), name="ones"), keys="bound")
    HybridAttention(made, sink=2, window=9)
    description = json.loads(json.dumps(made.describe()))
    assert description["budget"] == {"budget": "Total", "heads": 1, "like": ["L0H3"]}
    assert (description["sink"], description["window"], description["prior"]["name"], description["block"]) == (
        2,
        9,
        "ones",
        64,
    )
    assert "ones" in repr(made) and routing.lost_attention is lost_attention
