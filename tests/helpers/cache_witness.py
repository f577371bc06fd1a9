"""Models, samples and plain transformers runs that the tests of the cache and of `measure` compare with."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from helpers.tiny import tiny_frames, tiny_image, tiny_model, tiny_processor
from hooked_mllm import Box, HookedMLLM

QUESTIONS = ("What colour is the mug?", "Where is the dog in the picture of the star?")


@cache
def hooked(family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, layers: int = 3) -> HookedMLLM:
    """A hooked tiny model of the family, shared by the tests that leave it as they found it."""
    model = tiny_model(family, attn=attn, dtype=dtype, layers=layers).requires_grad_(False)
    return HookedMLLM.from_model(model, tiny_processor(family), check=False)


@cache
def sample(family: str, number: int = 0, **more):
    """A question on one picture, with an answer and a target; numbers give unequal questions and pictures."""
    picture = tiny_image(32 - 8 * (number % 2), 24, seed=10 * number)
    options = {"answer": "the answer is red", "target": Box(0, 0, 16, 16), "id": f"sample-{number}", **more}
    return hooked(family).prepare(QUESTIONS[number % 2], images=picture, **options)


@cache
def batch(family: str, padding_side: str = "left"):
    """Two unequal samples, padded."""
    return hooked(family).prepare(
        list(QUESTIONS),
        images=[[tiny_image(32, 24, seed=0)], [tiny_image(24, 24, seed=10)]],
        answer=["the answer is red", "blue"],
        target=[Box(0, 0, 16, 16), Box(8, 8, 24, 24)],
        padding_side=padding_side,
    )


@cache
def text_sample(family: str):
    """A question without a picture."""
    return hooked(family).prepare(QUESTIONS[1], answer="red")


@cache
def film(family: str):
    """Two pictures and a video in one prompt: the vision tower is called for each kind."""
    return hooked(family).prepare(
        QUESTIONS[0],
        images=[tiny_image(32, 24), tiny_image(24, 24, seed=3)],
        videos=[(tiny_frames(4, seed=5), 2.0)],
        answer="red",
    )


@cache
def plain(family: str, attn: str = "eager", dtype: torch.dtype = torch.float32, layers: int = 3):
    """The same model without hooks."""
    return tiny_model(family, attn=attn, dtype=dtype, layers=layers).requires_grad_(False)


@torch.no_grad()
def attentions(family: str, inputs) -> tuple[torch.Tensor, ...]:
    """`output_attentions` of eager transformers, one tensor a decoder layer."""
    return plain(family)(**inputs, output_attentions=True, use_cache=False).attentions


_SEEN: list[tuple[torch.nn.Module, torch.Tensor]] = []


def _recording(module, *args, **kwargs):
    own = sys.modules[type(module).__module__].eager_attention_forward
    z, weights = own(module, *args, **kwargs)
    _SEEN.append((module, weights))
    return z, weights


@contextmanager
def recording(config) -> Iterator[list[tuple[torch.nn.Module, torch.Tensor]]]:
    """The weights of every call of transformers' own eager attention in the tower that `config` belongs to."""
    AttentionInterface.register("recording_eager", _recording)
    AttentionMaskInterface.register("recording_eager", eager_mask)
    before = config._attn_implementation
    config._attn_implementation = "recording_eager"
    _SEEN.clear()
    try:
        yield _SEEN
    finally:
        config._attn_implementation = before


@contextmanager
def sizes() -> Iterator[list[int]]:
    """The number of elements of every tensor that any operation makes, within the body."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        yield made


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    """Same shape, no NaN, and close."""
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.isfinite(a).all()
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4, check_dtype=False)
