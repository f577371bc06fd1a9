"""Arguments of another type than the annotation: an `InputError` at the public callable, not an error from below."""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from hooked_mllm.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

Target = TypeVar("Target")

#: methods of two underscores that are called by users
_SPECIAL = ("__init__", "__call__", "__getitem__")
_INT64 = 1 << 63


class _WrongType(Exception):
    """What beartype raises for an argument."""


def checked(target: Target) -> Target:
    """A public function, or a class with its public methods, that checks its arguments against their annotations.

    Numbers of NumPy count as int, float and bool; a bool is no number. Classes are changed in place, and their bases in
    this package as well.

    Examples:
        >>> @checked
        ... def double(k: int) -> int:
        ...     return 2 * k
        >>> double("2")
        Traceback (most recent call last):
        hooked_mllm.errors.InputError: double: expected k as int; got '2'.
    """
    if not isinstance(target, type):
        return _door(target)  # type: ignore[type-var]
    for base in target.__mro__:
        if base.__module__.partition(".")[0] != __name__.partition(".")[0]:
            continue
        for name, value in list(vars(base).items()):
            inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if isinstance(inner, FunctionType) and (not name.startswith("_") or name in _SPECIAL):
                door = _door(inner)
                if door is not inner:
                    setattr(base, name, door if inner is value else type(value)(door))  # type: ignore[operator]
    return target


def as_device(device: object) -> "torch.device":
    """The device, if it is there."""
    import torch

    try:
        return torch.empty(0, device=device).device  # type: ignore[call-overload]
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"Expected a device of this machine, such as 'cpu'; got {device!r}: {reason}") from None


def numbers(values: Any, what: str) -> "np.ndarray":
    """The values as an array of float64; an `InputError` that names them if they are no numbers."""
    import numpy as np

    try:
        return np.asarray([] if isinstance(values, str | bytes) else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"Expected {what} as numbers; got {type(values).__name__}: {error}.") from None


def _door(function: Callable[..., Any]) -> Any:
    """The function with a check of its arguments, which is made in the first call."""
    if not getattr(function, "__annotations__", None) or hasattr(function, "_checks_arguments"):
        return function
    if function.__code__.co_filename == contextlib.__file__:
        return contextlib.contextmanager(_door(function.__wrapped__))  # type: ignore[attr-defined]
    checks: list[Callable[..., Any]] = []

    def check(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        for value in (*args, *kwargs.values()):
            if type(value) is int and not -_INT64 <= value < _INT64:
                raise InputError(f"{function.__name__}: expected integers of at most 64 bits; got {hex(value)[:20]}...")
        if not checks:
            checks.append(_with_check(function))
        return checks[0]

    @functools.wraps(function)
    def door(*args: Any, **kwargs: Any) -> Any:
        try:
            return check(args, kwargs)(*args, **kwargs)
        except _WrongType as error:
            raise InputError(str(error)) from None

    @functools.wraps(function)
    def generating_door(*args: Any, **kwargs: Any) -> Any:
        try:
            yield from check(args, kwargs)(*args, **kwargs)
        except _WrongType as error:
            raise InputError(str(error)) from None

    made = generating_door if inspect.isgeneratorfunction(function) else door
    made._checks_arguments = True  # type: ignore[attr-defined]
    return made


def _with_check(function: Callable[..., Any]) -> Callable[..., Any]:
    from beartype import beartype

    annotations = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in annotations.items() if name != "return"}
    try:
        return beartype(conf=_configuration())(function)
    finally:
        function.__annotations__ = annotations


@functools.cache
def _configuration() -> Any:
    import beartype
    import numpy as np
    from beartype import BeartypeConf, BeartypeViolationVerbosity
    from beartype.vale import Is

    frozen: Any = getattr(beartype, "FrozenDict", None) or beartype.BeartypeHintOverrides  # of earlier versions

    class WrongType(_WrongType):
        def __init__(self, message: str) -> None:
            form = r"[\w ]+ (\S+)\(\) (?:\w+ )*parameter (\w+)=(.*) violates type hint (.*)\."
            match = re.fullmatch(form, message, re.DOTALL)
            if match is not None:
                name, parameter, value, hint = match.groups()
                name = name.removesuffix(".__init__").rpartition(".")[2]
                hint = re.sub(r"<class '(.+?)'>(?= |$)", r"\1", hint)
                hint = re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", hint)  # names without their modules
                value = value[1:-1] if re.fullmatch(r'"[^\']*"', value) else value
                message = f"{name}: expected {parameter} as {hint}; got {value}."
            super().__init__(message)

    whole = Annotated[int | np.integer, Is[lambda value: not isinstance(value, bool)]]
    overrides = {int: whole, float: float | np.floating | whole, bool: bool | np.bool_}
    return BeartypeConf(
        violation_param_type=WrongType,
        violation_verbosity=BeartypeViolationVerbosity.MINIMAL,
        hint_overrides=frozen(overrides),
        is_color=False,
    )
