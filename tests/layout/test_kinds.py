"""The kind of every position, from the ranges of the texts."""

import pytest
import torch

from helpers.layout_pieces import PLACEHOLDER, TEXT, image
from hooked_mllm.errors import LayoutError
from hooked_mllm.layout import Kind, TokenLayout
from hooked_mllm.layout.kinds import kinds_of_spans


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"question": [(0, 99)]}, "does not lie within the 9 positions"),
        ({"question": [(0, 2)], "answer": [(1, 2)]}, r"answer span \(1, 2\) overlaps the question span"),
        ({"prompt": [(0, 1)]}, "Spans are named system, question, answer; got 'prompt'"),
        ({"answer": [(0, 2)]}, "no position is left to predict it"),
    ],
)
def test_spans_that_cannot_be(spans, message):
    item = image(30, 20, 3, 2)
    ids = torch.tensor([TEXT, TEXT, *[PLACEHOLDER] * 6, TEXT])
    with pytest.raises(LayoutError, match=message):
        TokenLayout.build(ids, [item], (PLACEHOLDER,), spans)


def test_positions_without_a_span_are_template():
    kinds = kinds_of_spans(9, {"system": [(0, 2)], "question": [(4, 5), (7, 9)], "answer": [(5, 5)]})
    assert "".join(Kind(k).name[0] for k in kinds.tolist()) == "SSTTQTTQQ"
    assert kinds_of_spans(0, {}).shape == (0,)
