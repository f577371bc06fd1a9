"""What every position is, padding, painting, chance, and what is refused."""

import time

import numpy as np
import pytest
import torch

from helpers.layout_pieces import PLACEHOLDER, TEXT, image, layout, two_views, video
from hooked_mllm.errors import LayoutError
from hooked_mllm.layout import Box, ImageMedia, Kind, TokenLayout, Tube, VideoMedia, View


def test_every_position_has_one_kind():
    found = layout(image(30, 20, 3, 2), answer=2)
    expected = "system template" + " visual" * 6 + " template" + " question" * 3 + " template" + " answer" * 2
    assert [Kind(k).name.lower() for k in found.kinds.tolist()] == expected.split()
    masks = torch.stack([found.mask(k.name.lower()) for k in Kind])
    assert (masks.sum(0) == 1).all()
    torch.testing.assert_close(found.text, ~found.visual)
    assert found.spans("question") == [(9, 12)] and found.spans(Kind.VISUAL) == [(2, 8)]
    assert found.spans("template") == [(1, 2), (8, 9), (12, 13)] and found.spans("padding") == []
    for name in ("system", "template", "question", "answer", "visual", "padding", "text", "last", "pixels"):
        torch.testing.assert_close(getattr(found, name), found.mask(name))


def test_last_is_the_position_that_predicts_the_answer():
    assert layout(image(30, 20, 3, 2), answer=2).last.nonzero().tolist() == [[12]]
    assert layout(image(30, 20, 3, 2)).last.nonzero().tolist() == [[12]]


def test_generating_positions_come_one_before_the_answers_tokens():
    assert layout(image(30, 20, 3, 2), answer=3).mask("generating").nonzero().flatten().tolist() == [12, 13, 14]
    padded = layout(image(30, 20, 3, 2), answer=1).padded(left=2, right=2)
    assert padded.mask("generating").nonzero().flatten().tolist() == [14] and padded.last[14]
    assert not layout(image(30, 20, 3, 2)).mask("generating").any()


def test_padding_shifts_everything_and_changes_nothing_else():
    plain = layout(two_views(40, 40), video(20, 10, 2, 1, times=(0.0, 1.0)), answer=1)
    padded = plain.padded(left=3, right=2)
    assert len(padded) == len(plain) + 5 and padded.padding.tolist() == [True] * 3 + [False] * len(plain) + [True] * 2
    region = [Box(0, 0, 9, 9)]
    values = torch.randn(len(padded))
    for was, now in [
        (plain.target(region), padded.target(region)),
        (plain.frames(0, 1.0), padded.frames(0, 1.0)),
        *((plain.mask(n), padded.mask(n)) for n in ("question", "answer", "visual", "text", "last", "pixels")),
    ]:
        torch.testing.assert_close(now[3:-2], was)
        assert not now[:3].any() and not now[-2:].any()
    np.testing.assert_array_equal(padded.to_image(values), plain.to_image(values[3:-2]))
    torch.testing.assert_close(padded.times[3:-2], plain.times, equal_nan=True)
    mask = plain.target(region)
    assert padded.chance(torch.nn.functional.pad(mask, (3, 2))) == plain.chance(mask)
    again = plain.padded(1, 0).padded(2, 2)
    torch.testing.assert_close(again.kinds, padded.kinds)
    assert again.last_index == padded.last_index
    with pytest.raises(LayoutError, match="zero or more"):
        plain.padded(left=-1)


def test_chance_is_the_mass_of_an_even_head():
    found = layout(image(30, 20, 3, 2)).padded(left=4)
    target = found.target(Box(0, 0, 10, 10))
    n = len(found)
    causal = torch.ones(n, n).tril() * ~found.padding
    even = (causal / causal.sum(-1, keepdim=True).clamp(min=1)).double()
    assert found.chance(target) == pytest.approx(float(even[found.question][:, target].sum(-1).mean()), rel=1e-6)
    assert found.chance(found.visual, "last") == pytest.approx(float(even[found.last][:, found.visual].sum()), rel=1e-6)
    assert found.chance(target, found.question) == found.chance(target)
    with pytest.raises(LayoutError, match="no query positions"):
        layout(image(30, 20, 3, 2), question=0).chance(target[4:-3])


def test_painting_pixel_by_pixel():
    for item in (two_views(37, 23), image(37, 23, 5, 3), image(3, 2, 7, 5)):
        found = layout(item)
        values = torch.randn(len(found), dtype=torch.float64)
        got = found.to_image(values)
        assert got.shape == (item.height, item.width)
        for y in range(item.height):
            for x in range(item.width):
                x0, y0, x1, y1 = found.boxes.T
                here = (x0 <= x + 0.5) & (x + 0.5 < x1) & (y0 <= y + 0.5) & (y + 0.5 < y1)
                fine = here & (found.view == View.HIGHRES)
                here = fine if fine.any() else here
                assert here.sum() == 1 and got[y, x] == values[here]


def test_a_view_can_be_chosen_and_what_it_does_not_see_is_nan():
    found = layout(two_views(40, 40))
    values = torch.arange(len(found), dtype=torch.float64)
    base, fine = (found.to_image(values, view=v) for v in ("base", "highres"))
    assert sorted(set(base.ravel())) == [2, 3, 4, 5]
    assert np.isnan(fine[:, 32:]).all() and not np.isnan(fine[:, :32]).any()
    both = found.to_image(values)
    np.testing.assert_array_equal(both, np.where(np.isnan(fine), base, fine))
    with pytest.raises(LayoutError, match="no view 'tile'; it has base, highres"):
        found.to_image(values, view="tile")


