"""The kernels of attention profiles; see helpers/own_process.py for why their cases run elsewhere."""

import torch

from helpers.own_process import run_cases


def test_kernels():
    passed, skipped = run_cases("attention_profile_triton.py")
    assert passed >= 26
    assert skipped == (0 if torch.cuda.is_available() else 8), "only what a GPU alone can run is skipped"
