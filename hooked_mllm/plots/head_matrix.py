"""Scores of heads as plots read them: a matrix with a name, from `HeadScores` or from plain numbers."""

from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Bool, Float

from hooked_mllm.display.read_heads import HeadsLike, not_heads, read_heads, whole_number
from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.plots.figure import as_array
from hooked_mllm.plots.protocols import HeadChoice, Numbers, Scores, ScoresLike


@dataclass(frozen=True)
class HeadMatrix:
    """Scores as plots read them; `head_matrix` makes one."""

    values: Float[np.ndarray, "layer head"]  # float64; NaN where nothing was measured
    name: str
    source: Scores | None = None  # its own `top` ranks the heads; None for plain numbers

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def measured(self) -> Bool[np.ndarray, "layer head"]:
        """True where there is a score."""
        return ~np.isnan(self.values)

    def top(self, k: int | float) -> list[tuple[int, int]]:
        """The `k` highest heads (int; all, if there are fewer), or that share of them (float, rounded up)."""
        n, number = int(self.measured.sum()), whole_number(k)
        if number is not None and number >= 0:
            number = min(number, n)
        if self.source is not None:
            return list(self.source.top(k if number is None else number))
        if number is None and isinstance(k, float) and 0.0 <= k <= 1.0:
            number = int(np.ceil(round(k * n, 9)))  # 0.05 * 140 is a little more than 7
        if number is None or number < 0:
            raise HeadError(f"Expected a number of heads (int) or a share of them from 0 to 1 (float); got {k!r}.")
        order = np.argsort(-self.values, axis=None, kind="stable")[:number]  # NaN comes last
        layers, heads = np.unravel_index(order, self.shape)
        return list(zip(layers.tolist(), heads.tolist(), strict=True))

    def selected(self, heads: HeadChoice | None) -> list[tuple[int, int]]:
        """The heads that a `top=` argument specifies: how many, which share, which ones, or None for none."""
        if heads is None:
            return []
        if isinstance(heads, bool):
            raise not_heads(heads)
        number = float(heads) if isinstance(heads, float | np.floating) else whole_number(heads)
        if number is not None:
            return self.top(number)
        return list(read_heads(cast(HeadsLike, heads), self.shape, whose=f"the map of {self.name}").pairs)


def head_matrix(scores: ScoresLike, name: str = "scores") -> HeadMatrix:
    """Scores, or plain numbers `[layer head]`, as a matrix; `name` is that of plain numbers."""
    source = scores if isinstance(scores, Scores) else None
    values = as_array(cast(Numbers, scores) if source is None else source.values, "scores of heads")
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"expected scores of heads [layer head], got shape {values.shape}")
    return HeadMatrix(values, name if source is None else source.name, source)
