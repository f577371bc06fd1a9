"""Bad input of `prepare`: unknown arguments, damaged pixels, targets without tokens, and templates that do not fit."""

from contextlib import suppress

import numpy as np
import pytest

from helpers.preparers import QUESTION, preparer
from helpers.tiny import tiny_config, tiny_image, tiny_processor
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.families.registry import family_of
from hooked_mllm.inputs.options import declared_options
from hooked_mllm.inputs.preparer import Preparer
from hooked_mllm.layout import Box


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("image", "images"),
        ("video", "videos"),
        ("traget", "target"),
        ("max_lenght", "max_length"),
    ],
)
def test_a_misspelt_argument_is_rejected(family, wrong, meant):
    pattern = (
        rf"^prepare takes no argument '{wrong}'\. Did you mean '{meant}'\? It takes question, images, .*Processor takes"
    )
    with pytest.raises(InputError, match=pattern):
        preparer(family)(QUESTION, **{wrong: tiny_image()})
    with pytest.raises(InputError, match=pattern):
        preparer(family)([QUESTION], **{wrong: [tiny_image()]})


def test_every_misspelt_argument_is_named():
    with pytest.raises(InputError, match=r"no argument 'image'\. Did you .* no argument 'zzzzzz'\. It takes"):
        preparer("internvl")(QUESTION, image=tiny_image(), zzzzzz=1)


OWN = {
    "qwen3_vl": {"size": {"shortest_edge": 256, "longest_edge": 4096}, "patch_size": 4},
    "llava_onevision": {"image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]]},
    "internvl": {"crop_to_patches": True, "min_patches": 1, "max_patches": 4},
}


def test_arguments_of_the_processor_and_its_parts_are_accepted(family):
    common = {"images_kwargs": {"do_resize": True}, "common_kwargs": {}, "do_rescale": True, "truncation": False}
    for name, value in {**common, **OWN[family], "return_mm_token_type_ids": True}.items():
        preparer(family)(QUESTION, images=tiny_image(), **{name: value})


def test_arguments_that_transformers_would_ignore_are_rejected(family, monkeypatch):
    prepare, left = preparer(family), []
    recorder = type("Recorder", (), {"warning_once": lambda self, message, *more: left.append(message)})()
    monkeypatch.setattr("transformers.processing_utils.logger", recorder)
    known = declared_options(prepare.processor)
    assert {"text_kwargs", "images_kwargs", "videos_kwargs", "max_length", "do_resize", "do_sample_frames"} < known
    # some versions warn about common_kwargs although they accept them
    for name in [*sorted(known - {"common_kwargs"}), "image", "max_lenght"]:
        left.clear()
        with suppress(Exception):  # a value that does not fit is read after the names
            prepare.processor(text=["a"], **{name: {} if name.endswith("_kwargs") else None})
        assert any("will be ignored" in message for message in left) == (name not in known), name


def test_a_processor_without_a_list_of_arguments_accepts_all():
    processor = tiny_processor("qwen3_vl")

    class WithoutList:
        tokenizer, chat_template = processor.tokenizer, processor.chat_template
        apply_chat_template = processor.apply_chat_template

        def __getattr__(self, name):
            if name == "valid_processor_kwargs":
                raise AttributeError(name)
            return getattr(processor, name)

        def __call__(self, *args, **kwargs):
            self.given = {name: kwargs.pop(name) for name in ("mine",) if name in kwargs}
            return processor(*args, **kwargs)

    config, without_list = tiny_config("qwen3_vl"), WithoutList()
    Preparer(without_list, config, family_of(config))(QUESTION, images=tiny_image(), mine=3)
    assert without_list.given == {"mine": 3}


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


def test_an_error_of_the_processor_is_quoted():
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
