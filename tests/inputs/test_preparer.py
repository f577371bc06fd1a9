"""`prepare` must give the model what its own processor gives, and refuse what it cannot give."""

import logging
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from helpers.tiny import FAMILIES, tiny_config, tiny_frames, tiny_image, tiny_inputs, tiny_model, tiny_processor
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.families.registry import family_of
from hooked_mllm.inputs.preparer import Preparer, _processor_arguments
from hooked_mllm.inputs.sample import Sample, SampleBatch
from hooked_mllm.inputs.video import Video
from hooked_mllm.layout import Box, Frames

NASA = Path(__file__).parents[1] / "data" / "nasa_13013.mp4"
QUESTION = "What colour is the mug?"


@cache
def preparer(family: str) -> Preparer:
    config = tiny_config(family)
    return Preparer(tiny_processor(family), config, family_of(config))


@cache
def model(family: str):
    return tiny_model(family)


def same(ours: dict, theirs) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def frames_in_text(prepare: Preparer, sample: Sample) -> str:
    return prepare.tokenizer.decode(sample.inputs["input_ids"][0])


# -- the same as the processor -----------------------------------------------------------------------------------------


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
def test_padding_and_company_do_not_change_a_sample(family, side):
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


# -- videos ------------------------------------------------------------------------------------------------------------


def test_a_file_gives_the_inputs_of_its_frames(family):
    prepare = preparer(family)
    sample = prepare(QUESTION, videos=NASA, num_frames=5)
    (video,) = sample.videos
    assert (len(video), video.width) == (5, 480)
    processor, config = tiny_processor(family), {} if family != "qwen3_vl" else {"cap_pixels_per_frame": False}
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    numbers = [round(t * 30000 / 1001) for t in video.times_s]
    meta = [VideoMetadata(total_num_frames=390, fps=30000 / 1001, frames_indices=numbers)]
    clip = [video.frames.transpose(0, 3, 1, 2)]
    theirs = processor(
        text=[text], videos=clip, video_metadata=meta, do_sample_frames=False, return_tensors="pt", **config
    )
    same(sample.inputs, theirs)
    assert sample.layout.items[0].times_s == video.times_s


def test_qwen_is_told_the_real_times():
    prepare = preparer("qwen3_vl")
    even = prepare(QUESTION, videos=[(tiny_frames(4), 0.5)])
    assert "<1.0 seconds>" in frames_in_text(prepare, even)
    assert "<5.0 seconds>" in frames_in_text(prepare, even)
    uneven = Video.from_frames(tiny_frames(4), times_s=[0, 0.4, 7.25, 9.25])
    text = frames_in_text(prepare, prepare(QUESTION, videos=uneven))
    assert "<0.2 seconds>" in text
    assert "<8.2 seconds>" in text


def test_preparing_twice_gives_the_same(family):
    # Qwen3-VL's processor appends to the list of frame numbers that it is given
    video = Video.from_frames(tiny_frames(5), fps=2)
    first = preparer(family)(QUESTION, videos=video)
    same(preparer(family)(QUESTION, videos=video).inputs, first.inputs)
    assert video.times_s == (0, 0.5, 1, 1.5, 2)


def test_images_come_before_videos_before_the_question(family):
    clips = [(tiny_frames(4, seed=1), 2.0), (tiny_frames(4, width=16, seed=2), 1.0)]
    sample = preparer(family)(QUESTION, images=[tiny_image(), tiny_image(20, 20)], videos=clips)
    layout = sample.layout
    assert [item.name for item in layout.items] == ["image 0", "image 1", "video 0", "video 1"]
    order = [*(layout.item == n for n in range(4)), layout.question]
    starts = [int(mask.nonzero()[0]) for mask in order]
    assert starts == sorted(starts)
    assert layout.items[3].width == 16
    with torch.no_grad():
        assert torch.isfinite(model(family)(**sample.inputs).logits).all()


def test_unequal_videos_of_one_sample():
    clips = [(tiny_frames(4), 2.0), (tiny_frames(6), 2.0)]
    assert len(preparer("qwen3_vl")(QUESTION, videos=clips).layout.items) == 2
    for family in ("llava_onevision", "internvl"):
        with pytest.raises(InputError, match=r"videos have \[4, 6\] frames: .*num_frames="):
            preparer(family)(QUESTION, videos=clips)


