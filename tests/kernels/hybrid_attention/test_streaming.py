"""The kernel for streaming heads; see helpers/own_process.py for why its cases run elsewhere."""

from helpers.own_process import run_cases


def test_the_kernel():
    assert run_cases("hybrid_attention_streaming.py") == (17, 0)
