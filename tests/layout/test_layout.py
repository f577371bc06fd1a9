"""What every position is, padding, chance, and names."""

import time

import numpy as np
import pytest
import torch

from helpers.layout_pieces import image, layout, two_views, video
from hooked_mllm.errors import LayoutError
from hooked_mllm.layout import Box, Kind, Tube


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


def test_the_times_of_frame_pairs():
    found = layout(video(20, 10, 1, 1, times=(0.0, 0.4, 1.0, 1.4, 2.0), per_step=2))
    times = found.times[found.visual].tolist()
    assert times[:3] == pytest.approx([0.2, 1.2, 2.0]) and np.isnan(times[3])
    assert found.times[found.text].isnan().all()


def test_names_of_positions():
    with pytest.raises(LayoutError, match="Did you mean 'question'"):
        layout(image(30, 20, 3, 2)).mask("questions")


def test_a_hundred_thousand_tokens_are_no_matter():
    times = tuple(float(t) for t in range(400))
    item = video(1920, 1080, 25, 20, times=times, per_step=2)
    start = time.perf_counter()
    found = layout(item)
    found.target(Tube({t: (i, 0, i + 300, 400) for i, t in enumerate(item.times_s)}))
    found.to_image(torch.zeros(len(found)), video=0, frame=7)
    repr(found.padded(left=100))
    assert len(found) > 100_000 and time.perf_counter() - start < 10


def test_a_region_is_a_mask_as_its_tokens_are():
    two = layout(image(40, 40, 2, 2), image(40, 40, 2, 2, index=1))
    for region in (Box(1, 1, 2, 2), [Box(1, 1, 2, 2), Box(0, 0, 1, 1, image=1)]):
        assert torch.equal(two.mask(region), two.target(region)) and two.mask(region).any()
    with pytest.raises(LayoutError, match="no image 2"):
        two.mask(Box(1, 1, 2, 2, image=2))
