"""The public function of attention profiles; see helpers/own_process.py for why the cases run elsewhere."""

from helpers.own_process import run_cases


def test_the_public_function():
    assert run_cases("attention_profile_op.py") == (1, 0)
