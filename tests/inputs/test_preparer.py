"""`prepare` returns the inputs of the model's own processor, with the answer, the target and the names of a sample."""

import numpy as np
import pytest
import torch

from helpers.preparers import QUESTION, model, preparer, same
from helpers.tiny import tiny_frames, tiny_image, tiny_inputs
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.sample import SampleBatch
from hooked_mllm.layout import Box


@pytest.mark.parametrize(("images", "video"), [(0, False), (1, False), (2, False), (0, True), (2, True)])
def test_inputs_are_those_of_the_processor(family, images, video):
    pictures = [tiny_image(32 - 8 * (i % 2), 24, seed=i) for i in range(images)]
    clips = [(tiny_frames(4, seed=50), 2.0)] if video else None
    same(preparer(family)(QUESTION, pictures, clips).inputs, tiny_inputs(family, images, 1, video))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("images", "video"), [(1, False), (2, False), (1, True)])
def test_a_batch_of_unequal_samples_is_that_of_the_processor(family, images, video, side):
    questions = [QUESTION, "Where is the dog in the picture of the star?", QUESTION]
    pictures = [[tiny_image(32 - 8 * ((b + i) % 2), 24, seed=10 * b + i) for i in range(images)] for b in range(3)]
    clips = [[(tiny_frames(4, seed=50 + b), 2.0)] for b in range(3)] if video else None
    batch = preparer(family)(questions, pictures, clips, padding_side=side)
    same(batch.inputs, tiny_inputs(family, images, 3, video, padding_side=side))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_other_samples_do_not_change_a_sample(family, side):
    prepare = preparer(family)
    alone = [
        prepare("a", images=tiny_image(60, 20), answer="red"),
        prepare("Where is the dog?", images=[tiny_image(), tiny_image(16, 40)], system="Be brief."),
        prepare("no picture"),
    ]
    batch = SampleBatch.collate(alone, side)
    assert len({len(s) for s in batch}) > 1
    with torch.no_grad():
        together = model(family)(**batch.inputs).logits
        for sample, row, layout in zip(alone, together, batch.layouts, strict=True):
            logits = model(family)(**sample.inputs).logits[0]
            torch.testing.assert_close(row[~layout.padding], logits, atol=2e-4, rtol=1e-4)


def test_several_pictures_of_one_sample_are_nested_for_llava():
    prepare = preparer("llava_onevision")
    assert prepare(QUESTION, images=[tiny_image(), tiny_image()]).inputs["batch_num_images"].tolist() == [2]
    assert prepare(QUESTION, images=tiny_image()).inputs["batch_num_images"].tolist() == [1]
    batch = prepare([QUESTION] * 3, images=[tiny_image(), None, [tiny_image(), tiny_image(9, 40)]])
    assert batch.inputs["batch_num_images"].tolist() == [1, 2]


def test_every_form_of_a_picture_gives_the_same_inputs(family, tmp_path):
    image = tiny_image()
    image.save(tmp_path / "a.png")
    expected = preparer(family)(QUESTION, images=image).inputs
    for form in (tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(image), [np.asarray(image) / 255]):
        same(preparer(family)(QUESTION, images=form).inputs, expected)


# -- what a sample carries ---------------------------------------------------------------------------------------------


def test_the_answer_follows_the_prompt_token_for_token(family):
    prepare = preparer(family)
    without_answer, with_answer = (prepare(QUESTION, images=tiny_image(), answer=a) for a in (None, "red"))
    n = len(without_answer)
    assert torch.equal(with_answer.inputs["input_ids"][:, :n], without_answer.inputs["input_ids"])
    expected = prepare.tokenizer("red", add_special_tokens=False).input_ids
    assert with_answer.inputs["input_ids"][0, n:].tolist() == expected
    assert with_answer.inputs["attention_mask"].all()
    assert with_answer.layout.spans("answer") == [(n, n + len(expected))]
    assert with_answer.layout.last_index == without_answer.layout.last_index == n - 1
    with torch.no_grad():
        logits = [model(family)(**s.inputs).logits[0, n - 1] for s in (without_answer, with_answer)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_an_answer_may_end_the_turn_but_not_hold_a_picture(family):
    prepare = preparer(family)
    sample = prepare(QUESTION, answer="red<|im_end|>")
    assert sample.inputs["input_ids"][0, -1] == prepare.tokenizer.eos_token_id
    with pytest.raises(InputError, match=r"answer contains .* represents an image"):
        prepare(QUESTION, answer=f"red{prepare.processor.image_token}")
    with pytest.raises(InputError, match="answer is empty"):
        prepare(QUESTION, answer="")


def test_the_target_becomes_a_mask(family):
    image = tiny_image(32, 24)
    sample = preparer(family)(QUESTION, images=[tiny_image(), image], target=Box(1, 1, 3, 3, image=1))
    found = sample.mask("target")[0]
    assert torch.equal(found, sample.layout.target(Box(1, 1, 3, 3, image=1)))
    assert (sample.layout.item[found] == 1).all()
    strict = preparer(family)(QUESTION, images=image, target=Box(0, 0, 32, 13), min_overlap=1.0).mask("target")
    loose = preparer(family)(QUESTION, images=image, target=Box(0, 0, 32, 13)).mask("target")
    assert strict.sum() < loose.sum()


def test_a_batch_carries_what_each_sample_was_given(family):
    batch = preparer(family)(
        [QUESTION, "Where?"],
        images=[tiny_image(), [tiny_image(), tiny_image(40, 8)]],
        answer=["red", None],
        target=[Box(0, 0, 4, 4), Box(0, 0, 4, 4, image=1)],
        id=["a", "b"],
        system="Be brief.",
    )
    assert isinstance(batch, SampleBatch)
    assert [s.id for s in batch] == ["a", "b"]
    assert [s.answer for s in batch] == ["red", None]
    assert [len(s.images) for s in batch] == [1, 2]
    assert batch.mask("system").any(1).all()
    assert batch.mask("target").any(1).all()
    systems = preparer(family)(["a", "b"], system=["one", None])
    assert systems[0].layout.system.any()
    assert not systems[1].layout.system.any()


def test_the_template_has_a_fingerprint():
    a, b = (preparer(f)(QUESTION).template for f in ("qwen3_vl", "internvl"))
    assert a == preparer("qwen3_vl")("Another").template
    assert a != b


def test_processor_arguments_reach_the_processor():
    one = preparer("internvl")(QUESTION, images=tiny_image(), crop_to_patches=False)
    assert one.inputs["pixel_values"].shape[0] == 1
    assert one.layout.visual.sum() == 4
