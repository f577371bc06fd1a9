"""The share of every token's footprint that a union of regions covers."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from hooked_mllm.errors import LayoutError
from hooked_mllm.layout.coverage import Coverage
from hooked_mllm.layout.find import find_item
from hooked_mllm.layout.items import VisualItem
from hooked_mllm.layout.regions import Box, Corners, Frames, Mask, Pages, Region, Tube, corners


def shares(
    items: Sequence[VisualItem],
    item_of: Int[np.ndarray, " pos"],
    boxes: Float[np.ndarray, "pos 4"],
    frame_range: Int[np.ndarray, "pos 2"],
    regions: Sequence[Region],
) -> Float[np.ndarray, " pos"]:
    """For every position the share of its footprint inside the union of `regions`, 0 to 1; 0 without a footprint.

    Raises:
        LayoutError: no such image or video, or a region outside of it.
    """
    of_item: dict[int, list[Region]] = defaultdict(list)
    for region in regions:
        if isinstance(region, Pages):
            for image in region.images:
                of_item[find_item(items, image, None)].append(region)
        elif isinstance(region, Box | Mask):
            of_item[find_item(items, region.image, None)].append(region)
        else:
            of_item[find_item(items, None, region.video)].append(region)
    out, pixels = np.zeros(len(item_of)), ~np.isnan(boxes[:, 0])
    for number, its in of_item.items():
        item, at = items[number], np.flatnonzero(pixels & (item_of == number))
        if item.kind == "image":
            out[at] = _image_shares(item, its, boxes[at])
        else:
            out[at] = _video_shares(item, its, boxes[at], frame_range[at])
    return out


def _image_shares(item: VisualItem, regions: list[Region], boxes: np.ndarray) -> Float[np.ndarray, " token"]:
    if any(isinstance(r, Pages) for r in regions):
        return np.ones(len(boxes))
    for r in regions:
        if isinstance(r, Mask) and r.pixels.shape != (item.height, item.width):
            raise LayoutError(
                f"A mask of {item.name} must have its shape [height width] = ({item.height}, {item.width}); "
                f"got {r.pixels.shape}."
            )
    rectangles = [inside(item, corners(r)) for r in regions if isinstance(r, Box)]
    masks = [r.pixels for r in regions if isinstance(r, Mask)]
    return _covered(Coverage(rectangles, masks), boxes)


def _video_shares(
    item: VisualItem, regions: list[Region], boxes: np.ndarray, seen: Int[np.ndarray, "token 2"]
) -> Float[np.ndarray, " token"]:
    whole, frame_boxes = np.zeros(item.n_frames, dtype=bool), defaultdict(list)
    for r in regions:
        if isinstance(r, Frames):
            frames = frames_within(item, r)
            if r.box is None:
                whole[frames] = True
                continue
            box = inside(item, r.box)
            for f in frames.tolist():
                frame_boxes[f].append(box)
        elif isinstance(r, Tube):
            for f, box in tube_boxes(item, r):
                frame_boxes[f].append(box)
    # frames with the same boxes are measured once
    groups: dict[tuple[Corners, ...], list[int]] = defaultdict(list)
    for f, its in frame_boxes.items():
        if not whole[f]:
            groups[tuple(sorted(set(its)))].append(f)
    first, after = seen[:, 0], seen[:, 1] + 1

    def count(frames: np.ndarray, at: np.ndarray | slice) -> np.ndarray:
        total = np.concatenate([[0], np.cumsum(frames)])
        return total[after[at]] - total[first[at]]

    covered = count(whole, slice(None)).astype(float)
    # tokens by time, so that a frame finds those that see it without looking at all of them
    order = np.argsort(first, kind="stable")
    starts, ends = first[order], np.maximum.accumulate(after[order])
    for rectangles, frames in groups.items():
        chosen = np.zeros(item.n_frames, dtype=bool)
        chosen[frames] = True
        at = order[np.searchsorted(ends, min(frames), "right") : np.searchsorted(starts, max(frames), "right")]
        covered[at] += count(chosen, at) * _covered(Coverage(rectangles), boxes[at])
    return covered / (after - first)


def _covered(coverage: Coverage, boxes: np.ndarray) -> Float[np.ndarray, " token"]:
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return coverage.area(boxes) / area


def inside(item: VisualItem, box: Corners) -> Corners:
    """The part of a box that lies in the picture.

    Raises:
        LayoutError: when no part does.
    """
    x0, y0, x1, y1 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(item.width)), min(box[3], float(item.height))
    if x0 >= x1 or y0 >= y1:
        raise LayoutError(
            f"The box {box} lies outside {item.name}, which is {item.width} x {item.height} "
            "pixels. Give x0, y0, x1, y1 in pixels of the original."
        )
    return x0, y0, x1, y1


def frames_within(item: VisualItem, region: Frames) -> Int[np.ndarray, " frame"]:
    """The numbers of a video's frames whose time lies in the region.

    Raises:
        LayoutError: when there is none.
    """
    times = np.asarray(item.times_s)
    start = -np.inf if region.start_s is None else float(region.start_s)
    end = np.inf if region.end_s is None else float(region.end_s)
    found = np.flatnonzero((times >= start - 1e-6) & (times <= end + 1e-6))
    if len(found):
        return found
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


def tube_boxes(item: VisualItem, region: Tube) -> list[tuple[int, Corners]]:
    """The frames in which a tube has a box, each with the part of it that lies in the picture.

    Raises:
        LayoutError: when there is none.
    """
    boxes = ((f, region.at(float(t))) for f, t in enumerate(item.times_s))
    found = [(f, inside(item, box)) for f, box in boxes if box is not None]
    if not found:
        times = [t for t, box in region.boxes.items() if box is not None]
        raise LayoutError(
            f"The tube has boxes from {times[0]:g} to {times[-1]:g} s, at none of the times of {item.name}'s frames: "
            f"{item.n_frames} frames from {min(item.times_s):g} to {max(item.times_s):g} s."
        )
    return found
