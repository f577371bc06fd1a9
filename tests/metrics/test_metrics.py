"""The metrics against their formulas in NumPy, and against themselves: batches, views, shards, dtypes, resuming."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from helpers.attention_reference import Layers, random_layers
from hooked_mllm.contracts import Metric, ModelInfo
from hooked_mllm.errors import HeadError, InputError, LayoutError, NumericsError
from hooked_mllm.heads import HeadScores
from hooked_mllm.metrics import AttentionScore, HeadMetric, KeyTokenRatio, RetrievalAttentionMass, VisionMass

LENGTHS = (23, 17, 20, 23)


class SinkMass(HeadMetric):
    """A user's metric: what the question pays to the first token of the sequence."""

    def score(self, view):
        return view.profile("question")[..., 0]


def mass(layers: Layers, queries: str, keys: str) -> np.ndarray:
    """[layer batch head], eq. 1 as it is written: mean over i in Q of the sum over j in K of A[i, j]."""
    out = np.zeros(layers.attention.shape[:3])
    for l, b, h in np.ndindex(*out.shape):
        rows = np.flatnonzero(layers.masks[queries][b])
        columns = np.flatnonzero(layers.masks[keys][b])
        out[l, b, h] = sum(layers.attention[l, b, h, i, j] for i in rows for j in columns) / len(rows)
    return out


def key_sets(layers: Layers, share: float, queries: str = "question") -> list[np.ndarray]:
    """Per sample [layer head key]: S of eq. 22, over the sample's own N positions, ties to the lower index."""
    out = []
    for b, padding in enumerate(layers.masks["padding"].numpy()):
        real = np.flatnonzero(~padding)
        profile = layers.profile(queries)[:, b]
        chosen = np.zeros(profile.shape, dtype=bool)
        for l, h in np.ndindex(*profile.shape[:2]):
            order = real[np.argsort(-profile[l, h, real].round(12), kind="stable")]
            chosen[l, h, order[: math.ceil(round(share * len(real), 9))]] = True
        out.append(chosen)
    return out


def key_token_ratio(layers: Layers, share: float) -> np.ndarray:
    """[layer batch head], eq. 23."""
    targets = layers.masks["target"].numpy()
    return np.stack([s[..., t].mean(-1) for s, t in zip(key_sets(layers, share), targets, strict=True)], axis=1)


def argmax_inside(layers: Layers) -> np.ndarray:
    """[layer batch head]: the share of the last query's rows whose largest key is a target."""
    out = np.zeros(layers.attention.shape[:3])
    for l, b, h in np.ndindex(*out.shape):
        rows = layers.attention[l, b, h][layers.masks["question"][b].numpy()]
        out[l, b, h] = np.mean([bool(layers.masks["target"][b, row.argmax()]) for row in rows])
    return out


def elected(layers: Layers, n: int) -> np.ndarray:
    """[layer batch head]: 1 for the n heads with the highest mass of each sample."""
    scores = mass(layers, "question", "target")
    out = np.zeros(scores.shape)
    for b in range(scores.shape[1]):
        flat = scores[:, b].ravel()
        best = np.argsort(-flat, kind="stable")[:n]
        votes = np.zeros_like(flat)
        votes[best] = 1
        out[:, b] = votes.reshape(out[:, b].shape)
    return out


METRICS: dict[str, tuple[Callable[[], HeadMetric], Callable[[Layers], np.ndarray]]] = {
    "ram": (RetrievalAttentionMass, lambda x: mass(x, "question", "target")),
    "ram-last": (lambda: RetrievalAttentionMass(queries="last"), lambda x: mass(x, "last", "target")),
    "vision": (VisionMass, lambda x: mass(x, "question", "visual")),
    "ktr": (KeyTokenRatio, lambda x: key_token_ratio(x, 0.05)),
    "ktr-share": (lambda: KeyTokenRatio(share=0.2), lambda x: key_token_ratio(x, 0.2)),
    "topk": (lambda: AttentionScore(reduce="topk", share=0.3), lambda x: key_token_ratio(x, 0.3)),
    "answer-sum": (lambda: AttentionScore(queries="answer"), lambda x: mass(x, "answer", "target")),
    "argmax": (lambda: AttentionScore(reduce="argmax"), argmax_inside),
    "frequency": (lambda: AttentionScore(over_samples="frequency", select=3), lambda x: elected(x, 3)),
    "frequency-share": (lambda: AttentionScore(over_samples="frequency", select=0.2), lambda x: elected(x, 3)),
    "user": (SinkMass, lambda x: np.stack([x.profile("question")[:, b, :, s] for b, s in enumerate(starts(x))], 1)),
}


