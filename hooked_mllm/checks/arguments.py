"""Arguments of another type than the annotation: an `InputError` at the public callable, not an error from below."""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType, NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, SupportsIndex, TypeVar, Union, get_args, get_origin

from hooked_mllm.checks import typechecker
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

    Numbers of NumPy become int, float and bool where these are annotated; a bool is no number. An argument of another
    type is converted where a number, a sequence or an array is annotated and the value is a tensor of one number, an
    iterable, or nested lists. Classes are changed in place, and their bases in this package as well.

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


#: exact types of values that need no check; None for values of any type
_Types = frozenset[type] | None
_NONE: frozenset[type] = frozenset()


def _door(function: Callable[..., Any]) -> Any:
    """The function with a check of its arguments; types are looked up, and beartype is called for the others alone."""
    hints = {name: hint for name, hint in getattr(function, "__annotations__", {}).items() if name != "return"}
    if all(hint in (Any, object, "Any", "object") for hint in hints.values()) or hasattr(function, "_checks_arguments"):
        return function
    if function.__code__.co_filename == contextlib.__file__:
        return contextlib.contextmanager(_door(function.__wrapped__))  # type: ignore[attr-defined]
    positional: list[_Types] = []  # filled in the first call
    named: dict[str, _Types] = {}
    full_checks: list[Callable[..., Any]] = []

    def full_check() -> Callable[..., Any]:
        if not full_checks:
            _types_of_parameters(function, positional, named)
            full_checks.append(_with_check(function))
        return full_checks[0]

    @functools.wraps(function)
    def door(*args: Any, **kwargs: Any) -> Any:
        if len(args) <= len(positional):
            for types, value in zip(positional, args, strict=False):
                kind = type(value)
                if (types is not None and kind not in types) or (kind is int and not -_INT64 <= value < _INT64):
                    break
            else:
                for name, value in kwargs.items():
                    types, kind = named.get(name, _NONE), type(value)
                    if (types is not None and kind not in types) or (kind is int and not -_INT64 <= value < _INT64):
                        break
                else:
                    return function(*args, **kwargs)
        _check_size(function, args, kwargs)
        args, kwargs = _python_numbers(function, args, kwargs)
        check = full_check()
        try:
            return check(*args, **kwargs)
        except _WrongType as error:
            message = str(error)
        args, kwargs = _converted(function, args, kwargs)
        try:
            return check(*args, **kwargs)
        except _WrongType:
            raise InputError(message) from None

    @functools.wraps(function)
    def generating_door(*args: Any, **kwargs: Any) -> Any:
        _check_size(function, args, kwargs)
        args, kwargs = _python_numbers(function, args, kwargs)
        try:
            yield from full_check()(*args, **kwargs)
        except _WrongType as error:
            raise InputError(str(error)) from None

    made = generating_door if inspect.isgeneratorfunction(function) else door
    made._checks_arguments = True  # type: ignore[attr-defined]
    return made


