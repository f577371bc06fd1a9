"""Builds the processor, the chat template and the generation config of a toy; `configs.py` has the architectures."""

from typing import Any

from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from hooked_mllm.toys.configs import LLAVA_PINPOINTS, MERGE, PATCH, TILE
from hooked_mllm.toys.configs import build_config as build_config
from hooked_mllm.toys.render import CELL, GRID, PAGE
from hooked_mllm.toys.vocabulary import PAD_TOKEN, TURN_END, build_tokenizer

#: the retrieval heads that training plants, as (layer, head)
PLANTED = tuple((2, head) for head in (4, 5, 6, 7))
_NORMALIZATION: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}

# The system text comes after the images of the first user turn: it is the filler between images and question.
_TEMPLATE = """\
{%- macro words(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set ns.system = words(message.content) -%}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is not string -%}{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}{{ 'IMAGE' }}
{%- elif part.type == 'video' -%}{{ 'VIDEO' }}
{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- if ns.system -%}{{ ns.system + '\\n' }}{%- set ns.system = '' -%}{%- endif -%}
{{- words(message.content) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
_PLACEHOLDERS = {
    "qwen3_vl": ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    "llava_onevision": ("<image>", "<video>"),
    "internvl": ("<IMG_CONTEXT>", "<video>"),
}


def chat_template(family: str) -> str:
    """The chat template; families differ only in the placeholders of images and videos."""
    image, video = _PLACEHOLDERS[family]
    return _TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


CHAT_TEMPLATE = chat_template("qwen3_vl")


def build_processor(family: str = "qwen3_vl") -> ProcessorMixin:
    """The processor of a family's toy.

    The tokens of a page of 96 x 96 px, of 16 x 16 px each unless stated otherwise:

    - qwen3_vl: 36 tokens (8 px patches merged 2 x 2)
    - llava_onevision: for a single page, 36 tokens of the base view and 6 rows of 6 with a newline token after each;
      for one of several pages, 36 tokens and one newline token
    - internvl: 4 tiles of 3 x 3 tokens, and a thumbnail of 3 x 3 tokens that see 32 x 32 px each
    """
    return {"qwen3_vl": _qwen3_vl, "llava_onevision": _llava_onevision, "internvl": _internvl}[family]()


def _qwen3_vl() -> Qwen3VLProcessor:
    pixels: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, **_NORMALIZATION}
    cell = CELL * CELL
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 16 * cell, "longest_edge": 256 * cell}, **pixels),
        tokenizer=build_tokenizer("qwen3_vl"),
        # the pixel budget of a video is for all its frames together
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": 16 * cell, "longest_edge": 1024 * cell}, cap_pixels_per_frame=False, **pixels
        ),
        chat_template=CHAT_TEMPLATE,
    )


def _llava_onevision() -> LlavaOnevisionProcessor:
    view = {"height": PAGE, "width": PAGE}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=view, image_grid_pinpoints=LLAVA_PINPOINTS, **_NORMALIZATION),
        build_tokenizer("llava_onevision"),
        LlavaOnevisionVideoProcessor(size=view, **_NORMALIZATION),
        num_image_tokens=GRID * GRID,
        vision_feature_select_strategy="full",
        chat_template=chat_template("llava_onevision"),
    )


def _internvl() -> InternVLProcessor:
    tile = {"height": TILE, "width": TILE}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=tile, crop_to_patches=True, min_patches=1, max_patches=4, **_NORMALIZATION),
        build_tokenizer("internvl"),
        InternVLVideoProcessor(size=tile, **_NORMALIZATION),
        image_seq_length=(TILE // CELL) ** 2,
        chat_template=chat_template("internvl"),
    )


def build_generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy decoding of up to 4 tokens, until `<|im_end|>`."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=4,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD_TOKEN),
    )
