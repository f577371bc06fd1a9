"""The kernel for all heads; see helpers/own_process.py for why its cases run elsewhere."""

import pytest
import torch

from helpers.own_process import run_cases


def test_the_kernel():
    passed, skipped = run_cases("hybrid_attention_triton.py")
    assert passed >= 44 and skipped == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels as they are compiled, at full size")
def test_hybrid_attention_on_a_gpu():
    passed, skipped = run_cases("hybrid_attention_gpu.py", TRITON_INTERPRET="0")
    assert passed > 80 and skipped == 0
