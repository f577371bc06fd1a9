"""Tiny random models of the real classes, with real processors: what a checkpoint is, small enough for a test.

`initializer_range` is 0.25: at the usual 0.02 attention is nearly uniform and a test could not detect errors.
For the same reason everything that starts at zero or one (biases, norms, layer scales, class and position embeddings)
is randomised.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.video_utils import VideoMetadata

from helpers.tiny_text import TEMPLATE, tiny_tokenizer

FAMILIES = ("qwen3_vl", "llava_onevision", "internvl")
ALL_FAMILIES = (*FAMILIES, "qwen3_vl_moe")
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 32, 4, 2, 8, 448
INIT = 0.25


def _text(layers: int, **more) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 4096,
        "initializer_range": INIT,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        **more,
    }


def _qwen3_vl(layers: int, vision_layers: int, deepstack: bool, moe: bool = False):
    ids = tiny_tokenizer("qwen3_vl").convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = _text(layers, head_dim=HEAD_DIM, rope_parameters=rope)
    if moe:
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    return (Qwen3VLMoeConfig if moe else Qwen3VLConfig)(
        text_config=text,
        vision_config={
            "depth": vision_layers,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": HIDDEN,
            "deepstack_visual_indexes": [0, 1] if deepstack else [],
            "initializer_range": INIT,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        initializer_range=INIT,
        tie_word_embeddings=False,
    )


def _llava_onevision(layers: int, vision_layers: int):
    ids = tiny_tokenizer("llava_onevision").convert_tokens_to_ids
    return LlavaOnevisionConfig(
        text_config=_text(layers, model_type="qwen2"),
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": 28,
            "patch_size": 4,  # a 7 x 7 grid: odd, so the pooling of video frames rounds up as 27 -> 14 does
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": 2,
            "vision_use_head": False,
            "initializer_range": INIT,
        },
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        initializer_range=INIT,
        tie_word_embeddings=False,
    )


def _internvl(layers: int, vision_layers: int):
    return InternVLConfig(
        text_config=_text(layers, model_type="qwen3", head_dim=HEAD_DIM),
        vision_config={
            "image_size": [16, 16],
            "patch_size": [4, 4],
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": 2,
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
            "initializer_range": INIT,
        },
        image_token_id=tiny_tokenizer("internvl").convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        initializer_range=INIT,
        tie_word_embeddings=False,
    )


_PINPOINTS = [[28 * i, 28 * j] for i in (1, 2) for j in (1, 2)]
_CLASS = {
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
    "internvl": InternVLForConditionalGeneration,
}


def tiny_config(family: str, *, layers: int = 3, vision_layers: int = 3, deepstack: bool = True):
    """The config of `tiny_model`."""
    if family.startswith("qwen3_vl"):
        return _qwen3_vl(layers, vision_layers, deepstack, moe=family.endswith("moe"))
    return {"llava_onevision": _llava_onevision, "internvl": _internvl}[family](layers, vision_layers)


def _randomise_constants(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape)
            if name.endswith("bias"):
                p.copy_(0.1 * noise)
            elif "cls_token" in name or "position_embeddings" in name or "image_newline" in name:
                p.copy_(INIT * noise)
            elif "q_norm" in name or "k_norm" in name:
                p.copy_(1.5 + 0.1 * noise)  # normalised queries and keys need it for a sharp pattern
            elif "norm" in name or "lambda" in name:
                p.copy_(1 + 0.1 * noise)


def tiny_model(
    family: str,
    *,
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int = 3,
    vision_layers: int = 3,
    deepstack: bool = True,
):
    """A random model of the family's own class, in eval mode: 4 heads, 2 key-value heads, head width 8."""
    config = tiny_config(family, layers=layers, vision_layers=vision_layers, deepstack=deepstack)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _CLASS[family]._from_config(config, attn_implementation=attn)
        _randomise_constants(model)
    return model.to(dtype).eval()


def tiny_processor(family: str):
    """The family's own processor at tiny sizes: Qwen 8 px a token, LLaVA 28 px views, InternVL 16 px tiles."""
    tokenizer, template = tiny_tokenizer(family), TEMPLATE[family]
    if family.startswith("qwen3_vl"):
        patches = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
        size = {"shortest_edge": 4 * 64, "longest_edge": 16 * 64}
        mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        return Qwen3VLProcessor(
            Qwen2VLImageProcessor(size=size, **patches, **mean),
            tokenizer,
            Qwen3VLVideoProcessor(size={"shortest_edge": 256, "longest_edge": 64 * 64}, **patches, **mean),
            chat_template=template,
        )
    if family == "llava_onevision":
        view = {"height": 28, "width": 28}
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(size=view, image_grid_pinpoints=_PINPOINTS),
            tokenizer,
            LlavaOnevisionVideoProcessor(size=view),
            num_image_tokens=49,
            vision_feature_select_strategy="full",
            chat_template=template,
        )
    tile = {"height": 16, "width": 16}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=tile, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=tile),
        image_seq_length=4,
        chat_template=template,
    )


def save_tiny(family: str, folder: str | Path, **kwargs) -> Path:
    """Write a tiny model and its processor as an ordinary checkpoint folder; `kwargs` as in `tiny_model`."""
    tiny_model(family, **kwargs).save_pretrained(folder)
    tiny_processor(family).save_pretrained(folder)
    return Path(folder)


def tiny_image(width: int = 32, height: int = 24, seed: int = 0) -> Image.Image:
    """A noisy RGB picture."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def tiny_frames(n: int = 4, width: int = 32, height: int = 24, seed: int = 0) -> np.ndarray:
    """Noisy frames, uint8 [frame height width channel]."""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def tiny_inputs(family: str, images: int = 1, batch: int = 1, video: bool = False, padding_side: str = "left"):
    """What the processor returns for `batch` unequal prompts, each with `images` pictures of its own sizes."""
    processor = tiny_processor(family)
    texts, pictures, clips = [], [], []
    for b in range(batch):
        question = "What colour is the mug?" if b % 2 == 0 else "Where is the dog in the picture of the star?"
        content = [{"type": "image"}] * images + [{"type": "video"}] * video + [{"type": "text", "text": question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        pictures.append([tiny_image(32 - 8 * ((b + i) % 2), 24, seed=10 * b + i) for i in range(images)])
        clips.append(torch.from_numpy(tiny_frames(4, seed=50 + b)).permute(0, 3, 1, 2).contiguous())
    kwargs: dict = {}
    if images:
        kwargs["images"] = pictures
    if video:
        meta = [VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3]) for _ in clips]
        kwargs |= {"videos": clips, "video_metadata": meta, "do_sample_frames": False}
        if family.startswith("qwen3_vl"):
            kwargs["cap_pixels_per_frame"] = False  # None warns
    return processor(text=texts, padding=True, padding_side=padding_side, return_tensors="pt", **kwargs)
