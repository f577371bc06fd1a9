"""How the transformers model is run: whole, without logits, up to a block, or step by step in a generation."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import TransformersKwargs

from hooked_mllm.errors import HookNameError, InputError, NumericsError, nearest
from hooked_mllm.families.base import Family
from hooked_mllm.hooks.point import Clock
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.inputs.sample import Sample, SampleBatch


class StopForwardError(Exception):
    """Carries the residual stream out of a forward pass that is to go no further."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__("stopped")
        self.residual = residual


def stop_module(model: nn.Module, family: Family, layer: int) -> nn.Module:
    """The module whose input is the residual stream entering block `layer`.

    Raises:
        HookNameError: for a layer that the model lacks.
    """
    blocks = model.get_submodule(family.text.blocks)
    count = len(blocks)  # type: ignore[arg-type]
    if not -count <= layer <= count:
        raise HookNameError(f"stop_at_layer={layer} is out of range: the model has {count} blocks.")
    layer = layer + count if layer < 0 else layer
    return model.get_submodule(family.ln_final) if layer == count else blocks[layer]  # type: ignore[index]


@contextmanager
def stopping_at(module: nn.Module) -> Iterator[None]:
    """Within it, a forward pass ends at the entrance of `module`."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise StopForwardError(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def counting_steps(model: nn.Module, clock: Clock) -> Iterator[None]:
    """Within it, each call of the model is one step of a generation: 0 is the prefill."""
    clock.calls = -1

    def count(*_: Any) -> None:
        clock.calls += 1

    handle = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()
        clock.calls = 0


def labels_of(inputs: ResolvedInput) -> Tensor:
    """The labels of a loss over the answer's tokens: token ids where an answer stands, -100 elsewhere.

    Raises:
        InputError: when there is neither an answer nor `labels`.
    """
    labels = inputs.tensors.get("labels")
    if labels is not None:
        return labels
    if not isinstance(inputs.source, Sample | SampleBatch):
        raise InputError("A loss needs `labels` among the model inputs, or a sample prepared with `answer=`.")
    tokens = inputs.tensors["input_ids"]
    answer = inputs.masks("answer").to(tokens.device)
    return tokens.masked_fill(~answer, -100)


@cache
def _arguments(model_class: type) -> frozenset[str]:
    named = set(inspect.signature(model_class.forward).parameters) - {"self", "kwargs"}
    return frozenset(named | set(TransformersKwargs.__annotations__) | {"use_cache", "cache_position"})


def check_arguments(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse what transformers would drop without a word: its models take any keyword.

    Raises:
        InputError: for an argument that the model does not know.
    """
    known = _arguments(type(model))
    for name in names:
        if name not in known:
            raise InputError(
                f"{type(model).__name__} takes no argument {name!r} and would ignore it. "
                f"{nearest(name, (*known, 'return_type', 'stop_at_layer'))}"
            )


def check_generation(inputs: ResolvedInput) -> None:
    """Refuse padding on the right, after which a generation goes on from nothing."""
    attention = inputs.tensors.get("attention_mask")
    if attention is not None and attention.dim() == 2 and bool((attention[:, -1] == 0).any()):
        raise InputError(
            "This batch is padded on the right, so that a generation would go on after padding. Prepare it with "
            "padding_side='left'."
        )


def check_half(logits: Tensor) -> None:
    """Refuse float16 logits that overflowed.

    Raises:
        NumericsError: when the last position's logits are not finite; an overflow anywhere before reaches it.
    """
    if logits.dtype == torch.float16 and not bool(torch.isfinite(logits[:, -1]).all()):
        raise NumericsError(
            "The model overflowed in float16: its logits are not finite. Load it with dtype='bfloat16' or 'float32'."
        )


@contextmanager
def checking_half(model: nn.Module | Any) -> Iterator[None]:
    """Within it, every call of a float16 model is checked for an overflow; other models are left alone."""
    if model.dtype != torch.float16:
        yield
        return
    handle = model.register_forward_hook(lambda _, args, output: check_half(output.logits))
    try:
        yield
    finally:
        handle.remove()
