"""Shapes of tensors, checked against their jaxtyping annotations in every call."""

import functools
from collections.abc import Callable
from typing import Any

from jaxtyping import TypeCheckError, jaxtyped

from hooked_mllm.checks.typechecker import typechecker as typechecker
from hooked_mllm.errors import InputError


def checked(function: Callable[..., Any]) -> Any:
    """Check arguments and result against the jaxtyping annotations; an `InputError` where they differ."""
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
