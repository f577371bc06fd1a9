"""Vision mass against the double sum over all visual tokens."""

import numpy as np
import pytest

from helpers.attention_reference import random_layers
from helpers.metric_witness import LENGTHS, mass
from hooked_mllm.errors import LayoutError
from hooked_mllm.metrics import RetrievalAttentionMass, VisionMass


@pytest.mark.parametrize("queries", ["question", "last"])
def test_it_is_the_double_sum(queries):
    layers = random_layers(lengths=LENGTHS, seed=3)
    metric = VisionMass(queries=queries)
    metric.update(view=layers.view())
    np.testing.assert_allclose(metric.compute().values, mass(layers, queries, "visual").mean(1), atol=3e-6)


def test_it_is_the_mass_on_a_target_of_all_visual_tokens():
    """Where the target is part of the picture, no head pays more to it than to the whole."""
    layers = random_layers(lengths=LENGTHS)
    vision, target = VisionMass(), RetrievalAttentionMass()
    for metric in (vision, target):
        metric.update(view=layers.view())
    assert (vision.compute().values > target.compute().values).all()
    layers.masks["target"] = layers.masks["visual"]
    whole = RetrievalAttentionMass()
    whole.update(view=layers.view())
    np.testing.assert_allclose(whole.compute().values, vision.compute().values, rtol=1e-6)


def test_a_sample_without_pictures():
    layers = random_layers()
    layers.masks["visual"][:] = False
    with pytest.raises(LayoutError, match="visual"):
        VisionMass().update(view=layers.view())