def starts(layers: Layers) -> list[int]:
    return [0] * len(layers.masks["padding"])  # SinkMass reads position 0 of the batch


each_metric = pytest.mark.parametrize(("make", "reference"), METRICS.values(), ids=METRICS.keys())


def per_sample(metric: HeadMetric, layers: Layers, group: int | None = None) -> HeadMetric:
    """Feed one sample at a time, in views of `group` layers."""
    group = group or layers.n_layers
    for b in range(len(layers.masks["padding"])):
        for start in range(0, layers.n_layers, group):
            metric.update(view=layers.view(range(start, min(start + group, layers.n_layers)), slice(b, b + 1)))
    return metric


@each_metric
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mean_over_samples_is_the_formula(make, reference, side):
    layers = random_layers(lengths=LENGTHS, padding_side=side, window=9)
    metric = make()
    metric.update(view=layers.view())
    scores = metric.compute()
    assert isinstance(scores, HeadScores) and scores.shape == (3, 4)
    np.testing.assert_allclose(scores.values.numpy(), reference(layers).mean(1), atol=3e-6)
    assert scores.counts.eq(4).all()
    if make is not SinkMass:  # whose first position is padding here
        assert 0 < scores.values.max() <= 1


@each_metric
def test_samples_one_by_one_views_of_few_layers_and_one_batch_agree(make, reference):
    layers = random_layers(lengths=LENGTHS, n_layers=5)
    whole = make()
    whole.update(view=layers.view())
    want = whole.compute()
    for group in (1, 2, 5):
        got = per_sample(make(), layers, group).compute()
        np.testing.assert_allclose(got.values, want.values, atol=1e-7)
        assert torch.equal(got.counts, want.counts)


@each_metric
def test_merged_shards_equal_one_run(make, reference):
    layers = random_layers(lengths=LENGTHS)
    whole = per_sample(make(), layers)
    shards = [make(), make(), make()]
    shards[0].update(view=layers.view(samples=slice(0, 3)))
    shards[1].update(view=layers.view(samples=slice(3, 4)))
    merged = make()
    for shard in shards[:2]:
        merged.merge_state(shard)
    merged.merge_state(shards[0].metric_state)
    shards[0].merge_state(shards[1])
    np.testing.assert_allclose(shards[0].compute().values, whole.compute().values, atol=1e-7)
    assert merged.compute().counts.eq(7).all()
    assert merged.total.dtype == torch.float64 and merged.count.dtype == torch.int64


@each_metric
def test_a_saved_state_goes_on_where_it_stopped(make, reference):
    layers = random_layers(lengths=LENGTHS)
    whole = per_sample(make(), layers)
    first = make()
    first.update(view=layers.view(samples=slice(0, 2)))
    first.update(view=layers.view(range(2), samples=slice(2, 3)))  # stopped in the middle of the third
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = make()
    second.load_state_dict(state)
    assert second.compute().counts.eq(2).all()
    second.update(view=layers.view(samples=slice(2, 4)))
    np.testing.assert_allclose(second.compute().values, whole.compute().values, atol=1e-7)
    first.setup(ModelInfo(n_layers=3, n_heads=4, n_kv_heads=2))  # or in the same object: setup drops the half sample
    first.update(view=layers.view(samples=slice(2, 4)))
    np.testing.assert_allclose(first.compute().values, whole.compute().values, atol=1e-7)


@each_metric
def test_casts_leave_the_sums_alone(make, reference):
    layers = random_layers(lengths=LENGTHS)
    metric = make()
    metric.update(view=layers.view(samples=slice(0, 2)))
    for cast in (metric.half, lambda: metric.to(torch.float16), lambda: metric.set_dtype(torch.float16), metric.float):
        cast()
    metric.update(view=layers.view(samples=slice(2, 4)))
    plain = make()
    plain.update(view=layers.view(samples=slice(0, 2)))
    plain.update(view=layers.view(samples=slice(2, 4)))
    assert metric.total.dtype == torch.float64 and metric.count.dtype == torch.int64
    assert torch.equal(metric.compute().values, plain.compute().values)


