"""Odd values, and the public callables that they are passed to; see `helpers.odd_calls`."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

SEED = 0
#: odd values for each argument of a door; fewer where a call costs a forward pass
MANY, FEW = 7, 4
DATA = Path(__file__).parents[1] / "data"

#: odd values by name; functions, so that no call gets what another has changed
ODD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "empty text": lambda: "",
    "text": lambda: "no such",
    "head": lambda: "L2H4",
    "dollar": lambda: "cost $x_{1$",
    "zero": lambda: 0,
    "negative": lambda: -1,
    "three": lambda: 3,
    "huge": lambda: 10**30,
    "half": lambda: 0.5,
    "nan": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "numpy": lambda: np.float32(-2.5),
    "complex": lambda: 1j,
    "empty list": list,
    "list of None": lambda: [None],
    "list of text": lambda: ["x"],
    "list of numbers": lambda: [0, 99],
    "nested": lambda: [[1], [2, 3]],
    "empty tuple": lambda: (),
    "pair": lambda: (2, 4),
    "dict": lambda: {"a": 1},
    "empty dict": dict,
    "set": lambda: {1},
    "bytes": lambda: b"\xff",
    "object": object,
    "function": lambda: lambda: 0,
    "path": lambda: Path("/no/such/file"),
    "tensor": lambda: torch.tensor([float("nan")]),
    "integers": lambda: torch.zeros(2, 3, 4, dtype=torch.int64),
    "array": lambda: np.zeros((0, 3)),
    "generator": lambda: iter([1]),
}


class Fresh:
    """An argument that is made anew for each call."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


class Door:
    """A callable, right arguments for it, and how many odd values each of them is tried with."""

    def __init__(self, name: str, call: Callable[..., Any], n: int = MANY, /, **right: Any) -> None:
        self.name, self.call, self.right, self.n = name, call, right, n

    def arguments(self) -> dict[str, Any]:
        return {name: value.make() if isinstance(value, Fresh) else value for name, value in self.right.items()}

    def calls(self, every: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        yield f"{self.name}(right arguments)", self.arguments()
        for argument in self.right:
            names = random.Random(f"{SEED} {self.name} {argument}").sample(list(ODD), len(ODD) if every else self.n)
            for odd in names:
                yield f"{self.name}({argument}={odd})", {**self.arguments(), argument: ODD[odd]()}


def keeping(call: Callable[..., Any], **right: Any) -> Callable[..., Any]:
    return lambda **arguments: call(**{**right, **arguments})


def then(call: Callable[..., Any], after: Callable[[], Any]) -> Callable[..., Any]:
    def both(**arguments: Any) -> Any:
        try:
            return call(**arguments)
        finally:
            after()

    return both


def listed(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **arguments: list(call(**arguments))
