"""A layout as text."""

import pytest
import torch

from helpers.layout_pieces import layout, two_views, video
from hooked_mllm.layout.layout import runs


def test_the_repr_lists_the_parts_in_one_line():
    found = layout(two_views(40, 30), video(20, 10, 2, 1, times=(0.0, 1.0))).padded(left=2)
    line = repr(found)
    assert "\n" not in line and len(line) < 400
    for part in (
        f"{len(found)} tokens",
        "image 0 4:32 (40x30 px",
        "4 base, 20 highres, 4 without pixels",
        "padding 0:2",
    ):
        assert part in line
    assert found.describe().splitlines()[-1].split() == ["last", str(found.last_index)]


@pytest.mark.parametrize(
    ("mask", "ranges"),
    [([], []), ([0, 0], []), ([1], [(0, 1)]), ([0, 1, 1, 0, 1], [(1, 3), (4, 5)]), ([1, 1, 1], [(0, 3)])],
)
def test_contiguous_ranges(mask, ranges):
    assert runs(torch.tensor(mask, dtype=torch.bool)) == ranges
