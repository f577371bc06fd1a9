"""Gradient checkpointing with hooks: blocks computed again in the backward pass have the hooks of the forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import torch

from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError
from hooked_mllm.hooks.point import Handle, HookPoint
from hooked_mllm.hooks.run_context import RunContext

_FUNCTION = "_gradient_checkpointing_func"


@contextmanager
def hooks_when_recomputed(model: Model) -> Iterator[None]:
    """Run blocks that are computed again with the hooks that are active in the body of a `with`.

    Raises:
        HookValueError: In the backward pass, if one of these hooks was removed before it.
    """
    if not (torch.is_grad_enabled() and model.hf_model.training):
        yield
        return
    modules = [m for m in model.hf_model.modules() if getattr(m, "gradient_checkpointing", False)]
    active = [(point, tuple(h for h in point.handles if not h.reads_only)) for point in model.registry.registered]
    before = [(module, getattr(module, _FUNCTION)) for module in modules if hasattr(module, _FUNCTION)]
    for module, function in before:
        setattr(module, _FUNCTION, _with_hooks(function, active, model.registry.context))
    try:
        yield
    finally:
        for module, function in before:
            setattr(module, _FUNCTION, function)


def _with_hooks(
    checkpoint: Callable[..., Any], active: list[tuple[HookPoint, tuple[Handle, ...]]], runs: RunContext
) -> Callable[..., Any]:
    def checkpointed(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context, calls = copy_context(), 0

        def compute(*inputs: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                return block(*inputs, **options)
            removed = {point.name for point, handles in active if not {*handles} <= {*point.all_handles}}
            if removed:
                raise HookValueError(
                    "With gradient checkpointing the backward pass computes the blocks again, and hooks on "
                    f"{', '.join(sorted(removed)[:3])} were removed before it, so that gradients would be those of "
                    "another model. Call `backward` inside `with model.hooks(...)` or `with model.intervene(...)`."
                )
            # autograd may run this in a thread of its own, which has none of the scopes
            return context.copy().run(again, *inputs, **options)

        def again(*inputs: Any, **options: Any) -> Any:
            with runs.recomputing({point.name: handles for point, handles in active}):
                return block(*inputs, **options)

        return checkpoint(compute, *args, **kwargs)

    return checkpointed
