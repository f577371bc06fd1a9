"""Builds the config, the processor, the chat template and the generation config of a toy.

All toys have 6 text layers of 8 heads on 4 kv heads, with the vision tower of their family.
"""

from typing import Any

from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from hooked_mllm.toys.render import CELL, GRID, PAGE
from hooked_mllm.toys.vocabulary import PAD_TOKEN, TURN_END, VISUAL_TOKENS, build_tokenizer

PATCH, MERGE = CELL // 2, 2
TILE = PAGE // 2
LLAVA_PINPOINTS = [[PAGE * rows, PAGE * cols] for rows in (1, 2) for cols in (1, 2)]
#: much larger than the usual 0.02: at this width the task is not learnt from smaller weights
INIT = 0.08
LLAVA_INIT = 0.07
ROPE = {"rope_type": "default", "rope_theta": 1e6}

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
    """The processor of a family's toy, which makes 36 tokens of a page of 96 x 96 px (qwen3_vl: 2 x 2 patches each).

    llava_onevision repeats a single page as 6 rows of 6 tokens with newlines; internvl has 4 tiles and a thumbnail.
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


def build_config(tokenizer: PreTrainedTokenizerBase, family: str = "qwen3_vl") -> PreTrainedConfig:
    """The config of a family's toy: qwen3_vl has DeepStack after text layers 0 and 1, internvl Qwen3 text.

    llava_onevision has Qwen2 text without q and k norms, which needs head_dim 32 and hidden 128 instead of 16 and 64.
    """
    builders = {"qwen3_vl": _qwen3_vl_config, "llava_onevision": _llava_onevision_config, "internvl": _internvl_config}
    return builders[family](tokenizer)


def _text(tokenizer: PreTrainedTokenizerBase, hidden: int, mlp: int, init: float, **more: Any) -> dict[str, Any]:
    """The text config that all families share, with the settings `more` of one family."""
    ids = tokenizer.get_vocab()
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": hidden // 4,
        "max_position_embeddings": 4096,
        "initializer_range": init,
        "pad_token_id": ids[PAD_TOKEN],
        "bos_token_id": None,
        "eos_token_id": ids[TURN_END],
        **more,
    }


def _id(tokenizer: PreTrainedTokenizerBase, family: str, name: str) -> int:
    return tokenizer.get_vocab()[VISUAL_TOKENS[family][name]]


def _qwen3_vl_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLConfig:
    rope = {**ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config=_text(tokenizer, 64, 128, INIT, rope_parameters=rope),
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": (GRID * MERGE) ** 2,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": INIT,
        },
        image_token_id=_id(tokenizer, "qwen3_vl", "image_token"),
        video_token_id=_id(tokenizer, "qwen3_vl", "video_token"),
        vision_start_token_id=_id(tokenizer, "qwen3_vl", "vision_start_token"),
        vision_end_token_id=_id(tokenizer, "qwen3_vl", "vision_end_token"),
        tie_word_embeddings=False,
    )


def _llava_onevision_config(tokenizer: PreTrainedTokenizerBase) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        text_config=_text(tokenizer, 128, 192, LLAVA_INIT, model_type="qwen2", rope_parameters={**ROPE}),
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": PAGE,
            "patch_size": CELL,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vision_use_head": False,
            "initializer_range": LLAVA_INIT,
        },
        image_token_index=_id(tokenizer, "llava_onevision", "image_token"),
        video_token_index=_id(tokenizer, "llava_onevision", "video_token"),
        image_grid_pinpoints=LLAVA_PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        initializer_range=LLAVA_INIT,  # pyright: ignore[reportCallIssue]
        tie_word_embeddings=False,
    )


def _internvl_config(tokenizer: PreTrainedTokenizerBase) -> InternVLConfig:
    return InternVLConfig(
        text_config=_text(tokenizer, 64, 128, INIT, model_type="qwen3", rope_parameters={**ROPE}),
        vision_config={
            "image_size": [TILE, TILE],
            "patch_size": [PATCH, PATCH],
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
            "initializer_range": INIT,
        },
        image_token_id=_id(tokenizer, "internvl", "context_image_token"),
        image_seq_length=(TILE // CELL) ** 2,
        downsample_ratio=1 / MERGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        initializer_range=INIT,  # pyright: ignore[reportCallIssue]
        tie_word_embeddings=False,
    )
