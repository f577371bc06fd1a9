"""Visual sinks against NumPy on the cached residual stream and patterns."""

import numpy as np
import pytest
import torch

from helpers.attention_reference import random_layers
from helpers.cache_witness import batch, hooked, sample
from hooked_mllm.errors import InputError
from hooked_mllm.measuring.measure import measure
from hooked_mllm.measuring.view_context import ViewContext
from hooked_mllm.metrics import HeadMetric, VisualNonSinkRatio, VisualSinkShare
from hooked_mllm.metrics.literature import massive_dims

TAU = 1.5


def by_hand(family, inputs, dims, queries="last") -> np.ndarray:
    """[layer head]."""
    _, cache = hooked(family).run_with_cache(inputs, ["blocks.*hook_pattern", "blocks.*hook_resid_pre"])
    visual, rows = inputs.mask("visual")[0].numpy(), inputs.mask(queries)[0].numpy()
    out = np.zeros((3, 4))
    for layer in range(3):
        x = cache["resid_pre", layer][0].double().numpy()
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        sinks = (np.abs(normed[:, dims]) > TAU).any(1) & visual
        attention = cache["pattern", layer][0].double().numpy()[:, rows].mean(1)
        out[layer] = attention[:, sinks].sum(-1) / attention[:, visual].sum(-1)
    return out


@pytest.mark.parametrize("queries", ["last", "question"])
def test_formula(family, queries):
    samples, dims = [sample(family, 0), sample(family, 1)], [1, 5, 17, 30]
    expected = np.mean([by_hand(family, s, dims, queries) for s in samples], axis=0)
    assert 0.05 < expected.mean() < 0.95  # some are sinks and some are not
    metrics = [
        VisualSinkShare(dims=dims, tau=TAU, queries=queries),
        VisualNonSinkRatio(dims=dims, tau=TAU, queries=queries),
    ]
    for group_bytes in (1, 1 << 29):
        share, rest = measure(hooked(family), samples, metrics, progress=False, group_bytes=group_bytes)
        np.testing.assert_allclose(share.values, expected, atol=1e-5)
        np.testing.assert_allclose(rest.values, 1 - expected, atol=1e-5)
        for metric in metrics:
            metric.reset()


def test_in_a_padded_batch(family):
    together = hooked(family).measure(batch(family), VisualSinkShare(dims=[1, 5, 17, 30], tau=TAU), progress=False)
    expected = np.mean([by_hand(family, s, [1, 5, 17, 30]) for s in batch(family)], axis=0)
    np.testing.assert_allclose(together.values, expected, atol=1e-5)


def test_the_residual_is_kept_only_where_it_is_needed(family):
    class Curious(HeadMetric):
        def score(self, view):
            view.context.residual
            return view.mass("last", "visual")

    model = hooked(family)
    with pytest.raises(InputError, match="needs_residual = True"):
        model.measure(sample(family), Curious(), progress=False)
    with pytest.raises(InputError, match="dimensions 0 to 31"):
        model.measure(sample(family), VisualSinkShare(dims=[32]), progress=False)
    assert not model.list_hooks() and not any(site.taps for site in model.wiring.text)


def test_a_strength_at_the_threshold_is_no_sink_in_any_rounding():
    x = torch.ones(1, 20, 4)
    x[0, :, 0] = 3.0
    strength = 3.0 / (float(x[0, 0].double().square().mean()) + 1e-6) ** 0.5
    x[0, :3, 0] *= torch.tensor([1 + 1e-6, 1 - 1e-6, 1.1])
    layers = random_layers(lengths=(20,), n_layers=1)
    view = layers.view(context=ViewContext(residuals=[x]))
    assert VisualSinkShare(dims=[0], tau=strength).sinks(view).nonzero().tolist() == [[0, 0, 2]]


def test_massive_dims_are_the_first_tokens_largest():
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0, 6], x[:, 0, 2], x[:, 3, 1] = -50.0, 20.0, 90.0
    assert massive_dims(x) == (6, 2) and massive_dims(x, k=1) == (6,)


def test_bad_input_is_rejected():
    for options in ({"dims": []}, {"dims": [-1]}, {"dims": [3], "tau": 0.0}):
        with pytest.raises(InputError, match="one or more dimensions"):
            VisualSinkShare(**options)
