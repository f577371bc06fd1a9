"""A sample and its corrupted counterpart, side by side."""

import numpy as np
from matplotlib.figure import Figure

from hooked_mllm.checks import checked
from hooked_mllm.plots.figure import new_figure, plain_axes
from hooked_mllm.plots.outline import draw_targets
from hooked_mllm.plots.overlay import picture_at, picture_of
from hooked_mllm.plots.protocols import Pictured


@checked
def pair(
    clean: Pictured,
    corrupted: Pictured,
    *,
    image: int | None = None,
    video: int | None = None,
    frame: int = 0,
    target: bool = True,
    title: str | None = None,
    panel: float | int = 3.2,
) -> Figure:
    """One picture of a sample and the same of its corrupted counterpart, each under its question.

    Args:
        clean: The sample.
        corrupted: What a corruption made of it.
        image: Number of the image; by default that of the target, or else the first.
        video: Number of the video, instead of an image.
        frame: Of a video, which of the frames given to the model.
        target: Outline the sample's target region.
        title: Above both.
        panel: Longer side of a picture, inches.

    Raises:
        InputError: For anything else than samples, or samples without this picture.

    Examples:
        >>> from hooked_mllm import HookedMLLM, corruptions, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> len(pair(sample, corruptions.MeanRegion()(model, sample)).axes)
        2
    """
    image, video = picture_of(clean, image, video)
    picture_of(corrupted, image, video)
    samples = {"clean": clean, "corrupted": corrupted}
    pictures = [np.asarray(picture_at(sample, image, video, frame)) for sample in samples.values()]
    sides = pictures[0].shape[:2]
    height, width = (panel * n / max(sides) for n in sides)
    figure = new_figure(2 * width + 0.4, height + 0.5 + (0.3 if title else 0.0), title)
    for axes, (name, sample), pixels in zip(figure.subplots(1, 2), samples.items(), pictures, strict=True):
        height_px, width_px = pixels.shape[:2]
        # pixel i spans [i, i + 1], as in the layout's boxes
        axes.imshow(pixels, extent=(0.0, float(width_px), float(height_px), 0.0), interpolation="nearest")
        axes.set_title(f"{name}: {sample.question}", fontsize="medium", wrap=True, parse_math=False)
        if target:
            draw_targets(axes, sample, image, video, frame)
        plain_axes(axes)
    return figure
