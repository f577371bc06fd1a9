"""What all metrics share: batches, views, shards, dtypes, resuming, provenance and misuse."""

import copy

import numpy as np
import pytest
import torch

from helpers.attention_reference import random_layers
from helpers.metric_witness import (
    LENGTHS,
    SinkMass,
    each_metric,
    mass,
    per_sample,
)
from hooked_mllm.contracts import Metric, ModelInfo
from hooked_mllm.errors import HeadError, InputError, LayoutError, NumericsError
from hooked_mllm.metrics import AttentionScore, HeadMetric, KeyTokenRatio, RetrievalAttentionMass, VisionMass


@each_metric
def test_samples_one_by_one_views_of_few_layers_and_one_batch_agree(make, reference):
    layers = random_layers(lengths=LENGTHS, n_layers=5)
    whole = make()
    whole.update(view=layers.view())
    expected = whole.compute()
    for group in (1, 2, 5):
        got = per_sample(make(), layers, group).compute()
        np.testing.assert_allclose(got.values, expected.values, atol=1e-7)
        assert torch.equal(got.counts, expected.counts)


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
def test_a_saved_state_resumes_where_it_stopped(make, reference):
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
    copied = copy.deepcopy(metric)
    assert copied.compute() == metric.compute()
    metric.reset()
    with pytest.raises(InputError, match="seen no sample"):
        metric.compute()
    metric.update(view=layers.view())
    assert copied.compute() == metric.compute()


def test_many_samples_keep_float64_precision():
    layers = random_layers()
    metric = RetrievalAttentionMass()
    view = layers.view()
    for _ in range(300):
        metric.update(view=view)
    assert torch.allclose(metric.compute().values, view.mass("question", "target")[:, 0], rtol=1e-13, atol=0)


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


def test_a_sample_without_target_is_rejected():
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


def test_misuse_is_rejected():
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
