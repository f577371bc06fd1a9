"""Retrieval heads against a loop over the answer's tokens."""

import numpy as np
import pytest

from helpers.talking import measured, per_sample, positions, talking
from hooked_mllm.metrics import RetrievalHeads


@pytest.mark.parametrize("released_code", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_retrieval_heads(released_code, group):
    layers, tokens = talking()

    def formula(attention, b):
        needle, copied = positions(layers, "question", b), []
        for answer_token in positions(layers, "answer", b):
            position = int(attention[answer_token - 1].argmax())
            if position in needle and tokens[b, position] == tokens[b, answer_token]:
                copied.append(position)
        return len(copied if released_code else set(copied)) / len(needle)

    expected = per_sample(layers, formula)
    assert (expected > 0).sum() > 5
    metric = RetrievalHeads(released_code=released_code)
    np.testing.assert_allclose(measured(metric, layers, tokens, group), expected, atol=1e-7)


def test_repeats_count_in_the_released_code_alone():
    layers, tokens = talking()
    paper, code = (measured(RetrievalHeads(released_code=r), layers, tokens) for r in (False, True))
    assert (code >= paper - 1e-12).all() and (code > paper + 1e-9).any()