def test_unequal_videos_in_a_batch():
    clips = [(tiny_frames(4), 2.0), (tiny_frames(6), 2.0)]
    for family in ("qwen3_vl", "internvl"):
        with torch.no_grad():
            assert len(model(family)(**preparer(family)([QUESTION] * 2, videos=clips).inputs).logits) == 2
    with pytest.raises(InputError, match=r"'pixel_values_videos' cannot be joined in one batch.*num_frames="):
        preparer("llava_onevision")([QUESTION] * 2, videos=clips)


def test_nothing_is_logged(family):
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        preparer(family)([QUESTION] * 2, images=[tiny_image()] * 2, videos=[NASA, (tiny_frames(3), 1.0)], num_frames=3)
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in heard] == []


# -- what a sample carries ---------------------------------------------------------------------------------------------


def test_the_answer_follows_the_prompt_token_for_token(family):
    prepare = preparer(family)
    asked, answered = (prepare(QUESTION, images=tiny_image(), answer=a) for a in (None, "red"))
    n = len(asked)
    assert torch.equal(answered.inputs["input_ids"][:, :n], asked.inputs["input_ids"])
    expected = prepare.tokenizer("red", add_special_tokens=False).input_ids
    assert answered.inputs["input_ids"][0, n:].tolist() == expected
    assert answered.inputs["attention_mask"].all()
    assert answered.layout.spans("answer") == [(n, n + len(expected))]
    assert answered.layout.last_index == asked.layout.last_index == n - 1
    with torch.no_grad():
        logits = [model(family)(**s.inputs).logits[0, n - 1] for s in (asked, answered)]
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


def test_a_target_in_a_video(family):
    sample = preparer(family)(QUESTION, videos=[(tiny_frames(6), 1.0)], target=Frames(2, 3))
    frames = sample.layout.frame_range[sample.mask("target")[0]]
    assert frames.unique().tolist() == [2, 3]


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


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("image", "images"),
        ("video", "videos"),
        ("traget", "target"),
        ("max_lenght", "max_length"),
    ],
)
def test_a_misspelt_argument_is_refused(family, wrong, meant):
    said = (
        rf"^prepare takes no argument '{wrong}'\. Did you mean '{meant}'\? It takes question, images, .*Processor takes"
    )
    with pytest.raises(InputError, match=said):
        preparer(family)(QUESTION, **{wrong: tiny_image()})
    with pytest.raises(InputError, match=said):
        preparer(family)([QUESTION], **{wrong: [tiny_image()]})


def test_every_misspelt_argument_is_named():
    with pytest.raises(InputError, match=r"no argument 'image'\. Did you .* no argument 'zzzzzz'\. It takes"):
        preparer("internvl")(QUESTION, image=tiny_image(), zzzzzz=1)


OWN = {
    "qwen3_vl": {"size": {"shortest_edge": 256, "longest_edge": 4096}, "patch_size": 4},
    "llava_onevision": {"image_grid_pinpoints": [[8, 8], [8, 16], [16, 8]]},
    "internvl": {"crop_to_patches": True, "min_patches": 1, "max_patches": 4},
}


def test_arguments_of_the_processor_and_its_parts_are_taken(family):
    common = {"images_kwargs": {"do_resize": True}, "common_kwargs": {}, "do_rescale": True, "truncation": False}
    for name, value in {**common, **OWN[family], "return_mm_token_type_ids": True}.items():
        preparer(family)(QUESTION, images=tiny_image(), **{name: value})


def test_what_transformers_would_leave_out_is_what_is_refused(family, monkeypatch):
    prepare, left = preparer(family), []
    told = type("Told", (), {"warning_once": lambda self, message, *more: left.append(message)})()
    monkeypatch.setattr("transformers.processing_utils.logger", told)
    known = _processor_arguments(prepare.processor)
    assert {"text_kwargs", "images_kwargs", "videos_kwargs", "max_length", "do_resize", "do_sample_frames"} < known
    # of common_kwargs some versions say so although they take them
    for name in [*sorted(known - {"common_kwargs"}), "image", "max_lenght"]:
        left.clear()
        with suppress(Exception):  # a value that does not fit is met after the names were read
            prepare.processor(text=["a"], **{name: {} if name.endswith("_kwargs") else None})
        assert any("will be ignored" in message for message in left) == (name not in known), name


