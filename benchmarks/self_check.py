"""Memory and time of the check on loading, on models of the published 8B sizes with random weights.

    python benchmarks/self_check.py --device cuda

The tokenizer is a toy's; sizes of pictures, tiles and vocabularies are the published ones.
"""

import argparse
import time

import torch
from transformers import (
    AutoModelForImageTextToText,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from hooked_mllm import HookedMLLM
from hooked_mllm.toys.build import build_config, chat_template
from hooked_mllm.toys.vocabulary import build_tokenizer

ROPE = {"rope_type": "default", "rope_theta": 5e6}


def text(small: bool, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, **more) -> dict:
    mlp, layers, vocab = (64, 2, 512) if small else (mlp, layers, vocab)
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": vocab,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": ROPE,
        **more,
    }


def qwen3_vl(small: bool):
    """Qwen3-VL-8B."""
    tokenizer, template = build_tokenizer("qwen3_vl"), chat_template("qwen3_vl")
    pixels = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=size, **pixels), tokenizer, Qwen3VLVideoProcessor(**pixels), chat_template=template
    )
    toy = build_config(tokenizer, "qwen3_vl")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    rope = {**ROPE, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=text(small, 4096, 12288, 36, 32, 8, 151936, rope_parameters=rope),
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
            **pixels,
            "spatial_merge_size": 2,
        },
        tie_word_embeddings=False,
        **{name: getattr(toy, name) for name in names},
    )
    return config, processor


def internvl(small: bool):
    """InternVL3.5-8B."""
    tokenizer, tile = build_tokenizer("internvl"), {"height": 448, "width": 448}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=tile, crop_to_patches=True, min_patches=1, max_patches=12),
        tokenizer,
        InternVLVideoProcessor(size=tile),
        image_seq_length=256,
        chat_template=chat_template("internvl"),
    )
    toy = build_config(tokenizer, "internvl")
    config = InternVLConfig(
        text_config=text(small, 4096, 12288, 36, 32, 8, 151936, model_type="qwen3"),
        vision_config={"attention_bias": True},  # the published tower is the default
        image_token_id=toy.image_token_id,
        tie_word_embeddings=False,
    )
    return config, processor


def llava_onevision(small: bool):
    """LLaVA-OneVision-7B."""
    tokenizer, view = build_tokenizer("llava_onevision"), {"height": 384, "width": 384}
    pinpoints = [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)]
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=view, image_grid_pinpoints=pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=view),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
        chat_template=chat_template("llava_onevision"),
    )
    toy = build_config(tokenizer, "llava_onevision")
    config = LlavaOnevisionConfig(
        text_config=text(small, 3584, 18944, 28, 28, 4, 152128, model_type="qwen2"),
        image_token_index=toy.image_token_index,
        video_token_index=toy.video_token_index,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return config, processor


@torch.no_grad()
def measured(config, processor, device: str) -> str:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        hf_model = AutoModelForImageTextToText.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    for parameter in hf_model.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else None
    weights = sum(p.numel() * p.element_size() for p in hf_model.parameters())
    model, cuda = HookedMLLM.from_model(hf_model, processor, check=False), torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model.check()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else float("nan")
    return f"{weights / 2**30:6.2f} GiB of weights, peak {peak / weights:.3f} of it, {seconds:.2f} s"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="few layers, for a run on the CPU")
    options = parser.parse_args()
    for build in (qwen3_vl, internvl, llava_onevision):
        config, processor = build(options.small)
        print(f"{build.__doc__:22} {measured(config, processor, options.device)}", flush=True)
