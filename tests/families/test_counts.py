"""Placeholder tokens, tiles and blocks, counted again here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mllm.errors import InputError
from hooked_mllm.families.counts import counts_of, depth_of_states, placeholder_count, share_out

IDS = torch.tensor([[5, 1, 5, 6], [1, 6, 6, 6]])


@given(st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), max_size=3), max_size=4), st.integers(0, 7))
def test_every_sample_gets_the_rows_of_its_own_images(samples, start):
    """Images of known samples, as (rows, tokens), are assigned to the samples that they were made for."""
    images = [image for sample in samples for image in sample]
    counts = [sum(tokens for _, tokens in sample) for sample in samples]
    assigned = share_out([rows for rows, _ in images], [tokens for _, tokens in images], counts, start)
    expected, row = [], start
    for sample in samples:
        length = sum(rows for rows, _ in sample)
        expected.append([(row, row + length)] if length else [])
        row += length
    assert assigned == expected


@pytest.mark.parametrize("counts", [[3], [1, 3], [9]])
def test_images_that_do_not_fill_the_prompts(counts):
    with pytest.raises(InputError, match=r"Images of \[2, 2\] tokens .* pass the images of exactly these prompts"):
        share_out([4, 4], [2, 2], counts)


@pytest.mark.parametrize(
    ("layers", "depth"), [(-1, 24), (-2, 23), (0, 0), (24, 24), (3, 3), ([3, 7, -2], 23), ([-24, 5], 5), ((1, 2), 2)]
)
def test_the_blocks_that_compute_a_hidden_state(layers, depth):
    """`hidden_states` holds the input of each of 24 blocks and the output of the last one: 25 entries."""
    assert depth_of_states(layers, 24) == depth


def test_placeholders_are_counted():
    assert counts_of(IDS, 5) == [2, 0] and counts_of(IDS, 9) == [0, 0]
    assert placeholder_count(IDS, (5, 6)) == 6 and placeholder_count(IDS[0], (1,)) == 1
    assert placeholder_count(IDS, ()) == 0
