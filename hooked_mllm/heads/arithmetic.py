"""Arithmetic of head scores, head by head, that remembers what was computed."""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hooked_mllm.heads.head_scores import HeadScores


class Arithmetic:
    """`+ - * /` between scores of one shape, or scores and numbers."""

    def __add__(self, other: Any) -> "HeadScores":
        return _combine(self, other, operator.add, "+")

    def __radd__(self, other: Any) -> "HeadScores":
        return _combine(other, self, operator.add, "+")

    def __sub__(self, other: Any) -> "HeadScores":
        return _combine(self, other, operator.sub, "-")

    def __rsub__(self, other: Any) -> "HeadScores":
        return _combine(other, self, operator.sub, "-")

    def __mul__(self, other: Any) -> "HeadScores":
        return _combine(self, other, operator.mul, "*")

    def __rmul__(self, other: Any) -> "HeadScores":
        return _combine(other, self, operator.mul, "*")

    def __truediv__(self, other: Any) -> "HeadScores":
        return _combine(self, other, operator.truediv, "/")

    def __rtruediv__(self, other: Any) -> "HeadScores":
        return _combine(other, self, operator.truediv, "/")

    def __neg__(self) -> "HeadScores":
        return _combine(-1, self, operator.mul, "*")


def _combine(left: Any, right: Any, operation: Callable[[Any, Any], Any], symbol: str) -> Any:
    from hooked_mllm.heads.head_scores import HeadScores

    scores = [side for side in (left, right) if isinstance(side, HeadScores)]
    others = [side for side in (left, right) if not isinstance(side, HeadScores)]
    if not all(isinstance(side, int | float) for side in others):
        return NotImplemented
    scores[0]._same_shape(scores[-1])
    sides = [side.values if isinstance(side, HeadScores) else side for side in (left, right)]
    names = [side.name if isinstance(side, HeadScores) else repr(side) for side in (left, right)]
    expression = f"({names[0]} {symbol} {names[1]})"
    return HeadScores(
        operation(*sides),
        name=expression,
        provenance={
            "expression": expression,
            "operands": [{"name": side.name, "provenance": side.provenance} for side in scores],
        },
        counts=_common_counts(scores),
        missing=sorted({layer for side in scores for layer in side.missing}),
    )


def _common_counts(scores: "list[HeadScores]") -> Tensor | None:
    """The counts, if all operands agree on them; a sum over different samples has no single count."""
    first = scores[0].counts
    if first is None or any(side.counts is None or not torch.equal(first, side.counts) for side in scores):
        return None
    return first
