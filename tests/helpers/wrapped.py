"""Tiny models, wrapped and plain, that tests share, and edits large enough to show in the logits."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from helpers.tiny import tiny_inputs, tiny_model, tiny_processor
from hooked_mllm import HookedMLLM

LAYERS, VISION_LAYERS = 3, 2  # Qwen3-VL's DeepStack follows two decoder blocks, so the third is without


def fresh(family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A plain transformers model; each has the same weights."""
    model = tiny_model(family, attn=attn, dtype=dtype, layers=LAYERS, vision_layers=VISION_LAYERS)
    return model.requires_grad_(False)


@cache
def plain(family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A model that was never wrapped: the reference."""
    return fresh(family, attn, dtype)


@cache
def wrapped(family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> HookedMLLM:
    """A wrapped model with the weights of `plain`, for tests that leave it as they found it."""
    return HookedMLLM.from_model(fresh(family, attn, dtype), tiny_processor(family), check=False)


@cache
def _inputs(family: str, *args: Any) -> Any:
    return tiny_inputs(family, *args)


def model_inputs(
    family: str, images: int = 1, batch: int = 1, video: bool = False, padding_side: str = "left"
) -> dict[str, Tensor]:
    """What the processor returns, as `tiny_inputs`."""
    return dict(_inputs(family, images, batch, video, padding_side))


def noise(x: Tensor, seed: int = 0) -> Tensor:
    """Normal numbers of the shape and dtype of `x`, always the same."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


def edit(name: str) -> Callable[[Tensor], Tensor]:
    """A change of any activation of that name that a model cannot fail to notice."""
    if name.endswith(("hook_deepstack", "hook_scale")):
        return lambda x: x * 1.5  # zero stays zero, positive stays positive
    return lambda x: x + 0.3 * noise(x)


def returned(name: str) -> Callable[..., Tensor]:
    """A hook that returns the edited activation."""
    change = edit(name)
    return lambda x, hook: change(x)


def in_place(name: str) -> Callable[..., None]:
    """A hook that makes the same edit in place."""
    change = edit(name)

    def fn(x: Tensor, hook: Any) -> None:
        x.copy_(change(x))

    return fn
