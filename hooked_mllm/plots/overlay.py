"""Token values painted over the image or frame that the tokens see."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from PIL import Image

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.layout import Box, Mask, Pages, TokenLayout
from hooked_mllm.layout.regions import as_regions
from hooked_mllm.plots.figure import as_array, colour_scale, new_figure, plain_axes
from hooked_mllm.plots.outline import draw_targets
from hooked_mllm.plots.protocols import Numbers, Pictured


@checked
def overlay(
    sample: Pictured,
    values: Numbers,
    *,
    image: int | None = None,
    video: int | None = None,
    frame: int = 0,
    view: str | None = None,
    target: bool = True,
    title: str | None = None,
    vmin: float | int | None = None,
    vmax: float | int | None = None,
    cmap: str | Colormap | None = None,
    opacity: float | int = 0.85,
) -> Figure:
    """Paint one value per token over an image, or over one frame of a video, with a colour bar.

    The picture is grey; the larger a value, the more its colour covers. Pixels that no token sees stay grey.

    Args:
        sample: What `HookedMLLM.prepare` returned for one question.
        values: [pos], one number per position of the sample, such as a row of a pattern; NaN paints nothing.
        image: Number of the image; by default that of the target, or else the first.
        video: Number of the video, instead of an image.
        frame: Of a video, which of the frames given to the model.
        view: Of an image seen several times (tiles and thumbnail), the view to paint; the finest by default.
        target: Outline the sample's target region.
        title: Above the picture.
        vmin: Lower end of the colours.
        vmax: Upper end of the colours.
        cmap: Colour map of matplotlib.
        opacity: Of the largest value's colour, in (0, 1].

    Raises:
        InputError: For a sample without pictures, or an opacity out of range.
        LayoutError: For another number of values than positions, or no such image, video, frame or view.
        NumericsError: For infinite values.

    Examples:
        ```python
        row = cache.pattern(13, queries="last")[0, 5, 0]      # head 5 of layer 13: [key]
        overlay(sample, row).savefig("L13H5.png")
        ```
    """
    picture: dict[str, Any] = {"image": image, "video": video, "frame": frame, "view": view, "target": target}
    colours: dict[str, Any] = {"vmin": vmin, "vmax": vmax, "cmap": cmap, "opacity": opacity}
    return overlay_grid(sample, {title or "": values}, **picture, **colours, columns=1, panel=5.0)


@checked
def overlay_grid(
    sample: Pictured,
    values: Mapping[str, Numbers],
    *,
    image: int | None = None,
    video: int | None = None,
    frame: int = 0,
    view: str | None = None,
    target: bool = True,
    columns: int = 4,
    title: str | None = None,
    vmin: float | int | None = None,
    vmax: float | int | None = None,
    cmap: str | Colormap | None = None,
    opacity: float | int = 0.85,
    panel: float | int = 2.6,
) -> Figure:
    """Several `overlay`s of one picture side by side on one colour scale, such as the top heads'.

    Args:
        sample: As for `overlay`.
        values: Title of each panel -> [pos].
        image: Number of the image; by default that of the target, or else the first.
        video: Number of the video, instead of an image.
        frame: Of a video, which of the frames given to the model.
        view: Of an image seen several times, the view to paint; the finest by default.
        target: Outline the sample's target region.
        columns: Panels in a row, at most.
        title: Above all panels.
        vmin: Lower end of the colours of all panels.
        vmax: Upper end of the colours of all panels.
        cmap: Colour map of matplotlib.
        opacity: Of the largest value's colour, in (0, 1].
        panel: Longer side of a panel, inches.

    Raises:
        InputError: For nothing to draw, no pictures, or columns or opacity out of range.
        LayoutError, NumericsError: As for `overlay`.
    """
    if not values:
        raise InputError("nothing to draw: expected at least one panel of values")
    if columns < 1 or not 0 < opacity <= 1:
        raise InputError(f"expected columns >= 1 and 0 < opacity <= 1, got {columns=}, {opacity=}")
    image, video = picture_of(sample, image, video)
    painted = {
        name: sample.layout.to_image(as_array(v, f"values {name!r}"), image=image, video=video, frame=frame, view=view)
        for name, v in values.items()
    }
    picture = np.asarray(picture_at(sample, image, video, frame).convert("L"))  # [height width]
    colours, norm = colour_scale(np.stack(list(painted.values())), vmin, vmax, cmap)
    columns = min(columns, len(painted))
    n_rows = -(-len(painted) // columns)
    height, width = (panel * n / max(picture.shape) for n in picture.shape)
    figure = new_figure(columns * width + 0.9, n_rows * (height + 0.3) + (0.3 if title else 0.0), title)
    grid = figure.subplots(n_rows, columns, squeeze=False).ravel()
    for axes in grid[len(painted) :]:
        axes.remove()
    for axes, (name, pixels) in zip(grid, painted.items(), strict=False):
        _draw(axes, picture, pixels, colours, norm, opacity)
        axes.set_title(name, fontsize="medium")
        if target:
            draw_targets(axes, sample, image, video, frame)
    figure.colorbar(ScalarMappable(norm, colours), ax=list(grid[: len(painted)]), shrink=0.9, aspect=30)
    return figure


def _draw(
    axes: Axes, picture: np.ndarray, pixels: np.ndarray, colours: str | Colormap, norm: Normalize, opacity: float
) -> None:
    """Grey picture below, values above: the farther a value is from zero, the less shines through."""
    height, width = pixels.shape
    extent = (0.0, float(width), float(height), 0.0)  # pixel i spans [i, i + 1], as in the layout's boxes
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="nearest")
    strength = np.abs(pixels) / max(abs(norm.vmin or 0.0), abs(norm.vmax or 0.0))
    alpha = np.nan_to_num(opacity * (0.12 + 0.88 * np.sqrt(np.clip(strength, 0, 1))))
    shown = np.ma.masked_invalid(pixels)
    axes.imshow(shown, cmap=colours, norm=norm, alpha=alpha, extent=extent, interpolation="nearest")
    axes.set(xlim=(0, width), ylim=(height, 0))
    plain_axes(axes)


def picture_of(sample: Pictured, image: int | None, video: int | None) -> tuple[int | None, int | None]:
    """(image, video): the specified picture, or else that of the target, or else the first."""
    if not isinstance(getattr(sample, "layout", None), TokenLayout):
        raise InputError(f"expected one Sample, got {type(sample).__name__}; of a batch take one, as in batch[0]")
    if image is not None or video is not None:
        return image, video
    if not sample.images and not sample.videos:
        raise InputError("the sample has no images and no videos to paint on")
    for region in [] if sample.target is None else as_regions(sample.target):
        if isinstance(region, Box | Mask):
            return region.image, None
        if isinstance(region, Pages):
            return next(iter(region.images)), None
        return None, region.video
    return (0, None) if sample.images else (None, 0)


def picture_at(sample: Pictured, image: int | None, video: int | None, frame: int) -> Image.Image:
    """An image of the sample, or a frame of one of its videos."""
    try:
        if video is not None:
            return Image.fromarray(sample.videos[video].frames[frame])
        return sample.images[image or 0]
    except IndexError:
        absent = f"image {image}" if video is None else f"frame {frame} of video {video}"
        raise InputError(
            f"There is no {absent}: the sample has {len(sample.images)} images and {len(sample.videos)} videos."
        ) from None
