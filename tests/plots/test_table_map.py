"""Maps of causal effects, read back from the figure."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from hooked_mllm.metrics import CausalTable
from hooked_mllm.plots.table_map import MOST_TICKS, table_map


def labels(ticks):
    return [label.get_text() for label in ticks]


def test_every_effect_is_drawn_in_its_cell_with_layer_0_at_the_bottom():
    table = CausalTable([[0.1, -0.9], [0.2, 0.4]], places=["visual", "question"], layers=[3, 7], name="patching")
    figure = table_map(table)
    axes, colours = figure.axes
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), table.values)
    assert image.origin == "lower" and colours.get_ylabel() == "effect"
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("patching", "tokens", "layer")
    assert labels(axes.get_xticklabels()) == ["visual", "question"] and labels(axes.get_yticklabels()) == ["3", "7"]
    assert image.norm.vmin == -0.9 and image.norm.vmax == 0.9, "white at zero where there are both signs"
    assert not plt.get_fignums(), "outside pyplot"


def test_title_and_colours_can_be_given():
    table = CausalTable([[0.1, 0.9]], places=["visual", "question"], name="patching")
    axes = table_map(table, title="", cmap="viridis").axes[0]
    assert axes.get_title() == "" and axes.images[0].get_cmap().name == "viridis"
    assert axes.images[0].norm.vmin == 0.0


@pytest.mark.parametrize("n", [5, MOST_TICKS, MOST_TICKS + 1, 100])
def test_many_positions_share_the_ticks(n):
    axes = table_map(CausalTable(np.ones((1, n)), places=list(range(10, 10 + n)))).axes[0]
    ticks = axes.get_xticks().tolist()
    assert 1 <= len(ticks) <= MOST_TICKS and axes.get_xlabel() == "position"
    assert labels(axes.get_xticklabels()) == [str(10 + int(tick)) for tick in ticks]
    assert len(ticks) == n or n > MOST_TICKS


def test_many_layers_share_the_ticks():
    table = CausalTable(np.ones((40, 2)), places=["a", "b"], layers=range(40))
    shown = labels(table_map(table).axes[0].get_yticklabels())
    assert len(shown) <= 12 and shown[:2] == ["0", "4"]