def _check_size(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if type(value) is int and not -_INT64 <= value < _INT64:
            name = _shown_name(function.__qualname__)
            raise InputError(f"{name}: expected integers of at most 64 bits; got {hex(value)[:20]}...")


def _shown_name(qualified: str) -> str:
    """The name of a function as users read it: a class for its constructor, and with its class for `__call__`."""
    parts = qualified.removesuffix(".__init__").rpartition("<locals>.")[2].split(".")
    return ".".join(parts[-2:] if parts[-1].startswith("__") else parts[-1:])


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of parameters; names of `if TYPE_CHECKING` stay text."""
    hints: dict[str, Any] = {}
    for name, hint in function.__annotations__.items():
        try:
            hints[name] = eval(hint, function.__globals__) if isinstance(hint, str) else hint
        except (NameError, AttributeError, TypeError):
            hints[name] = hint
    hints.pop("return", None)
    return hints


def _types_of_parameters(function: Callable[..., Any], positional: list[_Types], named: dict[str, _Types]) -> None:
    hints = _hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        types = _exact_types(hints.get(name, Any))
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            positional.append(types)
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            named[name] = types


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(member for each in get_args(hint) for member in _members(each))
    return (hint,)


def _exact_types(hint: Any) -> _Types:
    types: set[type] = set()
    for member in _members(hint):
        if member is Any or member is object:
            return None
        if member is None:
            types.add(NoneType)
        elif member is float:
            types |= {float, int}
        elif member is SupportsIndex:
            types.add(int)
        elif isinstance(member, type) and get_origin(member) is None:  # of a Protocol or jaxtyping, no value's own type
            types.add(member)
    return frozenset(types)


def _converted(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of annotated types: tensors of one number as numbers, iterables as lists, lists as arrays."""
    hints, signature = _hints(function), inspect.signature(function)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return args, kwargs
    for name, value in bound.arguments.items():
        bound.arguments[name] = _as_annotated(value, _members(hints.get(name, Any)))
    return bound.args, bound.kwargs


def _as_annotated(value: Any, members: tuple[Any, ...]) -> Any:
    import numpy as np
    from torch import Tensor

    array = isinstance(value, Tensor | np.ndarray)
    if array and value.ndim == 0 and {int, float, bool} & {*members}:
        return value.item()
    if np.ndarray in {getattr(member, "array_type", member) for member in members}:
        if isinstance(value, Tensor):
            return value.detach().cpu().numpy()
        if isinstance(value, list | tuple):
            return _array(value)
    collection = next((make for make in (tuple, Sequence) if make in [get_origin(member) for member in members]), None)
    if collection is None or not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        return value
    if array:
        value = value.tolist() if value.ndim else value
    elif not isinstance(value, Sequence):
        value = list(value)
    return tuple(value) if collection is tuple and isinstance(value, list) else value


def _python_numbers(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """NumPy numbers as Python's where int, float or bool is annotated: JSON takes no others."""
    if not any(type(value).__module__ == "numpy" for value in (*args, *kwargs.values())):
        return args, kwargs
    import numpy as np

    hints = _hints(function)
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return args, kwargs
    for name, value in bound.arguments.items():
        if isinstance(value, np.generic) and {int, float, bool} & {*_members(hints.get(name, Any))}:
            bound.arguments[name] = value.item()
    return bound.args, bound.kwargs


def _array(value: Any) -> Any:
    import numpy as np

    try:
        return np.asarray(value)
    except ValueError:  # ragged
        return value


def _with_check(function: Callable[..., Any]) -> Callable[..., Any]:
    if typechecker.typechecker is None:
        return function
    annotations = function.__annotations__
    function.__annotations__ = _hints(function)
    try:
        return typechecker.typechecker(conf=_configuration())(function)
    finally:
        function.__annotations__ = annotations


@functools.cache
def _configuration() -> Any:
    import beartype
    import numpy as np
    from beartype import BeartypeConf, BeartypeViolationVerbosity

    frozen: Any = getattr(beartype, "FrozenDict", None) or beartype.BeartypeHintOverrides  # of earlier versions

    class WrongType(_WrongType):
        def __init__(self, message: str) -> None:
            form = r"[\w ]+ (\S+)\(\) (?:\w+ )*parameter (\w+)=(.*) violates type hint (.*)\."
            match = re.fullmatch(form, message, re.DOTALL)
            if match is not None:
                name, parameter, value, hint = match.groups()
                hint = re.sub(r"<forwardref (\w+).*?>", r"\1", hint)
                hint = re.sub(r"<class '(.+?)'>(?= |$)", r"\1", hint)
                hint = re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", hint)  # names without their modules
                value = value[1:-1] if re.fullmatch(r'"[^\']*"', value) else value
                message = f"{_shown_name(name)}: expected {parameter} as {hint}; got {value}."
            super().__init__(message)

    whole = Annotated[int | np.integer, typechecker.Is[lambda value: not isinstance(value, bool)]]
    overrides = {int: whole, float: float | np.floating | whole, bool: bool | np.bool_}
    return BeartypeConf(
        violation_param_type=WrongType,
        violation_verbosity=BeartypeViolationVerbosity.MINIMAL,
        hint_overrides=frozen(overrides),
        is_color=False,
    )
