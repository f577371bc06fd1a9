"""The public function of attention profiles and bad input; no type checks before its own."""

import pytest
import torch

from helpers.profile_case import Case
from helpers.triton_interpreter import DEVICE, GPU
from hooked_mllm.errors import HeadError, HookValueError, InputError
from hooked_mllm.kernels.attention_profile import attention_profile


def test_the_public_function_and_bad_input():
    made = Case(1, 4, 2, 3, 20, 16)
    q, k, places = made.q, made.k, made.places.to(DEVICE)
    profile = attention_profile(q, k, places, scale=made.scale)
    assert torch.allclose(profile.cpu().double(), made.naive(), atol=2e-6)
    with pytest.raises(InputError, match="same one or more layers"):
        attention_profile(q, k[:1], places)
    with pytest.raises(InputError, match="multiple of kv_head"):
        attention_profile([x[:, :3] for x in q], k, places)
    with pytest.raises(InputError, match="one dtype"):
        attention_profile(q, [x.half() for x in k], places)
    with pytest.raises(InputError, match="places"):
        attention_profile(q, k, places[:, :2])
    with pytest.raises(InputError, match="one scale"):
        attention_profile(q, k, places, scale=[1.0])
    with pytest.raises(InputError, match="above 0"):
        attention_profile(q, k, places, scale=-1.0)
    with pytest.raises(InputError, match="`end` is"):
        attention_profile(q, k, places, end=torch.ones(5, dtype=torch.int32))
    with pytest.raises(InputError, match="weight"):
        attention_profile(q, k, places, weight=torch.ones(1, 1))
    with pytest.raises(HeadError, match="0 to 3"):
        attention_profile(q, k, places, streaming=[((4,), 1, 1), None])
    with pytest.raises(InputError, match="window"):
        attention_profile(q, k, places, streaming=[((), 1, 0), None])
    with pytest.raises(HookValueError, match="implementation"):
        attention_profile(q, k, places, implementation="cuda")
    if not GPU:
        with pytest.MonkeyPatch.context() as context, pytest.raises(HookValueError, match="run on a GPU; q is on cpu"):
            context.setenv("TRITON_INTERPRET", "0")
            attention_profile(q, k, places, implementation="triton")
    with pytest.raises(HookValueError, match="head dims"):
        attention_profile([x[..., :8] for x in q], [x[..., :8] for x in k], places, implementation="triton")
