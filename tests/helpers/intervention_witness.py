"""Samples, and edits of unwrapped models by plain torch hooks, that the tests of interventions compare with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from helpers.tiny import HEAD_DIM, HEADS, tiny_image
from helpers.wrapped import plain, wrapped
from hooked_mllm import Box

QUESTIONS = ("What colour is the mug?", "Where is the dog in the picture of the star?")
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 3}


@cache
def sample(family: str, number: int = 0, question: int | None = None):
    """A question on a picture with a target; the number chooses the picture, and the question unless that is given."""
    picture = tiny_image(32, 24, seed=number)
    return wrapped(family).prepare(
        QUESTIONS[number % 2 if question is None else question], images=picture, target=Box(0, 0, 16, 16)
    )


@cache
def batch(family: str, padding_side: str = "left", seed: int = 0):
    """Two unequal samples, padded."""
    return wrapped(family).prepare(
        list(QUESTIONS),
        images=[[tiny_image(32, 24, seed=seed)], [tiny_image(24, 24, seed=seed + 10)]],
        target=[Box(0, 0, 16, 16), Box(8, 8, 24, 24)],
        padding_side=padding_side,
    )


def real(inputs) -> Tensor:
    """True at tokens that are no padding."""
    return inputs["attention_mask"].bool()


def o_proj(model: nn.Module, layer: int) -> nn.Module:
    """The output projection of a decoder block."""
    return model.model.language_model.layers[layer].self_attn.o_proj


def listen(module: nn.Module, side: str, fn: Callable[[Tensor], Tensor | None]):
    """A torch hook that replaces a module's first input or output with what `fn` returns for it."""

    def pre(_, args, kwargs):
        got = fn(args[0] if args else kwargs["hidden_states"])
        if got is None:
            return None
        return ((got, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": got})

    def post(_, args, output):
        got = fn(output[0] if isinstance(output, tuple) else output)
        if got is not None:
            return (got, *output[1:]) if isinstance(output, tuple) else got
        return None

    if side == "in":
        return module.register_forward_pre_hook(pre, with_kwargs=True, prepend=True)
    return module.register_forward_hook(post, prepend=True)  # transformers records hidden states by hooks


@contextmanager
def z_replaced(family: str, change: Callable[[Tensor, int], Tensor | None], layers=(0, 1, 2)) -> Iterator[nn.Module]:
    """An unwrapped model in which z `[batch pos head d_head]` of some layers goes through `change(z, layer)`."""
    model, handles = plain(family), []

    def hook(layer):
        def fn(x):
            got = change(x.unflatten(-1, (HEADS, HEAD_DIM)).clone(), layer)
            return None if got is None else got.flatten(-2)

        return fn

    try:
        for layer in layers:
            handles.append(listen(o_proj(model, layer), "in", hook(layer)))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def close(a: Tensor, b: Tensor) -> None:
    """Equal within what a float32 softmax written in another order leaves."""
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
