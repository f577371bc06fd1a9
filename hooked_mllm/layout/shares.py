"""The share of each token's footprint that a union of regions covers, and the pixels that it touches."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_mllm.errors import LayoutError
from hooked_mllm.layout.coverage import Coverage
from hooked_mllm.layout.items import VisualItem, find_item
from hooked_mllm.layout.regions import Box, BoxInput, Corners, Frames, Mask, Pages, Region, Tube, corners


def shares(
    items: Sequence[VisualItem],
    item_of: Int[np.ndarray, " pos"],
    boxes: Float[np.ndarray, "pos 4"],
    frame_range: Int[np.ndarray, "pos 2"],
    regions: Sequence[Region],
) -> Float[np.ndarray, " pos"]:
    """The share of each position's footprint inside the union of `regions`, 0 to 1; 0 without a footprint.

    `boxes` are NaN at positions that see no pixel, `frame_range` has the first and the last frame of each position.
    """
    covered, has_pixels = np.zeros(len(item_of)), ~np.isnan(boxes[:, 0])
    for number, item_regions in regions_by_item(items, regions).items():
        item, positions = items[number], np.flatnonzero(has_pixels & (item_of == number))
        if item.kind == "image":
            covered[positions] = _image_shares(item, item_regions, boxes[positions])
        else:
            covered[positions] = _video_shares(item, item_regions, boxes[positions], frame_range[positions])
    return covered


def regions_by_item(items: Sequence[VisualItem], regions: Sequence[Region]) -> dict[int, list[Region]]:
    """The regions of each image or video, by its index in `items`."""
    by_item: dict[int, list[Region]] = defaultdict(list)
    for region in regions:
        if isinstance(region, Frames | Tube):
            by_item[find_item(items, None, region.video)].append(region)
        else:
            for image in region.images if isinstance(region, Pages) else [region.image]:
                by_item[find_item(items, image, None)].append(region)
    return by_item


def _image_shares(
    item: VisualItem, regions: list[Region], boxes: Float[np.ndarray, "token 4"]
) -> Float[np.ndarray, " token"]:
    if any(isinstance(region, Pages) for region in regions):
        return np.ones(len(boxes))
    masks = [region for region in regions if isinstance(region, Mask)]
    for mask in masks:
        check_mask_shape(item, mask)
    rectangles = [clip_box(item, region) for region in regions if isinstance(region, Box)]
    return Coverage(rectangles, [mask.pixels for mask in masks]).share(boxes)


def _video_shares(
    item: VisualItem,
    regions: list[Region],
    boxes: Float[np.ndarray, "token 4"],
    frame_range: Int[np.ndarray, "token 2"],
) -> Float[np.ndarray, " token"]:
    whole, groups = _boxes_of_frames(item, regions)
    first, after = frame_range[:, 0], frame_range[:, 1] + 1

    def count(frames: Bool[np.ndarray, " frame"], tokens: np.ndarray | slice) -> Int[np.ndarray, " token"]:
        """How many of `frames` each of `tokens` sees."""
        total = np.concatenate([[0], np.cumsum(frames)])  # frames before each index: a range is a difference
        return total[after[tokens]] - total[first[tokens]]

    covered = count(whole, slice(None)).astype(float)
    # tokens sorted by time: two binary searches find those that see a frame
    order = np.argsort(first, kind="stable")
    starts, ends = first[order], np.maximum.accumulate(after[order])
    for rectangles, frames in groups.items():
        in_group = np.zeros(item.n_frames, dtype=bool)
        in_group[frames] = True
        tokens = order[np.searchsorted(ends, min(frames), "right") : np.searchsorted(starts, max(frames), "right")]
        covered[tokens] += count(in_group, tokens) * Coverage(rectangles).share(boxes[tokens])
    return covered / (after - first)  # the mean over the frames that a token sees


def _boxes_of_frames(
    item: VisualItem, regions: list[Region]
) -> tuple[Bool[np.ndarray, " frame"], dict[tuple[Corners, ...], list[int]]]:
    """Which frames of a video are covered whole, and the other frames grouped by the boxes that cover them."""
    whole, frame_boxes = np.zeros(item.n_frames, dtype=bool), defaultdict(list)
    for frame, box in (pair for region in regions for pair in boxes_in_frames(item, region)):
        if box is None:
            whole[frame] = True
        else:
            frame_boxes[frame].append(box)
    # frames with equal boxes are measured once
    groups: dict[tuple[Corners, ...], list[int]] = defaultdict(list)
    for frame, rectangles in frame_boxes.items():
        if not whole[frame]:
            groups[tuple(sorted(set(rectangles)))].append(frame)
    return whole, groups


def check_mask_shape(item: VisualItem, mask: Mask) -> None:
    """Raise a LayoutError for a mask of another size than its image."""
    if mask.pixels.shape != (item.height, item.width):
        raise LayoutError(
            f"A mask of {item.name} must have its shape [height width] = ({item.height}, {item.width}); "
            f"got {mask.pixels.shape}."
        )


def clip_box(item: VisualItem, box: BoxInput) -> Corners:
    """The part of a box that lies in the picture; a LayoutError when no part does."""
    box = corners(box)
    x0, y0, x1, y1 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(item.width)), min(box[3], float(item.height))
    if x0 >= x1 or y0 >= y1:
        raise LayoutError(
            f"The box {box} lies outside {item.name}, which is {item.width} x {item.height} "
            "pixels. Give x0, y0, x1, y1 in pixels of the original."
        )
    return x0, y0, x1, y1


def frames_within(item: VisualItem, region: Frames) -> Int[np.ndarray, " frame"]:
    """The indices of a video's frames whose time lies in the region; a LayoutError when there is none."""
    times = np.asarray(item.times_s)
    start = -np.inf if region.start_s is None else float(region.start_s)
    end = np.inf if region.end_s is None else float(region.end_s)
    # a tolerance for the rounding of times, so that frames at the ends are included
    frames = np.flatnonzero((times >= start - 1e-6) & (times <= end + 1e-6))
    if len(frames):
        return frames
    if math.isnan(start) or math.isnan(end):
        raise LayoutError(f"Expected times in seconds; got {start:g} to {end:g} s.")
    if start > times.max() or end < times.min():
        raise LayoutError(
            f"{start:g} to {end:g} s lies outside {item.name}: its {item.n_frames} frames lie from {times.min():g} "
            f"to {times.max():g} s."
        )
    after = int(np.searchsorted(times, start))
    raise LayoutError(
        f"No frame of {item.name} lies from {start:g} to {end:g} s; the nearest are at {times[after - 1]:g} and "
        f"{times[after]:g} s. Widen the interval or give the model more frames per second."
    )


