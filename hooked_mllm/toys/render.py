"""Draws pages (6 x 6 cells of 16 px) and videos (3 x 3 cells of 32 px): coloured shapes on grey noise."""

from functools import cache
from itertools import product

import numpy as np
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from hooked_mllm.toys.vocabulary import COLORS, SHAPES

GRID = 6
CELL = 16
PAGE = GRID * CELL
VIDEO_SCALE = 2
VIDEO_GRID = GRID // VIDEO_SCALE
VIDEO_CELL = CELL * VIDEO_SCALE
FRAMES = 2
RADII = (5.5, 6.25, 7.0)
SHIFTS = (-1.0, 0.0, 1.0)
VARIANTS = len(RADII) * len(SHIFTS) ** 2
BACKGROUND = 128
NOISE = 10
COLOR_JITTER = 14
_OVERSAMPLE = 4


def _inside(x: Float[np.ndarray, "row col"], y: Float[np.ndarray, "row col"]) -> Bool[np.ndarray, "shape row col"]:
    """True at the points of the square [-1, 1]^2 (y downwards) that belong to each of `SHAPES`."""
    ax, ay = np.abs(x), np.abs(y)
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    box = np.maximum(ax, ay) <= 0.92
    lobes = (ax - 0.48) ** 2 + (y + 0.4) ** 2 <= 0.27
    inside = {
        "circle": radius <= 1,
        "square": box,
        "triangle": (ax <= (y + 1) / 2) & (y <= 0.9),
        "diamond": ax + ay <= 1,
        "plus": (np.minimum(ax, ay) <= 0.3) & (np.maximum(ax, ay) <= 1),
        "saltire": (np.abs(ax - ay) <= 0.38) & box,
        "star": radius <= 0.72 + 0.28 * np.cos(5 * angle),
        "ring": (radius <= 1) & (radius >= 0.55),
        "frame": box & (np.maximum(ax, ay) >= 0.5),
        "heart": lobes | ((ax * 0.98 + y * 0.9 <= 0.86) & (y >= -0.4) & (ax <= 0.98 - 0.6 * (y + 0.4) ** 2)),
        "moon": (radius <= 1) & (np.hypot(x - 0.5, y) >= 0.8),
        "arrow": ((ax <= 0.28) & (ay <= 1)) | ((ax <= (y + 1) * 0.95) & (y <= 0)),
        "hourglass": (ax <= ay) & box,
        "bowtie": (ay <= ax) & box,
        "pie": (radius <= 1) & ((x <= 0) | (y >= 0)),
        "bar": (ay <= 0.38) & (ax <= 1),
        "pillar": (ax <= 0.38) & (ay <= 1),
        "tee": ((y <= -0.4) & box) | ((ax <= 0.28) & (ay <= 0.92)),
        "stairs": box & (y >= np.floor((x + 0.92) * 1.63) * -0.62 + 0.3),
        "chevron": (np.abs(y - 0.55 * (2 * ax - 1)) <= 0.36) & (ax <= 1),
    }
    return np.stack([inside[name] for name in SHAPES])


@cache
def sprites(scale: int = 1) -> Float[np.ndarray, "shape variant row col"]:
    """Coverage in [0, 1] of every shape in every size and shift, antialiased, in cells of 16 px times `scale`."""
    side = CELL * scale
    # centres of subpixels, measured from the centre of the cell
    steps = ((np.arange(side * _OVERSAMPLE) + 0.5) / _OVERSAMPLE - side / 2) / scale
    y, x = np.meshgrid(steps, steps, indexing="ij")
    bank = np.empty((len(SHAPES), VARIANTS, side, side), np.float32)
    for variant, (dy, dx, radius) in enumerate(product(SHIFTS, SHIFTS, RADII)):
        inside = _inside((x - dx) / radius, (y - dy) / radius).astype(np.float32)
        # a pixel's coverage is the mean of its subpixels
        to_pixels = "shape (row i) (col j) -> shape row col"
        bank[:, variant] = reduce(inside, to_pixels, "mean", i=_OVERSAMPLE, j=_OVERSAMPLE)
    return bank


def draw(
    rng: np.random.Generator,
    pages: int,
    shapes: Int[np.ndarray, " object"],
    colors: Int[np.ndarray, " object"],
    cells: Int[np.ndarray, " object"],
) -> UInt8[np.ndarray, "page 96 96 3"]:
    """Draw object i, shape `shapes[i]` in colour `colors[i]`, into cell `cells[i]`; everything else is grey noise.

    Cells are numbered page by page, row by row. Size, shift, shade and noise are drawn from `rng`.
    """
    # [cell row col channel], noise first, so that it is added to the objects too
    canvas = rng.integers(-NOISE, NOISE + 1, (pages * GRID * GRID, CELL, CELL, 3), dtype=np.int16)
    noise = canvas[cells].astype(np.float32)
    canvas += BACKGROUND
    objects = _paint(rng, sprites(), shapes, colors) + noise
    canvas[cells] = np.clip(np.rint(objects), 0, 255).astype(np.int16)
    return _assemble(canvas, GRID)


def draw_moments(
    rng: np.random.Generator,
    moments: int,
    shapes: Int[np.ndarray, " object"],
    colors: Int[np.ndarray, " object"],
    cells: Int[np.ndarray, " object"],
) -> UInt8[np.ndarray, "frame 96 96 3"]:
    """As `draw`, on 3 x 3 cells of 32 px, with two frames per moment that differ only in their noise.

    Cells are numbered moment by moment, row by row.
    """
    canvas = np.full((moments * VIDEO_GRID**2, VIDEO_CELL, VIDEO_CELL, 3), BACKGROUND, np.float32)
    canvas[cells] = _paint(rng, sprites(VIDEO_SCALE), shapes, colors)
    moment = rearrange(canvas, "(moment cell) row col channel -> moment 1 cell row col channel", moment=moments)
    noise = rng.integers(-NOISE, NOISE + 1, (moments, FRAMES, *moment.shape[2:]), dtype=np.int16)
    frames = np.clip(np.rint(moment + noise), 0, 255).astype(np.uint8)
    cells_of_frames = rearrange(frames, "moment frame cell row col channel -> (moment frame cell) row col channel")
    return _assemble(cells_of_frames, VIDEO_GRID)


def _paint(
    rng: np.random.Generator,
    bank: Float[np.ndarray, "shape variant row col"],
    shapes: Int[np.ndarray, " object"],
    colors: Int[np.ndarray, " object"],
) -> Float[np.ndarray, "object row col 3"]:
    """The cell of each object, without noise."""
    alpha = bank[shapes, rng.integers(0, VARIANTS, len(shapes))][..., None]
    shade = np.array(list(COLORS.values()), np.float32)[colors]
    shade = shade + rng.integers(-COLOR_JITTER, COLOR_JITTER + 1, shade.shape)
    return alpha * shade[:, None, None] + (1 - alpha) * BACKGROUND


def _assemble(cells: Shaped[np.ndarray, "cell row col 3"], grid: int) -> UInt8[np.ndarray, "picture 96 96 3"]:
    """Pictures of grid x grid cells, from their cells in reading order."""
    # joined row by row of cells
    to_pictures = "(picture y x) row col channel -> picture (y row) (x col) channel"
    return np.ascontiguousarray(rearrange(cells.astype(np.uint8), to_pictures, y=grid, x=grid))
