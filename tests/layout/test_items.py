"""Images and videos, and their tokens."""

import pytest
import torch

from helpers.layout_pieces import PLACEHOLDER, image, video
from hooked_mllm.errors import LayoutError
from hooked_mllm.layout import ImageMedia, TokenLayout, VideoMedia


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


def test_items_are_numbered_within_their_kind():
    images = [image(9, 9, 1, 1, index=i) for i in (0, 1)]
    clips = [video(20, 10, 2, 1, times=(0.0, 1.0), index=i) for i in (0, 1)]
    items = [images[0], clips[0], images[1], clips[1]]
    tokens = torch.tensor([PLACEHOLDER] * sum(map(len, items)))
    assert TokenLayout.build(tokens, items, (PLACEHOLDER,), {}).items == tuple(items)
    with pytest.raises(LayoutError, match="Expected video 0, got video 1"):
        TokenLayout.build(tokens, [images[0], clips[1], images[1], clips[0]], (PLACEHOLDER,), {})


def test_an_item_has_a_name_and_a_number_of_frames():
    item = video(20, 10, 2, 1, times=(0.0, 1.0, 2.5), index=3)
    assert (item.name, item.n_frames, len(item)) == ("video 3", 3, 3 * 2 + 1)
    assert repr(image(30, 20, 3, 2)) == "VisualItem(image 0, 30x20 px, 6 tokens)" and image(30, 20, 3, 2).n_frames == 0


@pytest.mark.parametrize("wrong", ["boxes", "frames", "views"])
def test_boxes_frames_and_views_are_of_the_same_tokens(wrong):
    item = image(30, 20, 3, 2)
    object.__setattr__(item, wrong, getattr(item, wrong)[:-1])  # the tests' type checks would stop the constructor
    with pytest.raises(LayoutError, match=r"image 0 needs boxes \[token 4\], frames \[token 2\] and views \[token\]"):
        item.__post_init__()