@each_metric
def test_reset_copy_and_protocol(make, reference):
    layers = random_layers()
    metric = make()
    assert isinstance(metric, Metric)
    metric.update(view=layers.view())
    twin = copy.deepcopy(metric)
    assert twin.compute() == metric.compute()
    metric.reset()
    with pytest.raises(InputError, match="seen no sample"):
        metric.compute()
    metric.update(view=layers.view())
    assert twin.compute() == metric.compute()


def test_many_samples_keep_float64_precision():
    layers = random_layers()
    metric = RetrievalAttentionMass()
    view = layers.view()
    for _ in range(300):
        metric.update(view=view)
    assert torch.allclose(metric.compute().values, view.mass("question", "target")[:, 0], rtol=1e-13, atol=0)


def test_hit_rate_is_the_share_of_samples_that_reach_the_ratio():
    layers = random_layers(lengths=LENGTHS, sharpness=3.0)
    reached = []
    for hit in (0.3, 0.5, 1.0):
        metric = per_sample(KeyTokenRatio(share=0.2, hit=hit), layers)
        want = (key_token_ratio(layers, 0.2) >= hit).mean(1)
        rate = metric.hit_rate()
        assert np.array_equal(rate.values.numpy(), want)
        assert rate.name == "KeyTokenRatio.hit_rate"
        reached.append(want.sum())
    assert reached[0] > reached[1] > 0


def test_an_early_target_token_of_eq_23():
    # 20 positions, ceil(0.05 * 20) = 1: the one key with the largest mean attention
    n = 20
    q, k = torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n, 2)
    q[..., 0], k[0, 0, 4, 0] = 1.0, 5.0
    layers = random_layers(lengths=(n,), n_layers=1, heads=1, kv_heads=1)
    layers.q, layers.k = [q], [k]
    metric = KeyTokenRatio()
    metric.update(view=layers.view())
    assert metric.compute()[0, 0] == 1 / 3  # target 4, 5, 6


@pytest.mark.parametrize("metric", [RetrievalAttentionMass, VisionMass], ids=lambda m: m.__name__)
def test_the_chance_level_stands_beside_a_mass(metric):
    layers = random_layers(lengths=LENGTHS, window=9)
    flat = random_layers(lengths=LENGTHS, window=9, sharpness=0.0)  # q = 0: a head that attends evenly
    scores, even = per_sample(metric(), layers, 2).compute(), per_sample(metric(), flat, 2).compute()
    chance = scores.provenance["chance"]
    np.testing.assert_allclose(even.values, np.repeat(np.array(chance)[:, None], 4, axis=1), atol=1e-6)
    assert "chance" not in per_sample(KeyTokenRatio(), layers).compute().provenance


def test_provenance_names_metric_settings_and_model():
    layers = random_layers()
    metric = RetrievalAttentionMass(queries="last")
    info = ModelInfo(n_layers=3, n_heads=4, n_kv_heads=2, model="toy", dtype="float32", versions={"torch": "2"})
    metric.setup(info)
    metric.update(view=layers.view())
    provenance = metric.compute().provenance
    assert provenance["metric"] == "RetrievalAttentionMass" and provenance["config"] == {"queries": "last"}
    assert (
        provenance["model"] == "toy" and provenance["dtype"] == "float32" and provenance["versions"] == {"torch": "2"}
    )
    assert provenance["n_samples"] == 1 and "revision" not in provenance


def test_layers_that_were_not_measured_are_missing():
    layers = random_layers(n_layers=4)
    metric = VisionMass()
    metric.update(view=layers.view(range(2, 4)))
    scores = metric.compute()
    assert scores.missing == (0, 1) and scores.provenance["chance"][:2] == [None, None]
    np.testing.assert_allclose(scores.values[2:], mass(layers, "question", "visual").mean(1)[2:], atol=3e-6)


def test_repr_shows_the_settings():
    assert repr(RetrievalAttentionMass()) == "RetrievalAttentionMass(queries='question')"
    assert repr(KeyTokenRatio(share=0.1)) == "KeyTokenRatio(share=0.1, hit=0.5, queries='question')"
    assert repr(SinkMass()) == "SinkMass()"


def test_a_users_metric_with_settings_of_its_own():
    class Band(HeadMetric):
        def __init__(self, first: int = 0, width: int = 2):
            super().__init__()
            self.first, self.width = first, width

        def score(self, view):
            return view.profile("question")[..., self.first : self.first + self.width].sum(-1)

    layers = random_layers()
    metric = Band(width=5)
    metric.update(view=layers.view())
    np.testing.assert_allclose(metric.compute().values, layers.profile("question")[:, 0, :, :5].sum(-1), atol=3e-6)
    assert repr(metric) == "Band(first=0, width=5)"
    with pytest.raises(ValueError, match="same settings"):
        metric.merge_state(Band(width=4))
    with pytest.raises(ValueError, match="one class"):
        metric.merge_state(SinkMass())


