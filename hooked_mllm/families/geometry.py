"""What the families share on the way from pixels to tokens: grids of rectangles, frames, and prompt order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.errors import LayoutError
from hooked_mllm.layout.items import ImageMedia, Media, VideoMedia, View, VisualItem

Cells = Float[np.ndarray, "cell 2"]
Boxes = Float[np.ndarray, "token 4"]


def even_cells(n: int, length: float | int) -> Cells:
    """`n` equal cells (start, end) that fill [0, length]."""
    edges = np.arange(n + 1) * length / n
    return np.stack([edges[:-1], edges[1:]], -1)


def patch_cells(n: int, size: float | int, shown: float | int, length: float | int) -> Cells:
    """The first `n` cells of `size` pixels in a rendering `shown` pixels wide, in pixels of an original `length` wide.

    Patches that do not fill the rendering leave a strip at its end that no cell covers.
    """
    return even_cells(n, n * size) * (length / shown)


def grid_boxes(x: Float[np.ndarray, "col 2"], y: Float[np.ndarray, "row 2"]) -> Boxes:
    """Boxes x0, y0, x1, y1 of a grid, row by row."""
    cols, rows = np.tile(x, (len(y), 1)), np.repeat(y, len(x), axis=0)
    return np.stack([cols[:, 0], rows[:, 0], cols[:, 1], rows[:, 1]], -1)


def split_boxes(boxes: Float[np.ndarray, "*token 4"], n: int) -> Float[np.ndarray, "*token {n} {n} 4"]:
    """Each box cut into n x n equal ones, row by row."""
    x0, y0, x1, y1 = np.moveaxis(boxes, -1, 0)[..., None, None]
    col, row = np.arange(n), np.arange(n)[:, None]
    width, height = (x1 - x0) / n, (y1 - y0) / n
    cut = (x0 + col * width, y0 + row * height, x0 + (col + 1) * width, y0 + (row + 1) * height)
    return np.stack(np.broadcast_arrays(*cut), -1)


def inside(cells: Cells, length: float | int) -> Cells:
    """The part of each cell within [0, length]; NaN where nothing is left."""
    cut = cells.clip(0, length)
    cut[cut[:, 1] - cut[:, 0] <= 1e-9 * length] = np.nan
    return cut


def no_box(boxes: Boxes) -> Boxes:
    """The boxes with all four numbers NaN where one is: a cell out of the picture in x or in y sees nothing."""
    boxes[np.isnan(boxes).any(1)] = np.nan
    return boxes


def image_item(index: int, media: ImageMedia, parts: Sequence[tuple[View, Float[np.ndarray, "_ 4"]]]) -> VisualItem:
    """An image whose tokens are those of `parts`, one after the other; tokens without a box get no view."""
    boxes = no_box(np.concatenate([b for _, b in parts]))
    views = np.repeat(np.array([int(v) for v, _ in parts], np.int8), [len(b) for _, b in parts])
    views[np.isnan(boxes[:, 0])] = View.NONE
    return VisualItem("image", index, media.width, media.height, boxes, np.full((len(boxes), 2), -1), views)


def video_item(
    index: int, media: VideoMedia, boxes: Boxes, frames: Int[np.ndarray, "step 2"], newlines: int = 0
) -> VisualItem:
    """A video whose tokens repeat the grid `boxes` for each range of frames, with newline tokens at the end."""
    n, steps = len(boxes), len(frames)
    return VisualItem(
        "video",
        index,
        media.width,
        media.height,
        np.concatenate([np.tile(boxes, (steps, 1)), np.full((newlines, 4), np.nan)]),
        np.concatenate([np.repeat(frames, n, axis=0), np.full((newlines, 2), -1)]),
        np.repeat(np.array([View.FRAME, View.NONE], np.int8), [steps * n, newlines]),
        media.times_s,
    )


def frame_ranges(n_frames: int, per_step: int = 1) -> Int[np.ndarray, "step 2"]:
    """First and last frame of each step of `per_step` frames; the last step may hold fewer."""
    first = np.arange(0, n_frames, per_step)
    return np.stack([first, np.minimum(first + per_step, n_frames) - 1], -1)


def split_media(media: Media) -> tuple[list[ImageMedia], list[VideoMedia]]:
    """Images and videos, each in prompt order."""
    return [m for m in media if isinstance(m, ImageMedia)], [m for m in media if isinstance(m, VideoMedia)]


def check_rows(inputs: dict[str, Tensor], name: str, n: int, what: str) -> list[list[int]]:
    """The rows of an input that has one for each image or video, as lists; empty when it is absent.

    Raises:
        LayoutError: when their number is not `n`.
    """
    rows: Any = inputs.get(name)
    rows = [] if rows is None else torch.as_tensor(rows).tolist()
    if len(rows) != n:
        raise LayoutError(
            f"The model inputs hold {len(rows)} {what} (rows of {name}), but {n} came with the prompt. "
            "A layout is made for one sample at a time, from its own images and videos."
        )
    return rows


def in_prompt_order(items: Sequence[VisualItem], ids: Tensor, image_id: int, video_id: int) -> list[VisualItem]:
    """The items by the place of their first token, where images and videos have placeholders of their own.

    A chat template may put all images before all videos, whatever the order they were given in.

    Raises:
        LayoutError: when placeholders and tokens differ in number.
    """
    ids, starts = ids.reshape(-1), {}
    for kind, token in (("image", image_id), ("video", video_id)):
        mine = [item for item in items if item.kind == kind]
        at = (ids == token).nonzero()[:, 0].tolist()
        n = sum(map(len, mine))
        if len(at) != n:
            each = ", ".join(f"{item.name}: {len(item)}" for item in mine) or "there are none"
            raise LayoutError(
                f"The prompt holds {len(at)} {kind} placeholder tokens, but its {kind}s give {n} tokens ({each})."
            )
        taken = 0
        for item in mine:
            starts[item.name] = at[taken]
            taken += len(item)
    return sorted(items, key=lambda item: starts[item.name])


def square_side(size: Any, what: str) -> int:
    """The side of the square that a processor's `size` setting names.

    Raises:
        LayoutError: when it is no square.
    """
    get = size.get if isinstance(size, dict) else lambda key: getattr(size, key, None)
    height, width, edge = get("height"), get("width"), get("shortest_edge")
    if height and height == width:
        return int(height)
    if edge and not height:
        return int(edge)
    raise LayoutError(f"The {what} must have a square size; got {size}.")
