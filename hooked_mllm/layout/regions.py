"""Regions of images and videos, in pixels and seconds of the original."""

import math
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hooked_mllm.checks import checked, numbers
from hooked_mllm.errors import LayoutError

Number = float | int | np.floating | np.integer
Corners = tuple[float, float, float, float]


if TYPE_CHECKING:
    #: a rectangle as callers may write it
    BoxInput: TypeAlias = "Box | Sequence[Number]"
    #: one region or several, as callers may write them
    RegionInput: TypeAlias = "Region | Iterable[Region]"
else:  # at run time any object, so that a wrong one reaches the checks below, whose errors state what is expected
    BoxInput = RegionInput = object


def corners(box: BoxInput, what: str = "A box") -> Corners:
    """Four finite numbers x0 < x1, y0 < y1 from a `Box` or a sequence; `what` is how errors name it."""
    values = numbers((box.x0, box.y0, box.x1, box.y1) if isinstance(box, Box) else box, what)
    if values.shape != (4,):
        raise LayoutError(f"{what} is (x0, y0, x1, y1) in pixels of the original; got {values.size} numbers.")
    x0, y0, x1, y1 = values.tolist()
    if not all(math.isfinite(v) for v in (x0, y0, x1, y1)):
        raise LayoutError(f"{what} needs finite coordinates; got {(x0, y0, x1, y1)}.")
    if x0 >= x1 or y0 >= y1:
        raise LayoutError(
            f"{what} is (x0, y0, x1, y1) with x0 < x1 and y0 < y1; got {(x0, y0, x1, y1)}. "
            "From x, y, width, height: Box.from_xywh."
        )
    return x0, y0, x1, y1


def _warn_of_fractions(box: BoxInput) -> None:
    """Warn of a box like (0.2, 0.3, 0.4, 0.5). Box(0, 0, 1, 1) is a pixel, Box(0.0, 0.0, 1.0, 1.0) gives a warning."""
    is_box = isinstance(box, Box)
    values = (box.x0, box.y0, box.x1, box.y1) if is_box else tuple(box)  # a tuple may be that of `corners`, all floats
    whole = all(isinstance(v, int | np.integer) or (not is_box and float(v).is_integer()) for v in values)
    if all(0 <= v <= 1 for v in values) and not whole:
        warnings.warn(
            f"The box {tuple(float(v) for v in values)} lies in one pixel, the first: boxes are in pixels of the "
            "original. If these are fractions of its size, use Box.from_fractions(x0, y0, x1, y1, width, height).",
            stacklevel=4,  # the line that makes the region: this function, __post_init__, __init__
        )


def _check_size(what: str, width: Number, height: Number) -> None:
    if not (width > 0 and height > 0):
        raise LayoutError(f"The {what} needs a positive width and height in pixels; got {width} x {height}.")


