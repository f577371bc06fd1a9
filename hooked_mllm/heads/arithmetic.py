"""Arithmetic of head scores, head by head, that records its expression."""

import operator
from collections.abc import Callable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooked_mllm.heads.head_values import HeadValues, Scores

if TYPE_CHECKING:
    #: head scores of the same shape, or a number
    Operand = HeadValues | float
else:  # at run time anything: Python raises its TypeError where neither side supports the other
    Operand = Any


class Arithmetic(HeadValues):
    """`+ - * /` between scores of one shape, or scores and numbers."""

    def __add__(self: Scores, other: Operand) -> Scores:
        return _combine(self, self, other, operator.add, "+")

    def __radd__(self: Scores, other: Operand) -> Scores:
        return _combine(self, other, self, operator.add, "+")

    def __sub__(self: Scores, other: Operand) -> Scores:
        return _combine(self, self, other, operator.sub, "-")

    def __rsub__(self: Scores, other: Operand) -> Scores:
        return _combine(self, other, self, operator.sub, "-")

    def __mul__(self: Scores, other: Operand) -> Scores:
        return _combine(self, self, other, operator.mul, "*")

    def __rmul__(self: Scores, other: Operand) -> Scores:
        return _combine(self, other, self, operator.mul, "*")

    def __truediv__(self: Scores, other: Operand) -> Scores:
        return _combine(self, self, other, operator.truediv, "/")

    def __rtruediv__(self: Scores, other: Operand) -> Scores:
        return _combine(self, other, self, operator.truediv, "/")

    def __neg__(self: Scores) -> Scores:
        return _combine(self, -1, self, operator.mul, "*")


def _combine(like: Scores, left: Operand, right: Operand, operation: Callable[[Any, Any], Any], symbol: str) -> Scores:
    """A result of the class of `like`, which is one of the two sides; NotImplemented for an unsupported operand."""
    values: list[Tensor | float] = []
    names: list[str] = []
    scores: list[HeadValues] = []
    for side in (left, right):
        if isinstance(side, HeadValues):
            like._check_comparable(side)
            scores.append(side)
            values.append(side.values)
            names.append(side.name)
        elif isinstance(side, Real):
            number = int(side) if isinstance(side, Integral) else float(side)
            values.append(number)
            names.append(repr(number))
        else:
            return NotImplemented
    expression = f"({names[0]} {symbol} {names[1]})"
    counts = scores[0].counts
    same_counts = counts is not None and all(s.counts is not None and torch.equal(counts, s.counts) for s in scores)
    return type(like)(
        operation(*values),
        name=expression,
        provenance={
            "expression": expression,
            "operands": [{"name": side.name, "provenance": side.provenance} for side in scores],
        },
        counts=counts if same_counts else None,  # a sum over different samples has no single count
        missing=sorted({layer for side in scores for layer in side.missing}),
    )
