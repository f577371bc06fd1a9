"""Options of transformers' `generate` that it does not take: an `InputError`, raised before the first forward pass."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import GenerationConfig

from hooked_mllm.errors import HookedMLLMError, InputError


@contextmanager
def checking_options(hf_model: nn.Module, options: Mapping[str, Any]) -> Iterator[None]:
    """Report what `generate` raises before its first forward pass as an `InputError`; later errors may be of a hook."""
    for name in ("stopping_criteria", "logits_processor"):  # called after the first forward pass
        functions = options.get(name)
        if functions is not None and not (isinstance(functions, Iterable) and all(map(callable, functions))):
            raise InputError(f"generate: expected {name} as a list of functions; got {functions!r}.")
    numbers = {name for name in vars(GenerationConfig()) if not name.endswith("_token_id")}
    for name, value in options.items():  # some are read after it, as a number or a switch
        if isinstance(value, Tensor | np.ndarray) and name in numbers:
            raise InputError(f"generate: expected {name} as a plain value; got a {type(value).__name__}.")
    started: list[bool] = []

    def start(*_: object) -> None:
        started.append(True)
        handle.remove()

    handle = hf_model.register_forward_pre_hook(start)
    try:
        yield
    except HookedMLLMError:
        raise
    except Exception as error:  # transformers checks few of its options, and the rest fail in every way
        if started:
            raise
        raise InputError(f"generate does not take these options: {error}") from error
    finally:
        handle.remove()