@checked
@dataclass(frozen=True)
class Box:
    """A rectangle of an image: [x0, x1] x [y0, y1] in pixels of the original, x to the right, y down.

    The original is the upright picture: one with an EXIF orientation is turned first, so that boxes are in the axes in
    which it is shown, not in those of the file. The part outside the image is cut off; a box wholly outside is an
    error. A box within [0, 1] that is not of whole numbers gives a warning: it is probably in fractions.

    Examples:
        >>> Box(412, 230, 520, 371)
        Box(x0=412, y0=230, x1=520, y1=371, image=0)
    """

    x0: Number
    y0: Number
    x1: Number
    y1: Number
    image: int = 0

    def __post_init__(self) -> None:
        corners(self)
        _warn_of_fractions(self)

    @classmethod
    def from_xywh(cls, x: Number, y: Number, width: Number, height: Number, image: int = 0) -> "Box":
        """A box from its upper left corner and its size in pixels, as in COCO: [x, x + width] x [y, y + height].

        Args:
            x: The left edge.
            y: The upper edge.
            width: The width, positive.
            height: The height, positive.
            image: The number of the image.

        Raises:
            LayoutError: For a size that is not positive, or numbers that are not finite.

        Examples:
            >>> Box.from_xywh(412, 230, 108, 141)
            Box(x0=412, y0=230, x1=520, y1=371, image=0)
        """
        _check_size("box", width, height)
        return cls(x, y, x + width, y + height, image)

    @classmethod
    def from_fractions(
        cls, x0: Number, y0: Number, x1: Number, y1: Number, width: Number, height: Number, image: int = 0
    ) -> "Box":
        """A box from fractions of the picture's size: [x0 width, x1 width] x [y0 height, y1 height].

        Args:
            x0: The left edge, from 0 to 1.
            y0: The upper edge, from 0 to 1.
            x1: The right edge, from 0 to 1.
            y1: The lower edge, from 0 to 1.
            width: The width of the upright picture in pixels.
            height: Its height in pixels.
            image: The number of the image.

        Raises:
            LayoutError: For fractions outside of 0 to 1, an empty box, or a size that is not positive.

        Examples:
            >>> Box.from_fractions(0.25, 0.5, 0.75, 1.0, width=640, height=480)
            Box(x0=160.0, y0=240.0, x1=480.0, y1=480.0, image=0)
        """
        _check_size("picture", width, height)
        if not all(0 <= v <= 1 for v in (x0, y0, x1, y1)):
            raise LayoutError(
                f"Fractions lie in 0 to 1; got {(x0, y0, x1, y1)}. Divide coordinates from 0 to 1000 by 1000, and give "
                "pixels to Box(x0, y0, x1, y1)."
            )
        return cls(x0 * width, y0 * height, x1 * width, y1 * height, image)

    @classmethod
    def from_points(cls, points: Iterable[Iterable[Number]], image: int = 0) -> "Box":
        """The smallest box that contains points, such as two opposite corners in any order, or a polygon.

        Args:
            points: Pairs (x, y) in pixels, at least two that differ in x and in y.
            image: The number of the image.

        Raises:
            LayoutError: For what is not a pair of numbers, or points that span no area.

        Examples:
            >>> Box.from_points([(520, 230), (412, 371)])
            Box(x0=412, y0=230, x1=520, y1=371, image=0)
        """
        try:
            x, y = zip(*((px, py) for px, py in points), strict=True)
        except (TypeError, ValueError):
            raise LayoutError(f"Points are pairs (x, y) of numbers in pixels, two or more; got {points!r}.") from None
        return cls(min(x), min(y), max(x), max(y), image)


@checked
@dataclass(frozen=True, eq=False)
class Mask:
    """The true pixels of a boolean array `[height width]` of the original image's size.

    Examples:
        >>> Mask(np.eye(3, dtype=bool))
        Mask(3 of 9 pixels, image=0)
    """

    pixels: np.ndarray  # [height width], checked below
    image: int = 0

    def __post_init__(self) -> None:
        pixels = np.asarray(self.pixels)
        if pixels.ndim != 2:
            raise LayoutError(f"A mask is one boolean array [height width]; got shape {pixels.shape}.")
        if pixels.dtype != bool:
            if not np.isin(pixels, (0, 1)).all():
                raise LayoutError(
                    f"A mask contains True and False (or 1 and 0); got {pixels.dtype} with other values. "
                    "Compare first, as in `labels == 7`."
                )
            pixels = pixels.astype(bool)
        if not pixels.any():
            raise LayoutError("The mask is empty: none of its pixels is true.")
        object.__setattr__(self, "pixels", pixels)

    def __repr__(self) -> str:
        return f"Mask({int(self.pixels.sum())} of {self.pixels.size} pixels, image={self.image})"


@checked
@dataclass(frozen=True)
class Frames:
    """The frames of a video whose time lies in [start_s, end_s], whole or within a box.

    `None` leaves that end open. The times are those of the frames that the model receives.

    Examples:
        >>> Frames(start_s=2.0, end_s=4.5)
        Frames(start_s=2.0, end_s=4.5, video=0, box=None)
    """

    start_s: Number | None = None
    end_s: Number | None = None
    video: int = 0
    box: BoxInput | None = None

    def __post_init__(self) -> None:
        if self.start_s is not None and self.end_s is not None and self.start_s > self.end_s:
            raise LayoutError(f"Frames need start_s <= end_s; got {self.start_s} and {self.end_s} seconds.")
        if self.box is not None:
            box = corners(self.box)
            if not isinstance(self.box, Box):  # which warns itself
                _warn_of_fractions(self.box)
            object.__setattr__(self, "box", box)


