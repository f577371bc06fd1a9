"""The grid of an image's visual tokens, and the spatial entropy of attention on it."""

import numpy as np
from jaxtyping import Float, Int

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.layout import TokenLayout, View

#: whole-image views before those in pieces
PREFERRED = ("whole", "base", "thumbnail", "highres", "tile")


@checked
def token_grid(layout: TokenLayout, image: int = 0, view: str | None = None) -> Int[np.ndarray, "row column"]:
    """The position of the token in each cell of an image's grid; -1 where there is none.

    Args:
        layout: The layout of a sample.
        image: The number of the image.
        view: One of its views; by default that of the whole image, if it has one.

    Raises:
        LayoutError: For a missing image or view, or tokens that form no grid.
    """
    if view is None:
        codes = set(layout.view[layout.tokens(image=image) & layout.pixels].tolist())
        view = next((name for name in PREFERRED if int(View[name.upper()]) in codes), None)
    positions = np.flatnonzero((layout.tokens(image=image, view=view) & layout.pixels).numpy())
    if not len(positions):
        raise LayoutError(f"Image {image} has no tokens that see pixels.")
    corners = layout.boxes.numpy()[positions].round(6)
    (xs, column), (ys, row) = (np.unique(corners[:, axis], return_inverse=True) for axis in (0, 1))
    grid = np.full((len(ys), len(xs)), -1, dtype=np.int64)
    if len(set(zip(row.tolist(), column.tolist(), strict=True))) != len(positions):
        raise LayoutError(f"The tokens of image {image} (view {view}) form no grid: several start at one place.")
    grid[row, column] = positions
    return grid


@checked
def spatial_entropy(attention: Float[np.ndarray, "row column"]) -> float:
    r"""How scattered the attention above its mean is: $H = -\sum_i P(C_i)\log P(C_i)$.

    - $C_i$: the 8-connected components of the cells whose attention is above the mean over the grid.
    - $P(C_i)$: the excess over the mean in a component, as a share of that in all of them.

    0 for one component, $\log n$ for n equal ones; infinite for an even map, which has none. A cell is above the mean
    by more than the rounding of float32, 1e-5 of the largest attention.

    Source: arXiv:2503.06287, after arXiv:2206.04636.

    Examples:
        >>> spot = np.zeros((4, 4))
        >>> spot[1, 1:3] = 0.5
        >>> spatial_entropy(spot)
        0.0
    """
    from scipy.ndimage import label

    if not attention.size:
        raise InputError("Expected the attention of one token at least; got an empty grid.")
    excess = attention - attention.mean()
    labels, n = label(excess > 1e-5 * attention.max(), structure=np.ones((3, 3), dtype=int))  # type: ignore[misc]
    if n < 2:
        return 0.0 if n else float("inf")
    sums = np.bincount(labels.ravel(), weights=excess.ravel(), minlength=n + 1)[1:]
    shares = sums / sums.sum()
    return float(-(shares * np.log(shares)).sum())
