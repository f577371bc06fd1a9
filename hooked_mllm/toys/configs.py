"""The architectures of the toys: 6 text layers of 8 heads on 4 kv heads, with the vision tower of each family."""

from typing import Any, Literal

from transformers import (
    InternVLConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen3VLConfig,
)

from hooked_mllm.toys.render import CELL, GRID, PAGE
from hooked_mllm.toys.vocabulary import PAD_TOKEN, TURN_END, VISUAL_TOKENS

PATCH, MERGE = CELL // 2, 2
TILE = PAGE // 2
LLAVA_PINPOINTS = [[PAGE * rows, PAGE * cols] for rows in (1, 2) for cols in (1, 2)]
#: much larger than the usual 0.02: at this width the task is not learnt from smaller weights
INIT = 0.08
LLAVA_INIT = 0.07


def build_config(tokenizer: PreTrainedTokenizerBase, family: str = "qwen3_vl") -> PreTrainedConfig:
    """The config of a family's toy.

    - qwen3_vl: head_dim 16, hidden 64; vision tower of 3 blocks, DeepStack after text layers 0 and 1
    - llava_onevision: Qwen2 text without q and k norms, which needs head_dim 32 and hidden 128; SigLIP of 2 blocks
    - internvl: Qwen3 text, head_dim 16, hidden 64; InternViT of 2 blocks on tiles of 48 x 48 px
    """
    return {"qwen3_vl": _qwen3_vl, "llava_onevision": _llava_onevision, "internvl": _internvl}[family](tokenizer)


def _text(
    tokenizer: PreTrainedTokenizerBase,
    hidden: int,
    mlp: int,
    init: float,
    model_type: Literal["qwen2", "qwen3"] | None = None,
) -> dict[str, Any]:
    """The text config that all families share."""
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
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "pad_token_id": ids[PAD_TOKEN],
        "bos_token_id": None,
        "eos_token_id": ids[TURN_END],
        **({} if model_type is None else {"model_type": model_type}),
    }


def _id(tokenizer: PreTrainedTokenizerBase, family: str, name: str) -> int:
    return tokenizer.get_vocab()[VISUAL_TOKENS[family][name]]


def _qwen3_vl(tokenizer: PreTrainedTokenizerBase) -> Qwen3VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config={**_text(tokenizer, 64, 128, INIT), "rope_parameters": rope},
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


def _llava_onevision(tokenizer: PreTrainedTokenizerBase) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        text_config=_text(tokenizer, 128, 192, LLAVA_INIT, model_type="qwen2"),
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
        **_initializer_range(LLAVA_INIT),
        tie_word_embeddings=False,
    )


def _initializer_range(init: float) -> dict[str, Any]:
    """A setting that the configurations accept, although it is not in their signatures."""
    return {"initializer_range": init}


def _internvl(tokenizer: PreTrainedTokenizerBase) -> InternVLConfig:
    return InternVLConfig(
        text_config=_text(tokenizer, 64, 128, INIT, model_type="qwen3"),
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
        **_initializer_range(INIT),
        tie_word_embeddings=False,
    )
