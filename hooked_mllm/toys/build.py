"""The toy's architecture: a 0.7 M parameter Qwen3-VL with DeepStack, its processor and its chat template."""

from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from hooked_mllm.toys.render import CELL, GRID
from hooked_mllm.toys.vocabulary import (
    IMAGE_TOKEN,
    PAD_TOKEN,
    TURN_END,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    build_tokenizer,
)

PATCH, MERGE = CELL // 2, 2
PLANTED = tuple((2, head) for head in (4, 5, 6, 7))

# The system text goes after the images of the first user turn: it is the filler that keeps question and image apart.
CHAT_TEMPLATE = """\
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
{%- if part.type in ('image', 'image_url') -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- if ns.system -%}{{ ns.system + '\\n' }}{%- set ns.system = '' -%}{%- endif -%}
{{- words(message.content) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def build_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLConfig:
    """6 layers, 8 heads on 4 kv heads, head_dim 16; vision tower of 3 blocks, DeepStack after text layers 0 and 1."""
    ids = tokenizer.get_vocab()
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            # far above the usual 0.02: at this width the task is not learnt from smaller weights
            "initializer_range": 0.08,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "pad_token_id": ids[PAD_TOKEN],
            "bos_token_id": None,
            "eos_token_id": ids[TURN_END],
        },
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
            "initializer_range": 0.08,
        },
        image_token_id=ids[IMAGE_TOKEN],
        video_token_id=ids[VIDEO_TOKEN],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=False,
    )


def build_processor() -> Qwen3VLProcessor:
    """The processor of the toy: 8 px patches merged 2 x 2, so a 96 x 96 page keeps its size and gives 36 tokens."""
    pixels = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    cell = CELL * CELL
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 16 * cell, "longest_edge": 256 * cell}, **pixels),
        tokenizer=build_tokenizer(),
        # a video's budget counts the pixels of all its frames together
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": 16 * cell, "longest_edge": 1024 * cell}, cap_pixels_per_frame=False, **pixels
        ),
        chat_template=CHAT_TEMPLATE,
    )


def build_generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy, a few tokens, stops at `<|im_end|>`."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=4,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD_TOKEN),
    )
