"""Routing policies: estimates against NumPy in float64, budgets, and choices against patterns of the model."""

import json

import numpy as np
import pytest
import torch

from hooked_mllm import HeadScores, HeadSet, HookedMLLM, HybridAttention, routing, toys
from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.routing import PerLayer, QueryAwareHeads, StaticHeads, Total, lost_attention
from hooked_mllm.errors import HeadError, InputError, NumericsError, UnsupportedModelError
from hooked_mllm.inputs.sample import SampleBatch

SINK, WINDOW = 3, 5


def witness(q, k, rows, place, start, scale=0.3, sink=SINK, window=WINDOW, order=1):
    """Lost attention of one sample by loops: `rows` of q [head query d], standing at `place`, keys from `start` on."""
    q, k = (x.double().numpy() for x in (q, k))
    group, out = len(q) // len(k), np.zeros(len(q))
    for head in range(len(q)):
        for i, p in zip(rows, place, strict=True):
            a = np.exp(scale * k[head // group, start : p + 1] @ q[head, i])
            a /= a.sum()
            j = np.arange(start, p + 1)
            far = (j >= start + sink) & (j <= p - window)
            out[head] += (a[far] ** order).sum() ** (1 / order) / len(rows)
    return out


def tensors(heads=4, kv_heads=2, q_length=40, kv_length=40, batch=1, d=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, q_length, d, generator=draw)
    k = torch.randn(batch, kv_heads, kv_length, d, generator=draw)
    return 2 * q, 2 * k, MaskRows(batch, q_length, kv_length, "cpu", causal=True)


def padded(batch, length, spans):
    padding = torch.zeros(batch, length, dtype=torch.bool)
    for row, (start, end) in zip(padding, spans, strict=True):
        row[start:end] = True
    return MaskRows(batch, length, length, "cpu", causal=True, padding=padding)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("m", [1, 7, 64])
def test_lost_attention_is_that_of_loops_in_float64(heads, kv_heads, m, order):
    q, k, mask = tensors(heads, kv_heads, batch=2)
    rows = range(max(0, 40 - m), 40)
    due = [witness(q[b], k[b], rows, rows, 0, order=order) for b in range(2)]
    how = {"sink": SINK, "window": WINDOW, "queries": m, "order": order}
    for piece in (1 << 28, 1):  # all keys at once, one key at a time
        found = lost_attention(q, k, mask, 0.3, **how, max_bytes=piece)
        np.testing.assert_allclose(found, due, rtol=1e-5)
    assert found.dtype == torch.float32
    half = lost_attention(q.bfloat16(), k.bfloat16(), mask, 0.3, **how)
    due = [witness(q[b].bfloat16(), k[b].bfloat16(), rows, rows, 0, order=order) for b in range(2)]
    np.testing.assert_allclose(half, due, rtol=1e-4)


def test_padding_moves_the_sink_and_the_last_tokens():
    q, k, _ = tensors(batch=5)
    spans = [(0, 40), (9, 40), (0, 31), (33, 40), (0, 0)]
    found = lost_attention(q, k, padded(5, 40, spans), 0.3, sink=SINK, window=WINDOW, queries=6)
    for b, (start, end) in enumerate(spans[:4]):
        rows = range(max(start, end - 6), end)
        np.testing.assert_allclose(found[b], witness(q[b], k[b], rows, rows, start), rtol=1e-5)
    assert found[3].max() == 0 == found[4].max()  # 7 tokens, all in sink or window; and no token at all


def test_a_chunk_of_a_prompt_sees_the_cache_before_it():
    q, k, mask = tensors(q_length=10, kv_length=40)
    found = lost_attention(q, k, mask, 0.3, sink=SINK, window=WINDOW, queries=4)
    np.testing.assert_allclose(found[0], witness(q[0], k[0], range(6, 10), range(36, 40), 0), rtol=1e-5)


def test_queries_by_mask():
    q, k, _ = tensors(batch=2)
    chosen = torch.zeros(2, 40, dtype=torch.bool)
    chosen[0, [20, 22, 23]] = chosen[1, 30:34] = True
    mask = padded(2, 40, [(0, 40), (12, 40)])
    found = lost_attention(q, k, mask, 0.3, sink=SINK, window=WINDOW, queries=chosen)
    for b, (rows, start) in enumerate([([20, 22, 23], 0), (range(30, 34), 12)]):
        np.testing.assert_allclose(found[b], witness(q[b], k[b], rows, rows, start), rtol=1e-5)
    with pytest.raises(InputError, match="mask of queries is empty"):
        lost_attention(q, k, mask, 0.3, sink=SINK, window=WINDOW, queries=chosen & (torch.arange(40) < 30))
    made = policy(PerLayer(1), queries=chosen)
    with pytest.raises(InputError, match=r"\[2, 40\], the prompt has 1 x 30"):
        made.choose(*tensors(q_length=30, kv_length=30), 0.3, 0)


def test_blocks_bound_the_mass_and_of_one_key_are_exact():
    q, k, mask = tensors()
    how = {"sink": SINK, "window": WINDOW, "queries": 6}
    exact = lost_attention(q, k, mask, 0.3, **how)
    for keys in ("mean", "bound", "sample"):
        torch.testing.assert_close(lost_attention(q, k, mask, 0.3, **how, keys=keys, block=1), exact)
    for block in (2, 5, 64):
        low, high = (lost_attention(q, k, mask, 0.3, **how, keys=keys, block=block) for keys in ("mean", "bound"))
        assert (low < exact).all() and (exact < high).all()


@pytest.mark.parametrize("piece", [1 << 28, 1])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("keys", ["mean", "bound", "sample"])
def test_blocks_are_summed_as_the_formula_says(keys, order, piece):
    q, k, mask = tensors(heads=2, kv_heads=1)
    how = {"queries": 6, "keys": keys, "order": order, "block": 4, "max_bytes": piece}
    found = lost_attention(q, k, mask, 0.3, sink=SINK, window=WINDOW, **how)
    queries, key = q[0].double().numpy(), k[0, 0].double().numpy()
    for head in range(2):
        lost = []
        for p in range(34, 40):
            x = queries[head, p]
            tail = max(SINK, 34 - WINDOW + 1)  # some of the six have these keys in their window
            blocks = [key[low : min(low + 4, tail)] for low in range(SINK, tail, 4)]
            if keys == "mean":
                scores = [b.mean(0) @ x for b in blocks]
            elif keys == "sample":
                scores = [b[(len(b) - 1) // 2] @ x for b in blocks]
            else:
                scores = [np.maximum(b.max(0) * x, b.min(0) * x).sum() for b in blocks]
            e, n = np.exp(0.3 * np.array(scores)), np.array([len(b) for b in blocks])
            single = np.exp(0.3 * key[: p + 1] @ x)
            far, near = single[tail : p - WINDOW + 1], np.r_[single[:SINK], single[tail:]]
            total = (n * e).sum() + near.sum()
            lost.append(((n * e**order).sum() + (far**order).sum()) ** (1 / order) / total)
        np.testing.assert_allclose(found[0, head], min(1, np.mean(lost)), rtol=1e-5)


def test_a_mean_of_64_keys_hides_one_that_stands_out():
    q, k = torch.ones(1, 1, 200, 8), torch.zeros(1, 1, 200, 8)
    k[0, 0, 70] = 1.0  # its score is 16 above the others'
    found = {
        keys: float(lost_attention(q, k, MaskRows.causal_rows(1, 200, "cpu"), 2.0, sink=4, window=16, keys=keys))
        for keys in ("exact", "mean", "bound")
    }
    assert found["exact"] > 0.99 and found["bound"] > 0.99 and found["mean"] < 0.9


def test_extreme_scores_stay_finite():
    q, k, mask = tensors()
    for keys in ("exact", "mean", "bound", "sample"):
        found = lost_attention(100 * q, 100 * k, mask, 1.0, sink=SINK, window=WINDOW, keys=keys, block=4)
        assert found.isfinite().all() and (found >= 0).all() and (found <= 1).all()


def test_budgets():
    assert [PerLayer(3).room(layer, {0: 3, 1: 3}, 6) for layer in range(2, 6)] == [3] * 4
    taken = {}
    for layer in range(6):  # 7 heads over 6 layers, all taken: never more than an even share so far
        taken[layer] = Total(7).room(layer, taken, 6)
    assert list(taken.values()) == [1, 1, 2, 1, 1, 1]
    assert Total(6).room(3, {0: 0, 1: 0, 2: 1}, 6) == 3  # what was left before
    assert Total(6).room(3, {0: 1, 4: 5}, 6) == 3  # later layers are those of another prompt
    assert Total(5, like="first").room(0, {}, 6) == 5 and Total(5, like="first").room(2, {0: 3, 1: 2}, 6) == 0
    core = HeadSet([(1, 0), (1, 1), (4, 7)], n_layers=6, n_heads=8)
    rooms, taken = [], {}
    for layer in range(6):
        taken[layer] = Total(3, like=core).room(layer, taken, 6)
        rooms.append(taken[layer])
    assert rooms == [0, 2, 0, 0, 1, 0]
    for wrong in (lambda: PerLayer(-1), lambda: Total(True), lambda: Total(2, like="last")):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(InputError, match="empty set"):
        Total(2, like=core[:0])
    for budget in (PerLayer(9), Total(49), Total(3, like=HeadSet(["L0H0"], n_layers=2, n_heads=8))):
        with pytest.raises(HeadError):
            QueryAwareHeads(budget).validate(6, 8)


def policy(budget, layers=3, **settings):
    made = QueryAwareHeads(budget, **{"sink": SINK, "window": WINDOW, "queries": 6, **settings})
    made.validate(layers, 4)
    return made


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


def test_a_budget_is_kept_over_layers_and_begins_anew_with_each_prompt():
    q, k, mask = tensors()
    made = policy(Total(4, like="first"))
    for _ in range(2):
        assert [len(made.choose(q, k, mask, 0.3, layer)) for layer in range(3)] == [4, 0, 0]
    assert made.chosen == {0: (0, 1, 2, 3)}
    made = policy(Total(3))
    for layer in (0, 1, 1, 2, 2):  # asked twice, a layer is counted once
        assert len(made.choose(q, k, mask, 0.3, layer)) == 1


def test_where_nothing_is_lost_nothing_is_chosen():
    q, k, mask = tensors(q_length=8, kv_length=8)
    made = policy(PerLayer(4))
    assert made.choose(q, k, mask, 0.3, 0) == () and made.record[0].lost == (0.0,) * 4
    longer = tensors(q_length=9, kv_length=9)
    assert made.choose(*longer, 0.3, 0) == (0, 1, 2, 3)


def test_bad_settings_are_refused_at_the_door():
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
    with pytest.raises(HeadError, match=r"scores\.top"):
        StaticHeads(["L0H0"])
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


class Told:
    """A policy that answers what it was told."""

    def __init__(self, answer):
        self.answer = answer

    def choose(self, q, k, mask, scale, layer):
        return self.answer

    def validate(self, n_layers, n_heads):
        assert n_heads == 8

    def describe(self):
        return {"policy": "Told"}


@pytest.mark.parametrize(
    "answer", [torch.tensor([False] * 4 + [True] * 4), [True, False], [1.0], None, 3, ["L0H1"], [8], [-1]], ids=str
)
def test_what_a_policy_answers_is_checked(toy, answer):
    model, samples = toy
    with model.attention(HybridAttention(Told(answer), **HYBRID)):
        with pytest.raises(HeadError, match=r"Told\.choose in layer 0: .*(from 0 to 7.*mask\.nonzero|out of range)"):
            model(samples[0])
        assert model.info.attention == "hybrid(Told dense, sink=4, window=16; sdpa)"  # the same in every process


@pytest.mark.parametrize("answer", [[5, 2, 5], (2, 5), {2, 5}, np.array([2, 5]), torch.tensor([5, 2])], ids=str)
def test_numbers_of_any_kind_are_taken(toy, answer):
    model, samples = toy
    with model.attention(HybridAttention(Told(answer), **HYBRID)):
        got = model(samples[0])
    with model.attention(HybridAttention({layer: [2, 5] for layer in range(6)}, **HYBRID)):
        assert torch.equal(model(samples[0]), got)


def test_policies_are_told_as_json(toy):
    core = HeadSet(["L0H3"], n_layers=6, n_heads=8)
    told = StaticHeads(core).describe()
    assert json.loads(json.dumps(told)) == told == {"policy": "StaticHeads", "heads": ["L0H3"]}
    made = QueryAwareHeads(Total(1, like=core), prior=HeadScores(torch.ones(6, 8), name="ones"), keys="bound")
    HybridAttention(made, sink=2, window=9)
    told = json.loads(json.dumps(made.describe()))
    assert told["budget"] == {"budget": "Total", "heads": 1, "like": ["L0H3"]}
    assert (told["sink"], told["window"], told["prior"]["name"], told["block"]) == (2, 9, "ones", 64)
    assert "ones" in repr(made) and routing.lost_attention is lost_attention
