"""Positions of the sequence as indices of what a run kept; ActivationCache's methods are tested in its own file."""

import pytest
import torch

from helpers.cache_witness import hooked, sample
from hooked_mllm.cache.kept_positions import matched
from hooked_mllm.errors import LayoutError


def test_positions_are_found_among_those_that_were_kept():
    kept = torch.tensor([[2, 5, 7], [1, 3, -1]])
    wanted = torch.tensor([[7, 2], [3, -1]])  # -1: a sample with fewer
    assert matched(wanted, kept, "wanted").tolist() == [[2, 0], [1, -1]]


def test_positions_that_were_not_kept_are_rejected():
    with pytest.raises(LayoutError, match="'question' reaches positions that this run did not keep"):
        matched(torch.tensor([[4]]), torch.tensor([[2, 5]]), "question")


def test_names_are_positions_of_what_pos_slice_kept(family):
    prepared = sample(family)
    question = prepared.mask("question")[0].nonzero()[:, 0]
    start = int(question[0])
    _, cache = hooked(family).run_with_cache(prepared, "*hook_resid_post", pos_slice=(start, len(prepared)))
    kept = len(prepared) - start
    assert cache.positions("question", 1, kept).tolist() == [(question - start).tolist()]
    with pytest.raises(LayoutError, match="did not keep"):
        cache.positions("visual", 1, kept)


def test_the_mask_of_rows_is_that_of_the_layout(family):
    prepared = sample(family)
    _, cache = hooked(family).run_with_cache(prepared, "hook_embed")
    assert torch.equal(cache.row_mask("visual", 1), prepared.mask("visual"))
