"""Scatter of two scores: every head a dot, the rank correlation that of SciPy."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.stats import spearmanr

from hooked_mllm import HeadScores
from hooked_mllm.errors import HeadError, NumericsError
from hooked_mllm.plots import scatter

VALUES = np.random.default_rng(0).normal(size=(2, 3, 4))


def test_every_head_is_a_dot_and_the_title_has_the_rank_correlation():
    x, y = HeadScores(VALUES[0], name="attribution"), HeadScores(VALUES[1], name="patching")
    figure = scatter(x, y, label=2, diagonal=True)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.collections[0].get_offsets(), VALUES.reshape(2, -1).T)
    np.testing.assert_array_equal(axes.collections[0].get_array(), np.repeat([0, 1, 2], 4))
    assert axes.get_title() == f"Spearman {spearmanr(VALUES[0].ravel(), VALUES[1].ravel()).statistic:.3f}, 12 heads"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("attribution", "patching")
    named = {t.get_text(): t.xy for t in axes.texts}
    tops = {*map(int, np.argsort(-VALUES[0].ravel())[:2]), *map(int, np.argsort(-VALUES[1].ravel())[:2])}
    assert named == {f"L{i // 4}H{i % 4}": (VALUES[0].ravel()[i], VALUES[1].ravel()[i]) for i in tops}
    assert len(axes.lines) == 1
    assert plt.get_fignums() == []


def test_layers_that_one_lacks_are_left_out():
    x, y = HeadScores(VALUES[0], missing=[1]), HeadScores(VALUES[1])
    axes = scatter(x, y, label=1.0, title="both").axes[0]
    assert len(axes.collections[0].get_offsets()) == 8
    assert not any(t.get_text().startswith("L1") for t in axes.texts) and len(axes.texts) == 8
    assert axes.get_title() == "both" and not axes.lines


def test_what_cannot_be_drawn():
    x = HeadScores(VALUES[0])
    with pytest.raises(HeadError, match="different shape"):
        scatter(x, HeadScores(VALUES[0][:2]))
    with pytest.raises(NumericsError, match="are equal"):
        scatter(x, HeadScores(np.ones((3, 4))))
    for label in (-1, 1.5, True):
        with pytest.raises(HeadError):
            scatter(x, x, label=label)
    assert not scatter(x, x, label=0).axes[0].texts
    assert len(scatter(x, x, label=99).axes[0].texts) == 12


def test_plain_numbers_and_named_heads():
    axes = scatter(VALUES[0], VALUES[1].tolist(), label="L1H2, L2H0").axes[0]
    assert axes.get_title() == f"Spearman {spearmanr(VALUES[0].ravel(), VALUES[1].ravel()).statistic:.3f}, 12 heads"
    assert [text.get_text() for text in axes.texts] == ["L1H2", "L2H0"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x", "y")
    with pytest.raises(HeadError, match="fewer than two"):
        scatter(np.full((1, 2), [1.0, np.nan]), np.ones((1, 2)))
