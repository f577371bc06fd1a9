"""Images, videos and views by number and name."""

import pytest

from helpers.layout_pieces import image, two_views, video
from hooked_mllm.errors import LayoutError
from hooked_mllm.layout import View
from hooked_mllm.layout.items import find_item, find_view

ITEMS = [image(30, 20, 3, 2), video(30, 20, 3, 2, times=(0.0, 1.0)), image(8, 8, 1, 1, index=1)]


@pytest.mark.parametrize(("image_index", "video_index", "place"), [(0, None, 0), (1, None, 2), (None, 0, 1)])
def test_items_are_numbered_by_kind(image_index, video_index, place):
    assert find_item(ITEMS, image_index, video_index) == place


@pytest.mark.parametrize(
    ("items", "image_index", "video_index", "message"),
    [
        (ITEMS, None, None, "Name one image or one video; got image=None, video=None"),
        (ITEMS, 0, 0, "Name one image or one video; got image=0, video=0"),
        (ITEMS, 2, None, "no image 2: this input has 2 of them, numbered from 0"),
        (ITEMS, None, 1, "no video 1: this input has 1 of them"),
        (ITEMS[:1], None, 0, "no video 0: this input has none"),
        ([], 0, None, "no visual tokens, so there is no image 0"),
    ],
)
def test_items_that_are_not_there(items, image_index, video_index, message):
    with pytest.raises(LayoutError, match=message):
        find_item(items, image_index, video_index)


def test_views_by_name():
    item = two_views(40, 40)
    assert (find_view(item, "base"), find_view(item, "highres")) == (View.BASE, View.HIGHRES)
    with pytest.raises(LayoutError, match="image 0 has no view 'none'; it has base, highres"):
        find_view(item, "none")  # newlines are tokens of no view
    with pytest.raises(LayoutError, match="no view 'BASE'"):
        find_view(item, "BASE")
