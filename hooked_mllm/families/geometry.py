"""Geometry that families share on the way from pixels to tokens: grids of boxes, frames, and prompt order."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.display.text import shortened
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.layout.items import ImageMedia, Media, VideoMedia, View, VisualItem

Cells = Float[np.ndarray, "cell 2"]
Boxes = Float[np.ndarray, "token 4"]


def even_cells(n: int, length: float | int) -> Cells:
    """`n` equal cells (start, end) that fill [0, length]."""
    edges = np.arange(n + 1) * length / n
    return np.stack([edges[:-1], edges[1:]], -1)  # [cell 2]


def patch_cells(n: int, size: float | int, shown: float | int, length: float | int) -> Cells:
    """Cells in pixels of an original `length` wide: the first `n` of `size` pixels in a rendering `shown` pixels wide.

    Where the patches do not fill the rendering, no cell covers the strip at its end.
    """
    return even_cells(n, n * size) * (length / shown)


def grid_boxes(x: Float[np.ndarray, "col 2"], y: Float[np.ndarray, "row 2"]) -> Boxes:
    """Boxes x0, y0, x1, y1 of a grid, row by row."""
    x_cells, y_cells = np.tile(x, (len(y), 1)), np.repeat(y, len(x), axis=0)  # [token 2] each
    return np.stack([x_cells[:, 0], y_cells[:, 0], x_cells[:, 1], y_cells[:, 1]], -1)


def square_boxes(n: int, size: float | int, shown: float | int, width: float | int, height: float | int) -> Boxes:
    """Boxes of n x n patches of `size` pixels in a square of `shown` pixels, to which a picture was resized."""
    return grid_boxes(patch_cells(n, size, shown, width), patch_cells(n, size, shown, height))


def split_boxes(boxes: Float[np.ndarray, "*token 4"], n: int) -> Float[np.ndarray, "*token {n} {n} 4"]:
    """Each box divided into n x n equal ones, row by row."""
    x0, y0, x1, y1 = np.moveaxis(boxes, -1, 0)[..., None, None]  # [*token 1 1] each
    col, row = np.arange(n), np.arange(n)[:, None]
    width, height = (x1 - x0) / n, (y1 - y0) / n
    cut = (x0 + col * width, y0 + row * height, x0 + (col + 1) * width, y0 + (row + 1) * height)
    return np.stack(np.broadcast_arrays(*cut), -1)


def inside(cells: Cells, length: float | int) -> Cells:
    """The part of each cell within [0, length]; NaN where it is empty."""
    clipped = cells.clip(0, length)
    clipped[clipped[:, 1] - clipped[:, 0] <= 1e-9 * length] = np.nan
    return clipped


def no_box(boxes: Boxes) -> Boxes:
    """The boxes, with all four numbers NaN where one is: a cell outside of the picture in x or in y covers nothing."""
    boxes[np.isnan(boxes).any(1)] = np.nan
    return boxes


def image_item(index: int, media: ImageMedia, parts: Sequence[tuple[View, Float[np.ndarray, "_ 4"]]]) -> VisualItem:
    """An image with the tokens of `parts`, one part after the other; tokens without a box get no view."""
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
    """First and last frame of each step of `per_step` frames; the last step may have fewer."""
    first_frames = np.arange(0, n_frames, per_step)
    return np.stack([first_frames, np.minimum(first_frames + per_step, n_frames) - 1], -1)


def split_media(media: Media) -> tuple[list[ImageMedia], list[VideoMedia]]:
    """Images and videos, each in prompt order."""
    return [m for m in media if isinstance(m, ImageMedia)], [m for m in media if isinstance(m, VideoMedia)]


def check_rows(inputs: dict[str, Tensor], name: str, n: int, what: str) -> list[list[int]]:
    """The `n` entries of an input, one for each image or video of the prompt, as lists; empty if it is absent."""
    entries: list[list[int]] = torch.as_tensor(inputs[name]).tolist() if inputs.get(name) is not None else []
    if len(entries) != n:
        raise LayoutError(
            f"The model inputs hold {len(entries)} {what} (rows of {name}), but {n} came with the prompt. "
            "A layout is made for one sample at a time, from its own images and videos."
        )
    return entries


def in_prompt_order(items: Sequence[VisualItem], ids: Tensor, image_id: int, video_id: int) -> list[VisualItem]:
    """The items in the order of their first tokens, where images and videos have different placeholders.

    A chat template may put all images before all videos, so the order of the input is not that of the prompt.
    """
    ids, starts = ids.reshape(-1), {}
    for kind, token in (("image", image_id), ("video", video_id)):
        of_kind = [item for item in items if item.kind == kind]
        positions = (ids == token).nonzero()[:, 0].tolist()
        n_tokens = sum(map(len, of_kind))
        if len(positions) != n_tokens:
            each = ", ".join(f"{item.name}: {len(item)}" for item in of_kind) or "there are none"
            raise LayoutError(
                f"The prompt holds {len(positions)} {kind} placeholder tokens, but its {kind}s give {n_tokens} tokens "
                f"({each}). Pass the inputs that the processor returned for these {kind}s."
            )
        offsets = accumulate(map(len, of_kind), initial=0)
        starts |= {item.name: positions[offset] for item, offset in zip(of_kind, offsets, strict=False)}
    return sorted(items, key=lambda item: starts[item.name])


def option(processor: object, part: str, name: str, default: object = None) -> Any:
    """An option of the image or video processor, or `default` where it has none."""
    value = getattr(getattr(processor, part, None), name, None)
    return default if value is None else value


def check_options(processor: object, part: str, expected: Mapping[str, Any]) -> None:
    """Raise an InputError unless the processor's options, where it has them, are those that the model is built for."""
    for name, value in expected.items():
        used = option(processor, part, name, value)
        if not np.array_equal(used, value):
            raise InputError(
                f"The {part} uses {name}={shortened(str(used))}, and this model is built for {shortened(str(value))}: "
                f"leave {name}= out, or use the processor of this checkpoint."
            )


def check_square(processor: object, part: str, pixels: Tensor | None, side: int, crops: bool = False) -> None:
    """Raise an InputError unless each picture, frame or tile is a whole square of `side` pixels.

    `crops` is for processors that cut by `crop_size` without `do_center_crop`.
    """
    crops = crops or bool(option(processor, part, "do_center_crop"))
    for name in ("size", "crop_size") if crops else ("size",):
        value = option(processor, part, name)
        if value is not None and _square_side(value) != side:
            raise InputError(
                f"The {part} uses {name}={value}, and this model needs squares of {side} x {side} pixels here: leave "
                f"{name}= out, or use the processor of this checkpoint."
            )
    if pixels is not None and tuple(pixels.shape[-2:]) != (side, side):
        raise InputError(
            f"The {part} made pictures of {pixels.shape[-1]} x {pixels.shape[-2]} pixels, and this model needs "
            f"{side} x {side}: leave out size= and do_resize=, or use the processor of this checkpoint."
        )


def _square_side(size: Any) -> int | None:
    """The side of the square that a processor's `size` setting describes, in pixels; None for another shape."""
    if isinstance(size, int):
        return size
    if isinstance(size, list | tuple):
        return size[0] if len(set(size)) == 1 else None
    get = size.get if isinstance(size, dict) else lambda key: getattr(size, key, None)
    height, width, edge = get("height"), get("width"), get("shortest_edge")
    return height if height == width and height else None if height or width else edge
