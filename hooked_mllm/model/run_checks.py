"""Checks of a run's inputs, arguments and logits."""

import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs

from hooked_mllm.errors import InputError, NumericsError, nearest
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.inputs.sample import Sample, SampleBatch

#: outputs of processors and tokenizers that the models need not read
_OUTPUTS = ("mm_token_type_ids", "token_type_ids", "special_tokens_mask", "offset_mapping", "length", "video_metadata")


def labels_of(inputs: ResolvedInput) -> Tensor:
    """The labels of a loss over the answer's tokens `[batch pos]`: token ids in the answer, -100 elsewhere."""
    labels = inputs.tensors.get("labels")
    if labels is not None:
        return labels
    if not isinstance(inputs.source, Sample | SampleBatch):
        raise InputError("A loss needs `labels` among the model inputs, or a sample prepared with `answer=`.")
    tokens = inputs.tensors["input_ids"]
    answer = inputs.masks("answer").to(tokens.device)
    return tokens.masked_fill(~answer, -100)  # -100: ignored by the cross entropy


@cache
def arguments_of(model_class: type[nn.Module]) -> frozenset[str]:
    """The arguments that a transformers model reads."""
    named = set(inspect.signature(model_class.forward).parameters) - {"self", "kwargs"}
    return frozenset(named | set(TransformersKwargs.__annotations__) | {"use_cache", "cache_position"})


def check_arguments(model: nn.Module, names: Iterable[str]) -> None:
    """Reject arguments that the model would ignore: transformers models accept any keyword."""
    known = arguments_of(type(model))
    for name in names:
        if name not in known:
            raise InputError(
                f"{type(model).__name__} takes no argument {name!r} and would ignore it. "
                f"{nearest(name, (*known, 'return_type', 'stop_at_layer'))}"
            )


def processor_outputs(processor: Any) -> set[str]:
    """What a processor may return beyond its model's arguments."""
    return {*getattr(processor, "model_input_names", ()), *_OUTPUTS}


def check_generation(inputs: ResolvedInput) -> None:
    """Reject padding on the right, after which a generation would continue from padding."""
    attention = inputs.tensors.get("attention_mask")
    if attention is not None and attention.dim() == 2 and bool((attention[:, -1] == 0).any()):
        raise InputError(
            "This batch is padded on the right, so that a generation would continue after padding. Prepare it with "
            "padding_side='left'."
        )


def check_half(logits: Tensor) -> None:
    """Reject float16 logits that overflowed: an overflow at any position reaches the last one."""
    if logits.dtype == torch.float16 and not bool(torch.isfinite(logits[:, -1]).all()):
        raise NumericsError(
            "The model overflowed in float16: its logits are not finite. Load it with dtype='bfloat16' or 'float32'."
        )


def checking_half(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Check every call of a float16 model for an overflow in the body of a `with`; other dtypes are not checked."""
    if model.dtype != torch.float16:
        return nullcontext()
    return model.register_forward_hook(lambda _module, _args, output: check_half(output.logits))
