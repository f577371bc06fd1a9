"""Arguments are checked against annotations: in functions, classes, generators and context managers."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hooked_mllm.checks import as_device, checked, numbers
from hooked_mllm.errors import InputError

HERE = "hooked_mllm.made_up"  # classes of other packages are left as they are


@checked
class Example:
    __module__ = HERE

    def __init__(self, k: int | float = 3, names: Sequence[str] = ()) -> None:
        self.k = k

    def whole(self, n: int, flag: bool = False, *more: int, **named: int) -> int:
        return n

    def numbers(self, n: int) -> Iterator[int]:
        yield from range(n)

    @contextmanager
    def manager(self, n: int) -> Iterator[int]:
        yield n

    @classmethod
    def of(cls, text: str) -> "Example":
        return cls(len(text))

    def _internal(self, n: int) -> int:
        return n


@checked
@dataclass(frozen=True)
class Pair:
    __module__ = HERE
    left: int
    right: str = ""


WRONG = {
    "text for a number": (lambda: Example("x"), r"Example: expected k as (int \| float|float \| int); got 'x'\."),
    "None": (lambda: Example(None), r"Example: expected k as (int \| float|float \| int); got None\."),
    "item": (lambda: Example(1, [3]), r"Example: expected names as Sequence\[str\]; got \[3\]\."),
    "bool for a number": (lambda: Example().whole(True), "whole: expected n as int; got True"),
    "number for a bool": (lambda: Example().whole(1, 1), "whole: expected flag as bool; got 1"),
    "one of several": (lambda: Example().whole(1, False, "a"), "whole: expected more as int; got 'a'"),
    "by name": (lambda: Example().whole(1, x="a"), "whole: expected named as int; got 'a'"),
    "huge": (lambda: Example().whole(10**30), "whole: expected integers of at most 64 bits; got 0x"),
    "class method": (lambda: Example.of(3), "of: expected text as str; got 3"),
    "generator": (lambda: next(Example().numbers("a")), "numbers: expected n as int; got 'a'"),
    "context manager": (lambda: Example().manager("a").__enter__(), "manager: expected n as int; got 'a'"),
    "data class": (lambda: Pair(1, 2), "Pair: expected right as str; got 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    call, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        call()


def test_right_arguments():
    example = Example(np.float32(2), ["a"])
    assert example.k == 2 and Example(np.int64(3)).k == 3 and Example(4).k == 4
    assert example.whole(np.int32(2), np.bool_(True), 1, 2, x=3) == 2 and list(example.numbers(2)) == [0, 1]
    with example.manager(5) as value:
        assert value == 5
    assert Example.of("ab").k == 2 and Pair(1, "a") == Pair(1, "a")
    assert example._internal("not public") == "not public"


def test_signatures_and_errors_of_signatures_stay():
    assert str(inspect.signature(Example.whole)).startswith("(self, n: int, flag: bool = False, *more: int")
    with pytest.raises(TypeError, match="unexpected keyword argument 'l'"):
        Example(l=3)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        Example().whole()


def test_classes_are_changed_in_place_once():
    door = Example.whole
    assert checked(Example) is Example and Example.whole is door

    class Other:
        def method(self, n: int) -> int:
            return n

    assert checked(Other)().method("of another package") == "of another package"


def test_devices():
    assert as_device("cpu") == as_device(torch.device("cpu")) == torch.device("cpu")
    for device in ("", "cpx", "cuda:99", None, 1j, [], 10**30):
        if device is None:
            assert as_device(device).type == "cpu"
            continue
        with pytest.raises(InputError, match="Expected a device of this machine, such as 'cpu'; got"):
            as_device(device)


def test_numbers():
    assert numbers([1, 2.5], "ends").tolist() == [1, 2.5] and numbers(torch.ones(2), "ends").tolist() == [1, 1]
    for value in (["a"], [[1], [2, 3]], {"a": 1}, object()):
        with pytest.raises(InputError, match="Expected ends as numbers; got"):
            numbers(value, "ends")


@pytest.mark.parametrize("value", [np.int64(5), np.int32(5), np.float32(0.5), np.float64(0.5)])
def test_numbers_of_numpy_become_pythons(value):
    for kept in (Example(value).k, Example(k=value).k):
        assert type(kept) in (int, float) and kept == value
    assert [type(n) for n in Example().numbers(np.int64(2))] == [int, int]
    with pytest.raises(InputError, match="expected k as"):
        Example(np.bool_(True))
