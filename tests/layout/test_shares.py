"""Regions in, tokens out: against a count of pixels, one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.layout_pieces import image, layout, two_views, video
from hooked_mllm.errors import LayoutError
from hooked_mllm.layout import Box, Frames, Mask, Pages, Tube

FINE = 8  # subpixels to a pixel, each way, in the witness


def raster(region, width: int, height: int) -> np.ndarray:
    """The region on a fine raster, sampled at the centre of every subpixel."""
    y, x = np.mgrid[0 : height * FINE, 0 : width * FINE] / FINE + 0.5 / FINE
    if isinstance(region, Mask):
        return region.pixels[y.astype(int), x.astype(int)]
    return (x > region.x0) & (x < region.x1) & (y > region.y0) & (y < region.y1)


def shares_by_counting(found, regions) -> np.ndarray:
    """For each position the share of its footprint in the union of the regions, counted on the raster."""
    item = found.items[0]
    union = np.any([raster(r, item.width, item.height) for r in regions], axis=0)
    out = np.zeros(len(found))
    for pos in np.flatnonzero(found.pixels.numpy()):
        x0, y0, x1, y1 = (found.boxes[pos].numpy() * FINE).round().astype(int)
        out[pos] = union[y0:y1, x0:x1].mean()
    return out


eighths = st.integers(-4 * FINE, 36 * FINE).map(lambda v: v / FINE)


@st.composite
def boxes(draw):
    x0, x1 = sorted(draw(st.lists(eighths, min_size=2, max_size=2, unique=True)))
    y0, y1 = sorted(draw(st.lists(eighths, min_size=2, max_size=2, unique=True)))
    return x0, y0, x1, y1


@pytest.mark.filterwarnings("ignore:The box .* lies in one pixel")  # drawn boxes may be that small
@settings(max_examples=250, deadline=None)
@given(
    given_boxes=st.lists(boxes(), min_size=1, max_size=4),
    mask_seed=st.none() | st.integers(0, 10**6),
    grid=st.sampled_from([(4, 2), (8, 4), (1, 1), (16, 8)]),
    min_overlap=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_a_union_of_boxes_and_masks_against_counted_pixels(given_boxes, mask_seed, grid, min_overlap):
    width, height = 32, 16
    found = layout(image(width, height, *grid))
    regions = [Box(*b) for b in given_boxes if b[0] < width and b[2] > 0 and b[1] < height and b[3] > 0]
    if mask_seed is not None:
        rng = np.random.default_rng(mask_seed)
        pixels = rng.random((height, width)) < rng.choice([0.01, 0.5, 0.95])
        pixels[rng.integers(height), rng.integers(width)] = True
        regions.append(Mask(pixels))
    if not regions:
        return
    share = shares_by_counting(found, regions)
    expected = share > 0 if min_overlap == 0 else share >= min_overlap
    if expected.any():
        np.testing.assert_array_equal(found.target(regions, min_overlap).numpy(), expected)
    else:
        with pytest.raises(LayoutError, match="has more than"):
            found.target(regions, min_overlap)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.integers(1, 24),
    st.integers(1, 24),
    st.lists(st.integers(0, 10**6), min_size=4, max_size=4),
)
def test_a_box_is_the_papers_floor_and_ceil_on_the_merged_grid(width, height, cols, rows, drawn):
    # appendix C, eq. 2-3, in whole numbers: columns floor(x1 W_p / W) .. ceil(x2 W_p / W) - 1
    x0, x1 = drawn[0] % width, 0
    x1 = x0 + 1 + drawn[1] % (width - x0)
    y0 = drawn[2] % height
    y1 = y0 + 1 + drawn[3] % (height - y0)
    found = layout(image(width, height, cols, rows))
    expected = np.zeros((rows, cols), dtype=bool)
    expected[y0 * rows // height : -(-y1 * rows // height), x0 * cols // width : -(-x1 * cols // width)] = True
    got = found.target(Box(x0, y0, x1, y1))[found.visual].reshape(rows, cols)
    np.testing.assert_array_equal(got.numpy(), expected)


def test_edges_shared_with_a_region_do_not_make_a_target():
    found = layout(image(30, 30, 3, 3))
    assert found.target(Box(10, 10, 20, 20))[found.visual].nonzero().flatten().tolist() == [4]
    third = layout(image(100, 100, 3, 3))  # edges at 33.33...
    assert third.target(Box(100 / 3, 0, 200 / 3, 100 / 3))[third.visual].nonzero().flatten().tolist() == [1]


def test_what_two_regions_share_counts_once():
    found = layout(image(20, 10, 2, 1))
    halves = [Box(0, 0, 4, 10), Box(2, 0, 6, 10)]  # together 6 of the first token's 10 columns, not 8
    assert found.target(halves, min_overlap=0.6).any()
    with pytest.raises(LayoutError, match=r"has more than 0\.65 .* has 0\.6"):
        found.target(halves, min_overlap=0.65)


def test_all_views_of_an_image_are_in_the_target_and_newlines_never():
    found = layout(two_views(100, 40))
    everything = found.target(Box(0, 0, 100, 40))
    torch.testing.assert_close(everything, found.pixels)
    assert int(everything.sum()) == 4 + 20 and int(found.visual.sum()) == 4 + 24
    strip = found.target(Box(85, 0, 100, 40))  # seen by the coarse view alone
    assert strip[found.visual].nonzero().flatten().tolist() == [1, 3]


def test_a_box_that_reaches_over_the_edge_is_cut_there():
    found = layout(image(30, 30, 3, 3))
    torch.testing.assert_close(found.target(Box(-50, -50, 5, 5)), found.target(Box(0, 0, 5, 5)))
    torch.testing.assert_close(found.target(Box(25, 25, 31, 999)), found.target(Box(25, 25, 30, 30)))


def test_regions_of_several_images_and_pages():
    found = layout(image(20, 20, 2, 2), image(40, 10, 4, 1, index=1), image(20, 20, 1, 1, index=2))
    both = found.target([Box(0, 0, 5, 5), Box(35, 0, 40, 10, image=1)])
    assert both[found.tokens(image=0)].tolist() == [True, False, False, False]
    assert both[found.tokens(image=1)].tolist() == [False, False, False, True]
    torch.testing.assert_close(found.pages({0, 2}), found.tokens(image=0) | found.tokens(image=2))
    torch.testing.assert_close(found.target([Pages([1]), Box(0, 0, 1, 1, image=1)]), found.tokens(image=1))
    torch.testing.assert_close(found.region(Box(35, 0, 40, 10), image=1), found.target(Box(35, 0, 40, 10, image=1)))


def frames_of(found, target) -> list[tuple[int, int]]:
    return sorted({tuple(r) for r in found.frame_range[target].tolist()})


def test_frames_by_time_pairs_included():
    found = layout(video(20, 10, 2, 1, times=(0.0, 1.0, 2.0, 3.0, 4.0), per_step=2))
    assert frames_of(found, found.frames(0, start_s=1.5, end_s=3.0)) == [(2, 3)]
    assert frames_of(found, found.frames(0, start_s=1.0, end_s=1.2)) == [(0, 1)]
    assert frames_of(found, found.frames(0, start_s=4.0)) == [(4, 4)]
    assert frames_of(found, found.frames(0, end_s=2.0)) == [(0, 1), (2, 3)]
    # half of a pair's frames is half of its footprint
    assert frames_of(found, found.target(Frames(1.0, 3.0), min_overlap=0.6)) == [(2, 3)]
    with pytest.raises(LayoutError, match=r"has 0\.5"):
        found.target(Frames(1.0, 1.0), min_overlap=0.6)
    assert not found.frames(0)[found.visual][-1]  # the newline at the end


def test_a_box_in_some_frames():
    found = layout(video(20, 10, 2, 1, times=(0.0, 1.0, 2.0, 3.0), per_step=2))
    left = found.target(Frames(0.0, 0.5, box=(0, 0, 10, 10)))
    assert left[found.visual].tolist() == [True, False, False, False, False]
    assert found.region(Box(0, 0, 10, 10), video=0)[found.visual].tolist() == [True, False, True, False, False]
    # a quarter: half the area in one of two frames
    assert found.target(Frames(0.0, 0.5, box=Box(0, 0, 5, 10)), min_overlap=0.25).any()
    with pytest.raises(LayoutError, match=r"has 0\.25"):
        found.target(Frames(0.0, 0.5, box=Box(0, 0, 5, 10)), min_overlap=0.26)


def test_a_tube_follows_its_box():
    found = layout(video(40, 10, 4, 1, times=(0.0, 1.0, 2.0, 3.0)))
    tube = Tube({0.0: (0, 0, 10, 10), 2.0: (20, 0, 30, 10), 2.5: None})
    grid = found.target(tube)[found.pixels].reshape(4, 4)
    assert grid.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    # a whole frame in the union covers the tube's box there
    union = found.target([tube, Frames(1.0, 1.0)])[found.pixels].reshape(4, 4)
    assert union[1].all() and union[0].tolist() == [1, 0, 0, 0]


ONE, CLIP = image(30, 20, 3, 2), video(30, 20, 3, 2, times=(0.0, 1.0, 2.0))


@pytest.mark.parametrize(
    ("items", "call", "message"),
    [
        ([ONE], lambda o: o.target(Box(30, 0, 40, 10)), "lies outside image 0, which is 30 x 20 pixels"),
        ([ONE], lambda o: o.target(Box(-9, -9, 0, 0)), "lies outside image 0"),
        ([ONE], lambda o: o.target(Box(0, 0, 5, 5, image=1)), r"no image 1: this input has 1 of them, numbered from 0"),
        ([ONE], lambda o: o.target(Box(0, 0, 5, 5, image=-1)), "no image -1"),
        ([CLIP], lambda o: o.target(Box(0, 0, 5, 5)), "no image 0: this input has none"),
        ([ONE], lambda o: o.pages({0, 4}), "no image 4"),
        ([ONE], lambda o: o.pages([]), "at least one image"),
        ([ONE], lambda o: o.frames(0), "no video 0"),
        ([ONE], lambda o: o.target(Mask(np.ones((30, 20), bool))), r"\[height width\] = \(20, 30\); got \(30, 20\)"),
        ([CLIP], lambda o: o.frames(0, start_s=2.5), "outside video 0: its 3 frames lie from 0 to 2 s"),
        ([CLIP], lambda o: o.frames(0, end_s=-1), "outside video 0"),
        ([CLIP], lambda o: o.frames(0, start_s=1.2, end_s=1.8), "nearest are at 1 and 2 s"),
        ([CLIP], lambda o: o.frames(1), "no video 1"),
        ([CLIP], lambda o: o.target(Frames(box=(30, 0, 31, 1))), "lies outside video 0"),
        ([CLIP], lambda o: o.target(Tube({0.4: (0, 0, 5, 5)})), "at none of the times"),
        ([ONE], lambda o: o.target([]), "list of regions is empty"),
        ([ONE], lambda o: o.target(Box(0, 0, 5, 5), min_overlap=0.9), r"has more than 0.9 .* has 0.25"),
        ([ONE], lambda o: o.target(Box(0, 0, 5, 5), min_overlap=1.5), "from 0 to 1; got 1.5"),
        ([], lambda o: o.target(Box(0, 0, 5, 5)), "no visual tokens"),
        ([], lambda o: o.pages({0}), "no visual tokens"),
        ([ONE], lambda o: o.region(Frames(), image=0), "use video=, not image="),
        ([ONE], lambda o: o.region(Pages([0]), image=0), "leave out image="),
        ([CLIP], lambda o: o.region(Mask(np.ones((20, 30), bool)), video=0), "For a video use Frames"),
        ([ONE], lambda o: o.region(Box(0, 0, 1, 1), image=0, video=0), "one image or one video"),
    ],
)
def test_questions_that_the_layout_cannot_answer(items, call, message):
    with pytest.raises(LayoutError, match=message):
        call(layout(*items))


def test_a_region_that_only_padding_or_dead_pixels_hold_maps_to_no_token():
    fine_only = two_views(100, 40)
    keep = fine_only.views != 2  # leave out the coarse view
    item = type(fine_only)("image", 0, 100, 40, fine_only.boxes[keep], fine_only.frames[keep], fine_only.views[keep])
    with pytest.raises(LayoutError, match="No token has more than 0"):
        layout(item).target(Box(85, 0, 95, 40))
