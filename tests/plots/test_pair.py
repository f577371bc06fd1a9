import numpy as np
import pytest
import torch

from helpers.tiny import tiny_frames, tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import Box, Frames, Video
from hooked_mllm.corruptions import MeanRegion, OtherQuestion
from hooked_mllm.errors import InputError
from hooked_mllm.plots import pair


def drawn(figure):
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def test_both_pictures_are_drawn_with_the_target_outlined():
    model = wrapped("qwen3_vl")
    images = [tiny_image(32, 24, 0), tiny_image(32, 24, 1)]
    clean = model.prepare("What is it?", images=images, target=Box(4, 4, 12, 10, image=1))
    corrupted = MeanRegion()(model, clean)
    figure = pair(clean, corrupted, title="mean")
    for shown, sample in zip(drawn(figure), (clean, corrupted), strict=True):
        np.testing.assert_array_equal(shown, np.asarray(sample.images[1]))  # the target's picture
    assert [axes.get_title() for axes in figure.axes] == ["clean: What is it?", "corrupted: What is it?"]
    outlines = [[p.get_bbox().extents.tolist() for p in axes.patches] for axes in figure.axes]
    assert outlines == [[[4, 4, 12, 10]]] * 2
    first = pair(clean, corrupted, image=0, target=False)
    np.testing.assert_array_equal(*drawn(first))  # only the second was changed
    assert not any(axes.patches for axes in first.axes)
    other = pair(clean, OtherQuestion("And this?")(model, clean))
    assert other.axes[1].get_title() == "corrupted: And this?"


def test_frames_of_a_video():
    model, clip = wrapped("qwen3_vl"), Video.from_frames(tiny_frames(4), fps=2)
    clean = model.prepare("What is it?", videos=[clip], target=Frames(0.4, 1.1))
    corrupted = MeanRegion()(model, clean)
    for frame in (0, 1):
        shown = drawn(pair(clean, corrupted, frame=frame))
        np.testing.assert_array_equal(shown[0], clip.frames[frame])
        assert (shown[0] == shown[1]).all() == (frame == 0)


def test_what_is_not_there_is_rejected():
    model = wrapped("qwen3_vl")
    clean = model.prepare("What is it?", images=tiny_image())
    with pytest.raises(InputError, match="There is no image 3: the sample has 1 images and 0 videos"):
        pair(clean, clean, image=3)
    with pytest.raises(InputError, match="There is no frame 0 of video 0"):
        pair(clean, clean, video=0)
    with pytest.raises(InputError, match="expected one Sample"):
        pair(clean, {"input_ids": torch.tensor([[1]])})
    with pytest.raises(InputError, match="no images and no videos"):
        pair(model.prepare("What is it?"), clean)
