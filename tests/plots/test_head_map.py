"""Heat maps of head scores: every value in its cell, the right heads framed."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.heads import HeadScores, HeadSet
from hooked_mllm.plots import head_map, head_maps
from hooked_mllm.plots.figure import NotebookFigure

VALUES = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))


def framed(figure):
    """The heads with a frame, as (layer, head)."""
    return {(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in figure.axes[0].patches}


def test_every_score_is_drawn_in_its_cell():
    figure = head_map(HeadScores(VALUES, name="RAM"))
    axes = figure.axes[0]
    np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), VALUES.double().numpy())
    assert axes.get_xlim() == (-0.5, 6.5) and axes.get_ylim() == (4.5, -0.5)  # layer 0 on top
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("head", "layer", "RAM")
    assert axes.images[0].get_clim() == (0, float(VALUES.max()))
    assert figure.axes[1].get_ylabel() == "RAM"  # the colour bar


@pytest.mark.parametrize(
    "top", [3, 0.1, HeadSet([(0, 1), (4, 6)], n_layers=5, n_heads=7)], ids=["count", "share", "set"]
)
def test_the_top_heads_are_framed(top):
    scores = HeadScores(VALUES)
    expected = top if isinstance(top, HeadSet) else scores.top(top)
    assert framed(head_map(scores, top)) == set(expected)


def test_no_frames_and_more_frames_than_heads():
    scores = HeadScores(VALUES)
    assert framed(head_map(scores, None)) == set()
    assert len(framed(head_map(scores, 1000))) == 35


def test_signed_scores_have_white_at_zero():
    clim = head_map(HeadScores(VALUES - 0.9)).axes[0].images[0].get_clim()
    assert clim[0] == -clim[1] == pytest.approx(-float((VALUES - 0.9).abs().max()))


def test_limits_can_be_given():
    assert head_map(HeadScores(VALUES), vmin=0, vmax=2).axes[0].images[0].get_clim() == (0, 2)


def test_layers_that_were_not_measured_are_left_out():
    figure = head_map(HeadScores(VALUES, missing=[2]), top=35)
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    assert np.isnan(drawn[2]).all() and not np.isnan(drawn[[0, 1, 3, 4]]).any()
    assert 2 not in {layer for layer, _ in framed(figure)}


def test_all_zero_scores_draw():
    assert head_map(HeadScores(torch.zeros(2, 2))).axes[0].images[0].get_clim() == (0, 1)


def test_heads_of_another_model():
    with pytest.raises(HeadError, match="model of 2 x 2 .* the map of scores has 5 x 7"):
        head_map(HeadScores(VALUES), HeadSet([(0, 0)], n_layers=2, n_heads=2))
    with pytest.raises(HeadError, match="Layer 5 of head L5H0 is not there: layers are 0 to 4"):
        head_map(VALUES, "L5H0")
    for top in (True, "best", object()):
        with pytest.raises(HeadError, match="Expected a head"):
            head_map(VALUES, top)
    with pytest.raises(InputError, match=r"scores of heads \[layer head\], got shape \(7,\)"):
        head_map(VALUES[0])


@pytest.mark.parametrize("top", ["L0H1, L4H6", (0, 1), [(0, 1), "L4H6"], "mask"], ids=str)
def test_framed_heads_are_specified_in_any_way(top):
    mask = np.zeros((5, 7), dtype=bool)
    mask[2, 3] = True
    expected = {"L0H1, L4H6": {(0, 1), (4, 6)}, (0, 1): {(0, 1)}, "mask": {(2, 3)}}
    figure = head_map(VALUES, mask if top == "mask" else top)
    assert framed(figure) == expected.get(top if not isinstance(top, list) else "L0H1, L4H6")


def test_plain_numbers_are_drawn_like_scores():
    values = VALUES.double().numpy().copy()
    values[1] = np.nan  # not measured
    scores = HeadScores(values, missing=[1], name="RAM")
    for plain in (values, torch.from_numpy(values), values.tolist()):
        for top in (4, 0.2, 100, 0):
            figure = head_map(plain, top, title="RAM")
            assert framed(figure) == framed(head_map(scores, top))
            np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), values)
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values).ravel(), kind="stable")
    assert framed(head_map(values, 4)) == {(int(i) // 7, int(i) % 7) for i in order[:4]}


def test_nothing_global_is_left(tmp_path):
    before = dict(matplotlib.rcParams)
    figure = head_map(HeadScores(VALUES))
    figure.savefig(tmp_path / "map.png")
    assert plt.get_fignums() == [] and dict(matplotlib.rcParams) == before


def test_scores_plot_themselves_and_show_in_notebooks():
    figure = HeadScores(VALUES).plot(top=2)
    assert isinstance(figure, NotebookFigure) and len(framed(figure)) == 2
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_maps_side_by_side_frame_their_own_top_heads():
    ram, vision = HeadScores(torch.rand(3, 4), name="RAM"), HeadScores(torch.rand(3, 4) * 9, name="VisionMass")
    figure = head_maps([ram, vision], top=2, title="toy")
    for axes, scores in zip(figure.axes[:2], (ram, vision), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), scores.values.numpy())
        framed = {(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in axes.patches}
        assert framed == set(scores.top(2)) and axes.get_title() == scores.name
        assert axes.images[0].norm.vmax == pytest.approx(scores.values.max().item())
    assert figure.get_suptitle() == "toy"


def test_maps_that_do_not_go_together():
    ram = HeadScores(torch.rand(3, 4))
    with pytest.raises(InputError, match="got 1 for 2"):
        head_maps([ram, ram], titles=["one"])
    with pytest.raises(InputError, match="got 0 for 0"):
        head_maps([])
    with pytest.raises(HeadError, match=r"shapes \(3, 4\), \(2, 2\)"):
        head_maps([ram, HeadScores(torch.rand(2, 2))])
