"""Draws pages (6 x 6 cells of 16 px) and videos (3 x 3 cells of 32 px): coloured shapes on grey noise."""

from functools import cache

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


def _inside(
    name: str, x: Float[np.ndarray, " *points"], y: Float[np.ndarray, " *points"]
) -> Bool[np.ndarray, " *points"]:
    """True at the points of the square [-1, 1]^2 (y downwards) that belong to the shape."""
    ax, ay = np.abs(x), np.abs(y)
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    box = np.maximum(ax, ay) <= 0.92
    match name:
        case "circle":
            return radius <= 1
        case "square":
            return box
        case "triangle":
            return (ax <= (y + 1) / 2) & (y <= 0.9)
        case "diamond":
            return ax + ay <= 1
        case "plus":
            return (np.minimum(ax, ay) <= 0.3) & (np.maximum(ax, ay) <= 1)
        case "saltire":
            return (np.abs(ax - ay) <= 0.38) & box
        case "star":
            return radius <= 0.72 + 0.28 * np.cos(5 * angle)
        case "ring":
            return (radius <= 1) & (radius >= 0.55)
        case "frame":
            return box & (np.maximum(ax, ay) >= 0.5)
        case "heart":
            lobes = (ax - 0.48) ** 2 + (y + 0.4) ** 2 <= 0.27
            return lobes | ((ax * 0.98 + y * 0.9 <= 0.86) & (y >= -0.4) & (ax <= 0.98 - 0.6 * (y + 0.4) ** 2))
        case "moon":
            return (radius <= 1) & (np.hypot(x - 0.5, y) >= 0.8)
        case "arrow":
            return ((ax <= 0.28) & (ay <= 1)) | ((ax <= (y + 1) * 0.95) & (y <= 0))
        case "hourglass":
            return (ax <= ay) & box
        case "bowtie":
            return (ay <= ax) & box
        case "pie":
            return (radius <= 1) & ((x <= 0) | (y >= 0))
        case "bar":
            return (ay <= 0.38) & (ax <= 1)
        case "pillar":
            return (ax <= 0.38) & (ay <= 1)
        case "tee":
            return ((y <= -0.4) & box) | ((ax <= 0.28) & (ay <= 0.92))
        case "stairs":
            return box & (y >= np.floor((x + 0.92) * 1.63) * -0.62 + 0.3)
        case "chevron":
            return (np.abs(y - 0.55 * (2 * ax - 1)) <= 0.36) & (ax <= 1)
    raise AssertionError(name)


@cache
def sprites(scale: int = 1) -> Float[np.ndarray, "shape variant row col"]:
    """Coverage in [0, 1] of every shape in every size and shift, antialiased, in cells of 16 px times `scale`."""
    side = CELL * scale
    # centres of subpixels, measured from the centre of the cell
    steps = ((np.arange(side * _OVERSAMPLE) + 0.5) / _OVERSAMPLE - side / 2) / scale
    y, x = np.meshgrid(steps, steps, indexing="ij")
    bank = np.empty((len(SHAPES), VARIANTS, side, side), np.float32)
    for shape, name in enumerate(SHAPES):
        for variant in range(VARIANTS):
            radius = RADII[variant % len(RADII)]
            dx = SHIFTS[variant // len(RADII) % len(SHIFTS)]
            dy = SHIFTS[variant // (len(RADII) * len(SHIFTS))]
            inside = _inside(name, (x - dx) / radius, (y - dy) / radius).astype(np.float32)
            # a pixel's coverage is the mean of its subpixels
            bank[shape, variant] = reduce(inside, "(row i) (col j) -> row col", "mean", i=_OVERSAMPLE, j=_OVERSAMPLE)
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

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> draw(rng, 1, np.array([6]), np.array([0]), np.array([35])).shape  # a red star, bottom right
        (1, 96, 96, 3)
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

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> draw_moments(rng, 4, np.array([6]), np.array([0]), np.array([9])).shape  # a red star, second moment
        (8, 96, 96, 3)
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
