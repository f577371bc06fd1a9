"""Agreement of tasks, read back from the figure; what is drawn needs values and names alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hooked_mllm.plots.stability_map import stability_map


@pytest.fixture
def agreement():
    spearman = np.array([[1.0, -0.5, 0.25], [-0.5, 1.0, 0.9], [0.25, 0.9, 1.0]])
    counts = torch.tensor([[0, 3, 1, 0], [2, 0, 0, 3]])
    return SimpleNamespace(tasks=("a", "b", "c"), spearman=spearman, counts=counts, percentile=90.0)


def test_the_matrix_has_its_numbers_in_its_cells(agreement):
    figure = stability_map(agreement, title="three tasks")
    left = figure.axes[0]
    assert [text.get_text() for text in left.texts] == [f"{v:.2f}" for v in agreement.spearman.ravel()]
    np.testing.assert_array_equal(left.images[0].get_array(), agreement.spearman)
    assert left.images[0].get_clim() == (-0.5, 1.0)
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "b", "c"]
    assert figure._suptitle.get_text() == "three tasks"
    figure.canvas.draw()


def test_numbers_are_readable_on_their_cells(agreement):
    colours = {text.get_text(): text.get_color() for text in stability_map(agreement).axes[0].texts}
    assert (colours["1.00"], colours["-0.50"]) == ("black", "white")  # bright and dark ends of the colour map


def test_heads_are_coloured_by_their_number_of_tasks(agreement):
    right = stability_map(agreement).axes[1]
    image = right.images[0]
    np.testing.assert_array_equal(image.get_array(), agreement.counts)
    assert right.get_title() == "(b) tasks in which a head is in the top 10 %"
    assert len({image.cmap(image.norm(count)) for count in range(4)}) == 4, "one colour for each number of tasks"