@pytest.mark.parametrize("use", ["setup", "update", "keep_samples"])
@pytest.mark.parametrize("parent", [HeadMetric, VisionMass])
def test_a_constructor_that_skips_its_parents_is_named(parent, use):
    class Weighted(parent):
        def __init__(self, weight: float = 2.0):
            self.weight = weight

        def score(self, view):
            return view.mass("question", "visual") * self.weight

    calls = {
        "setup": lambda metric: metric.setup(ModelInfo(n_layers=4, n_heads=4, n_kv_heads=2)),
        "update": lambda metric: metric.update(view=random_layers().view()),
        "keep_samples": lambda metric: metric.keep_samples(),
    }
    with pytest.raises(InputError, match=r"^Weighted\.__init__ must call super\(\)\.__init__\(\) first"):
        calls[use](Weighted())


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda view: view.profile("question"), "4 axes instead of 3"),
        (lambda view: view.mass("question", "target")[:, 0], "2 axes instead of 3"),
        (lambda view: view.mass("question", "target").transpose(0, 2), "axis 'layer' has 4 instead of 3"),
        (lambda view: view.mass("question", "target")[..., :1], "axis 'head' has 1 instead of 4"),
        (lambda view: view.profile("question").argmax(-1), "floating-point numbers; got torch.int64"),
        (lambda view: 0.5, "must return a tensor"),
    ],
    ids=["per-key", "no-batch", "order", "one-head", "integers", "number"],
)
def test_a_wrong_shape_names_the_axis(score, message):
    broken = type("Broken", (HeadMetric,), {"score": lambda self, view: score(view)})()
    with pytest.raises(InputError, match=message):
        broken.update(view=random_layers(lengths=(23, 20)).view())


def test_a_sample_without_target_is_refused():
    layers = random_layers(lengths=(23, 20))
    layers.masks["target"][1] = False
    for metric in (RetrievalAttentionMass(), KeyTokenRatio(), AttentionScore(reduce="argmax")):
        with pytest.raises(LayoutError, match="'target' mask is empty for sample 1"):
            metric.update(view=layers.view())


@pytest.mark.parametrize("over_samples", ["mean", "frequency"])
def test_nan_never_becomes_a_score(over_samples):
    layers = random_layers()
    layers.k[1][0, 1, 3] = torch.nan
    metric = AttentionScore(over_samples=over_samples)
    metric.update(view=layers.view())
    with pytest.raises(NumericsError, match="2 scores are not finite, first at L1H2, L1H3"):
        metric.compute()


def test_misuse_is_refused():
    layers = random_layers()
    metric = VisionMass()
    with pytest.raises(InputError, match="seen no sample"):
        metric.compute()
    with pytest.raises(TypeError, match="positional"):
        metric.update(layers.view())
    metric.update(view=layers.view(range(2)))
    with pytest.raises(InputError, match="layer 1 came twice"):
        metric.update(view=layers.view(range(1, 3)))
    with pytest.raises(HeadError, match="a metric object of its own"):
        metric.setup(ModelInfo(n_layers=7, n_heads=4, n_kv_heads=2))
    for options, message in (
        ({"reduce": "max"}, "reduce must be one of"),
        ({"over_samples": "median"}, "over_samples must be one of"),
        ({"share": 0.0}, "share must be"),
        ({"select": 0}, "select must be"),
        ({"select": 1.5}, "select must be"),
    ):
        with pytest.raises(InputError, match=message):
            AttentionScore(**options)
    with pytest.raises(InputError, match="hit must be"):
        KeyTokenRatio(hit=0.0)


def test_a_state_of_the_wrong_kind_is_not_loaded():
    layers = random_layers()
    metric = VisionMass()
    metric.update(view=layers.view())
    state = dict(metric.state_dict())
    with pytest.raises(RuntimeError, match=r"must be torch\.float64; got torch\.float16"):
        VisionMass().load_state_dict({**state, "total": state["total"].half()})
    del state["count"]
    with pytest.raises(RuntimeError, match=r"Missing key.*count"):
        VisionMass().load_state_dict(state)
