""""""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from hooked_mllm.errors import InputError
from hooked_mllm.metrics import AblationCurveResult
from hooked_mllm.plots import ablation_curves


def curve(objective="GreedyAccuracy", n_samples=6, seed=0):
    rng = np.random.default_rng(seed)
    values = {"top": rng.random((1, 3, n_samples)), "random": rng.random((2, 3, n_samples))}
    values["random"][:, 2] = np.nan
    return AblationCurveResult((0, 4, 9), values, {}, objective=objective)


def test_lines_bands_and_seeds_are_the_measured_ones():
    measured = curve()
    axes = measured.plot(chance=0.125, level=0.8).axes[0]
    top, random, first, second, chance = axes.lines
    for line, expected in [
        (top, measured.per_sample["top"][0].mean(1)),
        (random, measured.per_sample["random"].mean((0, 2))),
        (first, measured.per_sample["random"][0].mean(1)),
        (second, measured.per_sample["random"][1].mean(1)),
    ]:
        np.testing.assert_allclose(line.get_xdata(), [0, 4, 9])
        np.testing.assert_allclose(line.get_ydata(), expected)
    assert set(chance.get_ydata()) == {0.125}
    band = axes.collections[0].get_paths()[0].vertices
    low, high = measured.interval("top", 0.8)
    for x, ends in zip((0, 4, 9), zip(low, high, strict=True), strict=True):
        there = band[band[:, 0] == x, 1]
        np.testing.assert_allclose([there.min(), there.max()], ends)
    assert axes.get_ylabel() == "GreedyAccuracy"
    labels = [t.get_text() for t in axes.get_legend().get_texts()]
    assert labels == ["top heads", "random heads", "chance 0.125"]
    assert plt.get_fignums() == []


def test_several_models_differ_in_their_lines():
    axes = ablation_curves({"A": curve(), "B": curve(seed=1)}, level=None).axes[0]
    assert [line.get_linestyle() for line in axes.lines] == ["-"] * 4 + ["--"] * 4 and not axes.collections
    assert [t.get_text() for t in axes.get_legend().get_texts()][2:] == ["A", "B"]


def test_one_sample_has_no_band():
    assert not ablation_curves(curve(n_samples=1)).axes[0].collections


def test_curves_that_cannot_be_drawn():
    with pytest.raises(InputError, match="one to 4 curves"):
        ablation_curves({})
    with pytest.raises(InputError, match="of one objective, got AnswerLogProb, GreedyAccuracy"):
        ablation_curves({"a": curve(), "b": curve("AnswerLogProb")})