def test_a_processor_that_does_not_tell_takes_what_it_will():
    processor = tiny_processor("qwen3_vl")

    class Untold:
        tokenizer, chat_template = processor.tokenizer, processor.chat_template
        apply_chat_template = processor.apply_chat_template

        def __getattr__(self, name):
            if name == "valid_processor_kwargs":
                raise AttributeError(name)
            return getattr(processor, name)

        def __call__(self, *args, **kwargs):
            self.given = {name: kwargs.pop(name) for name in ("mine",) if name in kwargs}
            return processor(*args, **kwargs)

    config, untold = tiny_config("qwen3_vl"), Untold()
    Preparer(untold, config, family_of(config))(QUESTION, images=tiny_image(), mine=3)
    assert untold.given == {"mine": 3}


def test_without_a_processor():
    config = tiny_config("qwen3_vl")
    with pytest.raises(InputError, match="came without a processor"):
        Preparer(None, config, family_of(config))


def test_nan_in_pixels(family):
    pixels = np.full((24, 32, 3), 0.5)
    pixels[3, 4, 1] = np.nan
    with pytest.raises(InputError, match="An image has NaN or infinity in 1 of its 2304 pixel values"):
        preparer(family)(QUESTION, images=pixels)
    with pytest.raises(InputError, match="A video has NaN or infinity in 1 of its 2304 pixel values"):
        preparer(family)(QUESTION, videos=[(pixels[None], 1.0)])


def test_an_empty_batch(family):
    with pytest.raises(InputError, match="The batch is empty"):
        preparer(family)([])


def test_frames_with_no_fps(family):
    with pytest.raises(InputError, match="Frames in memory carry no times: give fps="):
        preparer(family)(QUESTION, videos=tiny_frames(4))
    assert preparer(family)(QUESTION, videos=tiny_frames(4), fps=2).videos[0].times_s == (0, 0.5, 1, 1.5)


def test_a_target_without_visual_tokens(family):
    with pytest.raises(LayoutError, match="no visual tokens"):
        preparer(family)(QUESTION, target=Box(0, 0, 4, 4))


def test_a_target_outside_the_image_or_in_another(family):
    with pytest.raises(LayoutError, match="outside image 0, which is 32 x 24"):
        preparer(family)(QUESTION, images=tiny_image(), target=Box(40, 0, 44, 4))
    with pytest.raises(LayoutError, match="There is no image 3: this input has 1 of them"):
        preparer(family)(QUESTION, images=tiny_image(), target=Box(0, 0, 4, 4, image=3))


def test_lists_of_another_length(family):
    with pytest.raises(InputError, match=r"list of 2 questions `images` is a list of 2 entries .* got 1 entries"):
        preparer(family)([QUESTION] * 2, images=[tiny_image()])
    with pytest.raises(InputError, match=r"`answer` is a list of 2 entries .* got str"):
        preparer(family)([QUESTION] * 2, answer="red")


def test_what_the_processor_refuses_is_said_in_its_words():
    with pytest.raises(InputError, match=r"Qwen3VLProcessor rejects these inputs: .*aspect ratio"):
        preparer("qwen3_vl")(QUESTION, images=tiny_image(900, 2))


def test_qwen_without_the_types_of_its_tokens():
    with pytest.raises(InputError, match="mm_token_type_ids"):
        preparer("qwen3_vl")(QUESTION, images=tiny_image(), return_mm_token_type_ids=False)


def test_a_template_without_placeholders(family):
    processor, config = tiny_processor(family), tiny_config(family)
    processor.chat_template = "{{- messages[-1].content[-1].text -}}"
    with pytest.raises((InputError, LayoutError), match=r"rejects these inputs|placeholder"):
        Preparer(processor, config, family_of(config))(QUESTION, images=tiny_image())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_that_does_not_decode_or_has_no_file(family, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"\0" * 2000)
    with pytest.raises(InputError, match="does not decode"):
        preparer(family)(QUESTION, videos=tmp_path / "bad.mp4")
    with pytest.raises(InputError, match="No video file"):
        preparer(family)(QUESTION, videos=str(tmp_path / "none.mp4"))
