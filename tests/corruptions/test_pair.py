"""Pairs in every form, and what is no pair."""

import inspect
from functools import cache

import pytest
import torch
from transformers import BatchFeature

from helpers.tiny import tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import SampleBatch
from hooked_mllm.corruptions.pair import as_pairs, as_samples_or_pairs
from hooked_mllm.errors import InputError, LayoutError


@cache
def sample(seed: int, width: int = 32):
    return wrapped("internvl").prepare("What is it?", images=tiny_image(width, 24, seed=seed))


def test_one_pair_and_several():
    one, two = (sample(0), sample(1)), (sample(2), sample(3))
    assert as_pairs(one) == [one]
    for several in ([one, two], (one, two), iter([one, two]), [list(one), list(two)]):
        assert inspect.unwrap(as_pairs)(several) == [one, two]
    batches = SampleBatch.collate(one), SampleBatch.collate(two)
    assert as_pairs(batches) == as_pairs([batches]) == [batches]


@pytest.mark.parametrize("wrong", ["text", None, 3, {"input_ids": torch.zeros(1, 1)}], ids=repr)
def test_what_is_no_pair(wrong):
    for pairs in (wrong, [wrong]):
        with pytest.raises(InputError, match=f"Expected pairs .*; got {type(wrong).__name__}. A corruption makes"):
            inspect.unwrap(as_pairs)(pairs)


def test_samples_that_are_not_paired():
    for pairs in (sample(0), [sample(0)], [(sample(0), sample(1), sample(2))], SampleBatch.collate([sample(0)] * 2)):
        with pytest.raises(InputError, match="Expected pairs"):
            inspect.unwrap(as_pairs)(pairs)
    with pytest.raises(InputError, match="There is no pair to patch"):
        as_pairs([])
    with pytest.raises(LayoutError, match="The pair does not correspond"):
        as_pairs([(sample(0), sample(1)), (sample(0), sample(1, 64))])
    mappings = tuple(BatchFeature(dict(sample(seed).inputs)) for seed in (0, 1))
    with pytest.raises(InputError, match="two Samples or two SampleBatches; got BatchFeature and BatchFeature"):
        inspect.unwrap(as_pairs)(mappings)


def test_samples_and_pairs_mixed():
    one, two = sample(0), sample(1)
    feature = BatchFeature(dict(two.inputs))
    assert as_samples_or_pairs(one) == [(one, None)]
    assert as_samples_or_pairs((one, two)) == [(one, two)]
    assert as_samples_or_pairs([one, (one, two)]) == [(one, None), (one, two)]
    for samples in (feature, [feature], iter([feature])):
        ((source, counterpart),) = as_samples_or_pairs(samples)
        assert source is feature and counterpart is None
    with pytest.raises(InputError, match="There is no sample to attribute"):
        as_samples_or_pairs([], "attribute")
    for wrong, name in (("text", "str"), (None, "NoneType"), ([one, 3], "int"), ([(one, two, one)], "tuple")):
        with pytest.raises(InputError, match=f"Expected a Sample, .*got {name}"):
            as_samples_or_pairs(wrong)
