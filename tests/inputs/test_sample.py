"""Samples and batches: masks by name, padding, and clear words for what is not there."""

from functools import cache

import pytest
import torch

from helpers.tiny import tiny_config, tiny_image, tiny_processor
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.families.registry import family_of
from hooked_mllm.inputs.preparer import Preparer
from hooked_mllm.inputs.sample import SampleBatch
from hooked_mllm.layout import Box

NAMES = ("question", "answer", "system", "template", "visual", "last", "text", "target", "pixels")


@cache
def three(family: str):
    config = tiny_config(family)
    prepare = Preparer(tiny_processor(family), config, family_of(config))
    more = {"answer": "red", "system": "Be brief.", "target": Box(0, 0, 9, 9)}
    return tuple(prepare("mug? " * (i + 1), images=[tiny_image()] * (i + 1), id=f"s{i}", **more) for i in range(3))


@cache
def bare(family: str):
    config = tiny_config(family)
    return Preparer(tiny_processor(family), config, family_of(config))("mug?")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_masks_of_a_batch_are_those_of_its_samples_shifted(family, name, side):
    batch = SampleBatch.collate(three(family), side)
    rows, longest = batch.mask(name), max(map(len, three(family)))
    assert rows.shape == batch.inputs["input_ids"].shape == (3, longest)
    for row, sample in zip(rows, three(family), strict=True):
        gap = longest - len(sample)
        ours = row[gap:] if side == "left" else row[: longest - gap]
        assert torch.equal(ours, sample.mask(name)[0])
        assert row.sum() == ours.sum() > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_where_attention_is_not(family, side):
    batch = SampleBatch.collate(three(family), side)
    assert torch.equal(batch.mask("padding"), batch.inputs["attention_mask"] == 0)
    ids = batch.inputs["input_ids"][batch.mask("padding")]
    assert set(ids.tolist()) == {three(family)[0].pad_token_id}
    assert not three(family)[0].mask("padding").any()


def test_kinds_cover_every_token_once(family):
    sample = three(family)[1]
    kinds = [sample.mask(name)[0].int() for name in ("question", "answer", "system", "template", "visual")]
    assert torch.equal(sum(kinds), torch.ones(len(sample), dtype=torch.int32))
    assert torch.equal(sample.mask("text"), ~sample.mask("visual"))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("target", InputError, "This sample has no target: give `target=`"),
        ("answer", InputError, "This sample has no answer: give `answer=`"),
        ("system", LayoutError, "no system tokens: it was prepared without `system=`"),
        ("visual", LayoutError, "no visual tokens: its prompt has no image and no video"),
        ("questoin", LayoutError, "No positions are called 'questoin'. Did you mean 'question'"),
    ],
)
def test_what_is_not_there_is_named(family, name, error, message):
    with pytest.raises(error, match=message):
        bare(family).mask(name)
    batch = SampleBatch.collate([three(family)[0], bare(family)])
    with pytest.raises(error, match=message):
        batch.mask(name)


def test_an_empty_batch_and_an_unknown_side(family):
    with pytest.raises(InputError, match="The batch is empty"):
        SampleBatch.collate([])
    with pytest.raises(InputError, match="padding_side is 'left' or 'right'; got 'top'"):
        SampleBatch.collate(three(family), "top")


def test_dtype_is_for_pixels_and_the_original_stays(family):
    for thing in (three(family)[0], SampleBatch.collate(three(family))):
        half = thing.to("cpu", torch.bfloat16)
        assert half.inputs["pixel_values"].dtype == torch.bfloat16
        assert half.inputs["input_ids"].dtype == torch.int64
        assert thing.inputs["pixel_values"].dtype == torch.float32
        assert thing.to("meta").device == torch.device("meta")


def test_a_batch_is_a_sequence_of_its_samples(family):
    batch = SampleBatch.collate(three(family))
    assert len(batch) == 3
    assert list(batch) == list(three(family))
    assert batch[-1] is three(family)[2]
    assert repr(batch).startswith(f"SampleBatch(3 samples of {len(batch[0])}, {len(batch[1])}, {len(batch[2])} tokens")
    assert "s0: 'mug? '" in repr(batch[0])
