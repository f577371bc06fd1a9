"""The images and videos of a prompt, and what each of their visual tokens sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Int8

from hooked_mllm.checks import checked
from hooked_mllm.errors import LayoutError


@checked
@dataclass(frozen=True)
class ImageMedia:
    """The size of one original image, in pixels."""

    width: int
    height: int

    def __post_init__(self) -> None:
        _check_size(self.width, self.height, "An image")


@checked
@dataclass(frozen=True)
class VideoMedia:
    """The size of one original video, and the time of each frame that the model receives, in seconds."""

    width: int
    height: int
    n_frames: int
    times_s: tuple[float | int, ...]

    def __post_init__(self) -> None:
        _check_size(self.width, self.height, "A video")
        if self.n_frames < 1 or len(self.times_s) != self.n_frames:
            raise LayoutError(
                "A video needs one time for each of its frames; "
                f"got {self.n_frames} frames and {len(self.times_s)} times."
            )


#: the originals of one sample, in prompt order
Media = tuple[ImageMedia | VideoMedia, ...]


class View(IntEnum):
    """The rendering of the original from which a visual token was computed.

    `NONE`: none, as for newline tokens. `WHOLE`: the only view of an image. `BASE` and `HIGHRES`: LLaVA-OneVision's
    squashed overview and its tiled grid. `THUMBNAIL` and `TILE`: InternVL's. `FRAME`: frames of a video.
    """

    NONE = 0
    WHOLE = 1
    BASE = 2
    HIGHRES = 3
    THUMBNAIL = 4
    TILE = 5
    FRAME = 6


@checked
@dataclass(frozen=True, eq=False)
class VisualItem:
    """What the visual tokens of one image or video see, in the order of the tokens.

    Attributes:
        index: Its number within its kind, from 0, in prompt order.
        width: The width of the original, in pixels.
        height: The height of the original, in pixels.
        boxes: x0, y0, x1, y1 in original pixels (pixel i spans [i, i + 1]); NaN for a token that sees no pixel.
        frames: The first and the last frame that the token sees, both included; -1 for images and newline tokens.
        times_s: The time of each frame of a video, in seconds; empty for an image.
    """

    kind: Literal["image", "video"]
    index: int
    width: int
    height: int
    boxes: Float[np.ndarray, "token 4"]
    frames: Int[np.ndarray, "token 2"]
    views: Int8[np.ndarray, " token"]
    times_s: tuple[float | int, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.boxes)
        if self.boxes.shape != (n, 4) or self.frames.shape != (n, 2) or self.views.shape != (n,):
            raise LayoutError(
                f"{self.name} needs boxes [token 4], frames [token 2] and views [token] of one length; "
                f"got {self.boxes.shape}, {self.frames.shape} and {self.views.shape}."
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        return f"VisualItem({self.name}, {self.width}x{self.height} px, {len(self)} tokens)"

    @property
    def name(self) -> str:
        """For example "image 0"."""
        return f"{self.kind} {self.index}"

    @property
    def n_frames(self) -> int:
        """Number of frames of a video that the model receives; 0 for an image."""
        return len(self.times_s)


@dataclass(frozen=True, eq=False)
class Patches:
    """What the positions of a vision tower see: pixels, frames and a `View`, as in `VisualItem`.

    Boxes are NaN for a class token, and for a patch that sees only padding.
    """

    boxes: Float[np.ndarray, "row pos 4"]
    frames: Int[np.ndarray, "row 2"]
    views: Int8[np.ndarray, " row"]


def find_item(items: Sequence[VisualItem], image: int | None, video: int | None) -> int:
    """The index in `items` of an image or of a video."""
    if (image is None) == (video is None):
        raise LayoutError(f"Name one image or one video; got image={image}, video={video}.")
    kind, index = ("image", image) if image is not None else ("video", video)
    if not items:
        raise LayoutError(f"This input has no visual tokens, so there is no {kind} {index}.")
    for number, item in enumerate(items):
        if (item.kind, item.index) == (kind, index):
            return number
    n = sum(item.kind == kind for item in items)
    available = f"{n} of them, numbered from 0" if n else "none"
    raise LayoutError(f"There is no {kind} {index}: this input has {available}.")


def find_view(item: VisualItem, view: str) -> View:
    """A view of an item by its lower-case name."""
    available = [v.name.lower() for v in View if v and (item.views == v).any()]
    if view not in available:
        raise LayoutError(f"{item.name} has no view {view!r}; it has {', '.join(available)}.")
    return View[view.upper()]


def _check_size(width: int, height: int, what: str) -> None:
    if width < 1 or height < 1:
        raise LayoutError(f"{what} must be at least 1 x 1 pixel; got {width} x {height}.")