def test_frames_are_painted_by_the_tokens_that_see_them():
    found = layout(video(20, 10, 2, 1, times=(0.0, 1.0, 2.0), per_step=2))
    values = np.arange(len(found))
    assert [sorted(set(found.to_image(values, video=0, frame=f).ravel())) for f in range(3)] == [[2, 3], [2, 3], [4, 5]]
    with pytest.raises(LayoutError, match="frames 0 to 2; got frame 3"):
        found.to_image(values, video=0, frame=3)


def test_region_to_tokens_to_image_covers_the_region():
    rng = np.random.default_rng(0)
    for _ in range(100):
        width, height, cols, rows = (int(v) for v in rng.integers([8, 8, 1, 1], [200, 200, 20, 20]))
        x0, y0 = int(rng.integers(width)), int(rng.integers(height))
        x1, y1 = int(rng.integers(x0, width)) + 1, int(rng.integers(y0, height)) + 1
        found = layout(image(width, height, cols, rows))
        target = found.target(Box(x0, y0, x1, y1))
        painted = found.to_image(target.double())
        assert (painted[y0:y1, x0:x1] == 1).all()  # no pixel of the region is lost
        slack_x, slack_y = width / cols + 1, height / rows + 1  # and none is painted farther off than a token is wide
        y, x = np.nonzero(painted)
        assert x.min() > x0 - slack_x and x.max() < x1 + slack_x and y.min() > y0 - slack_y and y.max() < y1 + slack_y


def test_the_times_of_frame_pairs():
    found = layout(video(20, 10, 1, 1, times=(0.0, 0.4, 1.0, 1.4, 2.0), per_step=2))
    times = found.times[found.visual].tolist()
    assert times[:3] == pytest.approx([0.2, 1.2, 2.0]) and np.isnan(times[3])
    assert found.times[found.text].isnan().all()


def test_what_to_image_refuses():
    found = layout(image(30, 20, 3, 2))
    values = torch.zeros(len(found))
    with pytest.raises(LayoutError, match=rf"shape \({len(found)},\); got \(3,\)"):
        found.to_image(values[:3])
    with pytest.raises(LayoutError, match="no image 1"):
        found.to_image(values, image=1)
    with pytest.raises(LayoutError, match="no video 0"):
        found.to_image(values, video=0)
    with pytest.raises(LayoutError, match="one image or one video"):
        found.to_image(values, image=0, video=0)
    with pytest.raises(LayoutError, match="no visual tokens"):
        layout().to_image(torch.zeros(len(layout())))


def test_names_of_positions():
    with pytest.raises(LayoutError, match="Did you mean 'question'"):
        layout(image(30, 20, 3, 2)).mask("questions")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"question": [(0, 99)]}, "does not lie within the 9 positions"),
        ({"question": [(0, 2)], "answer": [(1, 2)]}, r"answer span \(1, 2\) overlaps the question span"),
        ({"prompt": [(0, 1)]}, "Spans are named system, question, answer; got 'prompt'"),
        ({"answer": [(0, 2)]}, "no position is left to predict it"),
    ],
)
def test_spans_that_cannot_be(spans, message):
    item = image(30, 20, 3, 2)
    ids = torch.tensor([TEXT, TEXT, *[PLACEHOLDER] * 6, TEXT])
    with pytest.raises(LayoutError, match=message):
        TokenLayout.build(ids, [item], (PLACEHOLDER,), spans)


def test_tokens_and_placeholders_must_be_as_many():
    item = image(30, 20, 3, 2)
    with pytest.raises(LayoutError, match=r"5 placeholder tokens, .* 6 visual tokens \(image 0: 6\)"):
        TokenLayout.build(torch.tensor([PLACEHOLDER] * 5), [item], (PLACEHOLDER,), {})
    with pytest.raises(LayoutError, match=r"1 placeholder tokens, .* 0 visual tokens \(no images or videos\)"):
        TokenLayout.build(torch.tensor([PLACEHOLDER]), [], (PLACEHOLDER,), {})
    with pytest.raises(LayoutError, match="no tokens"):
        TokenLayout.build(torch.tensor([], dtype=torch.long), [], (PLACEHOLDER,), {})
    with pytest.raises(LayoutError, match="Expected image 0, got image 1"):
        TokenLayout.build(torch.tensor([PLACEHOLDER] * 6), [image(30, 20, 3, 2, index=1)], (PLACEHOLDER,), {})


def test_media_that_cannot_be():
    with pytest.raises(LayoutError, match="at least 1 x 1 pixel; got 0 x 5"):
        ImageMedia(0, 5)
    with pytest.raises(LayoutError, match="got 3 frames and 2 times"):
        VideoMedia(4, 4, 3, (0.0, 1.0))


def test_it_says_briefly_what_it_is():
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


def test_a_hundred_thousand_tokens_are_no_matter():
    times = tuple(float(t) for t in range(400))
    item = video(1920, 1080, 25, 20, times=times, per_step=2)
    start = time.perf_counter()
    found = layout(item)
    found.target(Tube({t: (i, 0, i + 300, 400) for i, t in enumerate(item.times_s)}))
    found.to_image(torch.zeros(len(found)), video=0, frame=7)
    repr(found.padded(left=100))
    assert len(found) > 100_000 and time.perf_counter() - start < 10
