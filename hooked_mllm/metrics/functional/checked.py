"""Shape checks that are always active."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

from jaxtyping import TypeCheckError, jaxtyped

from hooked_mllm.errors import InputError

try:
    from beartype import beartype as typechecker
except TypeError:  # nnsight gives every object a `save`, after which beartype 0.23 cannot be imported any more
    typechecker = None
    warnings.warn(
        "nnsight was imported before hooked_mllm, and beartype cannot be imported after it: functions in "
        "hooked_mllm.metrics.functional do not check the shapes of their arguments. Import hooked_mllm first.",
        stacklevel=2,
    )


def checked(function: Callable[..., Any]) -> Any:
    """Check arguments and result against the jaxtyping annotations at every call; an `InputError` where they differ."""
    if typechecker is None:
        return function
    check: Callable[..., Any] = jaxtyped(function, typechecker=typechecker)

    @functools.wraps(function)
    def door(*args: Any, **kwargs: Any) -> Any:
        try:
            return check(*args, **kwargs)
        except TypeCheckError as error:
            raise InputError(str(error)) from None

    return door
