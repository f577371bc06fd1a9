"""Prompts that a processor pads or cuts, and prompts that open a thought."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.preparers import QUESTION, model, preparer
from helpers.tiny import tiny_config, tiny_frames, tiny_image, tiny_processor
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.families.registry import family_of
from hooked_mllm.inputs.preparer import Preparer
from hooked_mllm.inputs.sample import SampleBatch
from hooked_mllm.layout import Box


def media(kind: str) -> dict:
    return {"images": {"images": tiny_image()}, "videos": {"videos": [(tiny_frames(4), 2.0)]}, "text": {}}[kind]


# -- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["images", "videos", "text"])
@pytest.mark.parametrize("how", ["max_length", "text_kwargs", "multiple"])
def test_padding_of_the_processor_is_padding(family, side, kind, how):
    prepare, padding = preparer(family), {"padding": "max_length", "max_length": 300}
    plain = prepare(QUESTION, **media(kind), answer="red")
    options = {
        "max_length": {**padding, "padding_side": side},
        "text_kwargs": {"text_kwargs": {**padding, "padding_side": side}},
        "multiple": {"padding": True, "pad_to_multiple_of": 150, "padding_side": side},
    }[how]
    sample = prepare(QUESTION, **media(kind), answer="red", **options)
    padded, attention = sample.layout.padding, sample.inputs["attention_mask"][0]
    assert torch.equal(padded, attention == 0)
    assert len(sample) - len(plain) == int(padded.sum()) > 0
    n = len(plain)
    own = slice(len(sample) - n, None) if side == "left" else slice(n)
    assert not padded[own].any()
    assert torch.equal(sample.layout.kinds[own], plain.layout.kinds)
    assert sample.layout.last_index == plain.layout.last_index + (len(sample) - n if side == "left" else 0)
    for name, value in plain.inputs.items():
        same = sample.inputs[name]
        assert torch.equal(same[:, own] if value.shape == (1, n) else same, value), name
    with torch.no_grad():
        logits = [model(family)(**s.inputs).logits[0] for s in (plain, sample)]
    torch.testing.assert_close(logits[1][own], logits[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_inputs_are_those_of_the_processor(family, side):
    processor, options = tiny_processor(family), {"padding": "max_length", "max_length": 300, "padding_side": side}
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    theirs = processor(text=[text], images=[[tiny_image()]], return_tensors="pt", **options)
    ours = preparer(family)(QUESTION, images=tiny_image(), **options).inputs
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_padded_samples(family, side):
    prepare = preparer(family)
    options = {"padding": True, "pad_to_multiple_of": 64, "padding_side": side}
    questions = ["Where?", f"{QUESTION} {QUESTION} {QUESTION}"]
    boxes = [Box(0, 0, 8, 8), Box(8, 8, 20, 20)]
    batch = prepare(questions, images=[tiny_image(), tiny_image(60, 40)], target=boxes, **options)
    assert torch.equal(batch.mask("padding"), batch.inputs["attention_mask"] == 0)
    for other in ("left", "right"):
        joined = SampleBatch.collate(batch.samples, other)
        assert torch.equal(joined.mask("padding"), joined.inputs["attention_mask"] == 0)
        for kind in ("question", "target", "visual", "last"):
            for own, layout, sample in zip(joined.mask(kind), joined.layouts, joined, strict=True):
                assert int(own.sum()) == int(sample.mask(kind).sum())
                assert not (own & layout.padding).any()


def test_a_processor_without_an_attention_mask_is_rejected(family):
    with pytest.raises(InputError, match="without an attention_mask.*Leave out return_attention_mask="):
        preparer(family)(QUESTION, images=tiny_image(), return_attention_mask=False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [4, 12, 20])
def test_a_prompt_that_the_processor_cuts_is_rejected(family, side, length):
    prepare = preparer(family)
    prepare.tokenizer.truncation_side = side
    try:
        with pytest.raises((LayoutError, InputError), match=r"cut the prompt|rejects these inputs"):
            prepare(f"{QUESTION} {QUESTION} {QUESTION}", system="Be brief.", truncation=True, max_length=length)
    finally:
        prepare.tokenizer.truncation_side = "right"
    with pytest.raises(LayoutError, match="cut the prompt or added to it"):
        prepare(QUESTION, text_pair=["And the dog?"])


# -- thoughts ----------------------------------------------------------------------------------------------------------


def thinking(family: str, start: str) -> Preparer:
    processor, config = tiny_processor(family), tiny_config(family)
    processor.chat_template += start
    return Preparer(processor, config, family_of(config))


@pytest.mark.parametrize("tag", ["think", "thinking", "thought"])
def test_an_answer_does_not_land_in_an_open_thought(family, tag):
    prepare = thinking(family, f"<{tag}>\n")
    prompt = prepare(QUESTION, images=tiny_image())
    with pytest.raises(InputError, match=rf"opens a thought that '</{tag}>' ends.*answer='</{tag}>red'"):
        prepare(QUESTION, images=tiny_image(), answer="red")
    sample = prepare(QUESTION, images=tiny_image(), answer=f"It is red.</{tag}>\n\nred")
    ids, n = sample.inputs["input_ids"][0], len(prompt)
    assert torch.equal(ids[:n], prompt.inputs["input_ids"][0])
    assert prepare.tokenizer.decode(ids[n:]).replace(" ", "") == f"Itisred.</{tag}>\n\nred"
    assert prepare.tokenizer.decode(ids[sample.layout.answer]).strip() == "red"
    assert sample.layout.template[n : int(sample.layout.answer.nonzero()[0])].all()
    with pytest.raises(InputError, match="answer is empty"):
        prepare(QUESTION, images=tiny_image(), answer=f"It is red.</{tag}>\n")


def test_a_thought_that_the_template_closes_is_no_thought(family):
    sample = thinking(family, "<think>\n\n</think>\n\n")(QUESTION, images=tiny_image(), answer="red")
    assert sample.layout.answer[-1]
    asked = preparer(family)(f"{QUESTION} <think>", images=tiny_image(), answer="red")
    assert asked.layout.answer[-1]


# -- turned pictures ---------------------------------------------------------------------------------------------------


def test_boxes_are_in_the_axes_of_the_upright_picture(family, tmp_path):
    stored = tiny_image(64, 32)
    exif = stored.getexif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    stored.save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(np.asarray(stored), -1)
    with Image.open(tmp_path / "a.png") as opened:
        forms = [preparer(family)(QUESTION, images=form, target=Box(0, 40, 32, 64)) for form in
                 (tmp_path / "a.png", opened, upright.copy())]  # fmt: skip
    for sample in forms:
        assert (sample.layout.items[0].width, sample.layout.items[0].height) == (32, 64)
        assert torch.equal(sample.target_mask, forms[-1].target_mask)
        assert torch.equal(sample.inputs["pixel_values"], forms[-1].inputs["pixel_values"])
        assert np.array_equal(np.asarray(sample.images[0]), upright)
        again = preparer(family)(QUESTION, images=list(sample.images), target=sample.target)
        assert torch.equal(again.inputs["pixel_values"], sample.inputs["pixel_values"])
