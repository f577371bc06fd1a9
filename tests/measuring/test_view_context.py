"""Facts of a forward pass: those that are there are given as they are, others are errors with the reason."""

import pytest
import torch

from hooked_mllm.errors import InputError
from hooked_mllm.measuring.view_context import ViewContext


def test_facts_that_are_there():
    ids, residuals, layouts = torch.ones(2, 3, dtype=torch.long), [torch.zeros(2, 3, 4)], []
    context = ViewContext(ids, layouts, residuals)
    assert context.tokens is ids and context.layouts is layouts and context.residual is residuals


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        ("tokens", "compares tokens, but the inputs came without `input_ids`"),
        ("layouts", r"needs token layouts.*`model\.prepare\(question, images=\.\.\.\)`"),
        ("residual", "set `needs_residual = True` in the class of the metric"),
    ],
)
def test_facts_that_are_not(fact, message):
    with pytest.raises(InputError, match=message):
        getattr(ViewContext(), fact)