@checked
@dataclass(frozen=True)
class Tube:
    """A box that moves: time in seconds -> (x0, y0, x1, y1) in pixels of the original, or `None` where it is absent.

    Between two times the box is interpolated linearly. Before the first time, after the last and next to a `None` there
    is no box.

    Examples:
        >>> Tube({0.0: (0, 0, 10, 10), 2.0: (20, 0, 30, 10)}).at(1.0)
        (10.0, 0.0, 20.0, 10.0)
    """

    boxes: Mapping[Any, BoxInput | None]  # sorted by time, with `Corners` as values, once the tube is made
    video: int = 0

    def __post_init__(self) -> None:
        times = numbers(list(self.boxes), "the times of a tube")
        if not np.isfinite(times).all():
            raise LayoutError(f"The times of a tube are finite numbers of seconds; got {list(self.boxes)}.")
        pairs = sorted(zip(times.tolist(), self.boxes.values(), strict=True), key=lambda pair: pair[0])
        boxes = {t: None if b is None else corners(b, f"The box at {t} s") for t, b in pairs}
        if not any(boxes.values()):
            raise LayoutError("A tube needs a box at one time or more; got none.")
        for box in self.boxes.values():
            if box is not None:
                _warn_of_fractions(box)
        object.__setattr__(self, "boxes", boxes)

    def at(self, time_s: Number, slack_s: Number = 1e-3) -> Corners | None:
        """The box at a time, or `None`; times that differ by at most `slack_s` count as equal."""
        times = list(self.boxes)
        after = bisect_left(times, time_s)
        for near in times[max(after - 1, 0) : after + 1]:
            if abs(near - time_s) <= slack_s:
                box = self.boxes[near]
                return None if box is None else corners(box)
        if after in (0, len(times)):
            return None
        t0, t1 = times[after - 1], times[after]
        earlier, later = self.boxes[t0], self.boxes[t1]
        if earlier is None or later is None:
            return None
        share = (time_s - t0) / (t1 - t0)
        x0, y0, x1, y1 = (a + share * (b - a) for a, b in zip(corners(earlier), corners(later), strict=True))
        return x0, y0, x1, y1


@checked
@dataclass(frozen=True)
class Pages:
    """Whole images, by their numbers from 0 in prompt order.

    Examples:
        >>> Pages({3, 7})
        Pages(images=(3, 7))
    """

    images: Iterable[int]

    def __post_init__(self) -> None:
        images = tuple(sorted({int(i) for i in self.images}))
        if not images:
            raise LayoutError("Pages needs at least one image: give their numbers from 0, as in Pages({3, 7}).")
        object.__setattr__(self, "images", images)


Region = Box | Mask | Frames | Tube | Pages


def as_regions(region: RegionInput) -> list[Region]:
    """One region or several, as a list of at least one."""
    regions = list(region) if isinstance(region, Iterable) else [region]
    if not regions:
        raise LayoutError("The list of regions is empty: give at least one region.")
    for item in regions:
        if not isinstance(item, Box | Mask | Frames | Tube | Pages):
            raise LayoutError(
                f"A region is a Box, Mask, Frames, Tube or Pages, or a list of them; got {type(item).__name__}."
            )
    return regions


def moved(region: Region, image: int | None, video: int | None) -> Region:
    """The same region in another image or video, if `image` or `video` is specified."""
    if image is None and video is None:
        return region
    if image is not None and video is not None:
        raise LayoutError(f"Name one image or one video; got image={image}, video={video}.")
    if isinstance(region, Pages):
        raise LayoutError("Pages contains the numbers of its images: leave out image= and video=.")
    if isinstance(region, Box | Mask):
        if image is not None:
            return replace(region, image=image)
        if isinstance(region, Box):
            return Frames(video=video or 0, box=region)
        raise LayoutError("A Mask lies in an image. For a video use Frames(..., box=...) or Tube(...).")
    if video is None:
        raise LayoutError(f"{type(region).__name__} lies in a video: use video=, not image=.")
    return replace(region, video=video)