def boxes_in_frames(item: VisualItem, region: Region) -> Sequence[tuple[int, Corners | None]]:
    """Each frame that `Frames` or a `Tube` covers, with its box in the picture; None for a whole frame."""
    if isinstance(region, Frames):
        frames = frames_within(item, region).tolist()
        clipped_box = None if region.box is None else clip_box(item, region.box)
        return [(frame, clipped_box) for frame in frames]
    assert isinstance(region, Tube)  # other regions lie in images
    frame_boxes = ((frame, region.at(float(time))) for frame, time in enumerate(item.times_s))
    clipped = [(frame, clip_box(item, box)) for frame, box in frame_boxes if box is not None]
    if not clipped:
        times = [time for time, box in region.boxes.items() if box is not None]
        raise LayoutError(
            f"The tube has boxes from {times[0]:g} to {times[-1]:g} s, at none of the times of {item.name}'s frames: "
            f"{item.n_frames} frames from {min(item.times_s):g} to {max(item.times_s):g} s."
        )
    return clipped


def rectangle(item: VisualItem, box: BoxInput) -> tuple[slice, slice]:
    """Rows and columns of all pixels that a box touches; the part outside the picture is cut off."""
    x0, y0, x1, y1 = clip_box(item, box)
    return slice(math.floor(y0), math.ceil(y1)), slice(math.floor(x0), math.ceil(x1))


def pixel_masks(
    items: Sequence[VisualItem], regions: Sequence[Region]
) -> dict[int, Bool[np.ndarray, "*frame height width"]]:
    """The pixels that the union of `regions` touches, by the index in `items` of their image or video.

    `[height width]` of an image, `[frame height width]` of a video.
    """
    masks: dict[int, np.ndarray] = {}
    for number, item_regions in regions_by_item(items, regions).items():
        item = items[number]
        shape = (item.height, item.width) if item.kind == "image" else (item.n_frames, item.height, item.width)
        mask = masks[number] = np.zeros(shape, dtype=bool)
        for region in item_regions:
            if isinstance(region, Pages):
                mask[:] = True
            elif isinstance(region, Box):
                mask[rectangle(item, region)] = True
            elif isinstance(region, Mask):
                check_mask_shape(item, region)
                mask |= region.pixels
            else:
                for frame, box in boxes_in_frames(item, region):
                    mask[frame][... if box is None else rectangle(item, box)] = True
    return masks
