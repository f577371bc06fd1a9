"""A sample of two pictures and a video made by hand, and what overlays draw of it."""

import numpy as np
import torch

from hooked_mllm.layout import View, VisualItem

WIDTH, HEIGHT, CELL = 12, 8, 4  # 2 rows of 3 tokens


def cells():
    rows = [(x, y, x + CELL, y + CELL) for y in range(0, HEIGHT, CELL) for x in range(0, WIDTH, CELL)]
    return np.array(rows, dtype=float)


def item(kind, index, frames=None):
    n = 6
    return VisualItem(
        kind,
        index,
        WIDTH,
        HEIGHT,
        np.concatenate([cells()] * (1 if frames is None else frames)),
        np.full((n, 2), -1) if frames is None else np.repeat(np.arange(frames), n)[:, None].repeat(2, 1),
        np.full(n * (frames or 1), View.WHOLE if frames is None else View.FRAME, np.int8),
        () if frames is None else tuple(float(t) for t in range(frames)),
    )


def values(start, n=26):
    """0 everywhere but 1, 2, 3, ... on the six tokens from `start`."""
    v = torch.zeros(n)
    v[start : start + 6] = torch.arange(1, 7)
    return v


def blocks(array):
    """[height width] -> the value of each 4 x 4 cell, which must be uniform."""
    array = np.asarray(array).reshape(2, CELL, 3, CELL)
    assert (array == array[:, :1, :, :1]).all()
    return array[:, 0, :, 0].ravel().tolist()


def layers(figure, panel=0):
    picture, heat = figure.axes[panel].images
    return picture, heat


def outlines(figure, panel=0):
    return [
        (p.get_x(), p.get_y(), p.get_x() + p.get_width(), p.get_y() + p.get_height())
        for p in figure.axes[panel].patches
    ]
