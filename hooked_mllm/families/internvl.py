"""InternVL3.5, native class: tiles and a thumbnail, CLS dropped, pixel shuffle, LayerScale in the tower."""

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.families import counts, geometry
from hooked_mllm.families.base import Family, Rows
from hooked_mllm.families.parts import QWEN_DECODER, BlockParts, TowerParts
from hooked_mllm.layout.items import ImageMedia, Media, Patches, VideoMedia, View, VisualItem


class InternVL(Family):
    """InternVL (native transformers class), over a Qwen3 or Qwen2 language model."""

    name = "internvl"
    model_types = ("internvl",)
    model_classes = ("InternVLForConditionalGeneration",)
    text = QWEN_DECODER
    vision = TowerParts(
        root="model.vision_tower",
        blocks="model.vision_tower.encoder.layer",
        block=BlockParts(
            ln1="layernorm_before",
            attn="attention",
            q="attention.q_norm",
            k="attention.k_norm",
            v="attention.v_proj",
            o="attention.projection_layer",
            ln2="layernorm_after",
            mlp="mlp",
            mlp_in="mlp.fc1",
            mlp_out="mlp.fc2",
            attn_gain="lambda_1",
            mlp_gain="lambda_2",
        ),
        causal=False,
        softmax_float32=False,
    )
    patch_embed = "model.vision_tower.embeddings.patch_embeddings"
    projector = "model.multi_modal_projector"
    pixel_inputs = ("pixel_values",)  # frames are tiles like any other

    def vision_heads(self, config: PreTrainedConfig) -> int:
        return config.vision_config.num_attention_heads

    def vision_depth(self, model: PreTrainedModel) -> int:
        return counts.depth_of_states(model.config.vision_feature_layer, super().vision_depth(model))

    def vision_out_module(self) -> tuple[str, Literal["input", "output"]]:
        return self.vision.root, "output"

    def vision_out_value(self, output: Any, model: PreTrainedModel) -> Tensor:
        layer = model.config.vision_feature_layer
        return output.last_hidden_state if layer == -1 else output.hidden_states[layer]

    def vision_out_replace(self, value: Tensor, output: Any, model: PreTrainedModel) -> Any:
        layer = model.config.vision_feature_layer
        if layer == -1:
            output.last_hidden_state = value
        else:
            states = list(output.hidden_states)
            states[layer] = value
            output.hidden_states = tuple(states)
        return output

    def visual_token_ids(self, config: PreTrainedConfig) -> tuple[int, ...]:
        return (config.image_token_id,)

    def vision_rows(self, inputs: Mapping[str, Any], config: PreTrainedConfig) -> list[Rows]:
        pixels = inputs.get("pixel_values")
        tiles, each = (0, 0) if pixels is None else (len(pixels), _grid(config, pixels.shape[-1]) ** 2)
        placeholders = counts.counts_of(inputs["input_ids"], config.image_token_id)
        return counts.share_out([1] * tiles, [each] * tiles, placeholders)

    def visual_items(
        self, model_config: PreTrainedConfig, processor: object, inputs: dict[str, Tensor], media: Media
    ) -> list[VisualItem]:
        lengths = _run_lengths(inputs["input_ids"], model_config.image_token_id)
        images, videos = geometry.split_media(media)
        side = _checked_side(model_config, processor, inputs, sum(lengths), images, videos)
        n = _grid(model_config, side)
        cell = side / n  # width and height of one token in pixels of its tile
        n_runs = len(images) + sum(m.n_frames for m in videos)
        if len(lengths) != n_runs:
            raise LayoutError(
                f"The prompt holds {len(lengths)} runs of placeholder tokens, but {len(images)} images and "
                f"{n_runs - len(images)} frames of {len(videos)} videos need {n_runs}."
            )
        items, runs, index = [], iter(lengths), {"image": 0, "video": 0}
        for m in media:
            kind = "image" if isinstance(m, ImageMedia) else "video"
            i = index[kind]
            index[kind] += 1
            if isinstance(m, ImageMedia):
                length = next(runs)
                tiles, remainder = divmod(length, n * n)
                if remainder:
                    raise LayoutError(
                        f"Image {i} has {length} tokens in the prompt, which is no multiple of the {n * n} of one "
                        "tile. Prepare the sample again with the processor of this checkpoint."
                    )
                items.append(geometry.image_item(i, m, _views(m, tiles, n, cell, side, processor, i)))
                continue
            for length in islice(runs, m.n_frames):
                if length != n * n:
                    raise LayoutError(
                        f"A frame of video {i} has {length} tokens in the prompt; expected {n * n}, one tile of {side} "
                        f"x {side} pixels. Prepare the sample again with this processor."
                    )
            boxes = geometry.square_boxes(n, cell, side, m.width, m.height)
            items.append(geometry.video_item(i, m, boxes, geometry.frame_ranges(m.n_frames)))
        return items

    def vision_patches(self, item: VisualItem, config: PreTrainedConfig) -> Patches:
        # the last tile of an image is its thumbnail, or the only one; the tiles of a video are its frames
        per_tile = len(item) // item.n_frames if item.n_frames else int((item.views == item.views[-1]).sum())
        n, join = math.isqrt(per_tile), round(1 / config.downsample_ratio)
        cells = geometry.split_boxes(item.boxes.reshape(-1, n, n, 4), join)  # [tile row col row_in col_in 4]
        patches = rearrange(cells, "tile row col row_in col_in box -> tile (row row_in col col_in) box")
        cls = np.full((len(cells), 1, 4), np.nan)
        return Patches(np.concatenate([cls, patches], 1), item.frames[::per_tile], item.views[::per_tile])


def _views(
    media: ImageMedia, tiles: int, n: int, cell: float | int, side: int, processor: object, index: int
) -> list[tuple[View, Float[np.ndarray, "_ 4"]]]:
    """The tiles of an image row by row, then its thumbnail; a single tile is the whole image."""
    whole = geometry.square_boxes(n, cell, side, media.width, media.height)
    if tiles == 1:
        return [(View.WHOLE, whole)]
    fewest, most = (
        geometry.option(processor, "image_processor", name, default)
        for name, default in (("min_patches", 1), ("max_patches", 12))
    )
    cols, rows = get_optimal_tiled_canvas((media.height, media.width), (side, side), fewest, most)
    if cols * rows + 1 != tiles:
        raise LayoutError(
            f"Image {index} ({media.width} x {media.height}) has {tiles} tiles in the prompt, but {fewest} to {most} "
            f"tiles make {cols} x {rows} and a thumbnail. Prepare the sample again with the processor of this "
            "checkpoint."
        )
    # the picture is stretched over all tiles: each shows an equal part of it
    width, height = media.width / cols, media.height / rows
    tile = geometry.square_boxes(n, cell, side, width, height)
    corner = [(c * width, r * height) for r in range(rows) for c in range(cols)]
    return [*((View.TILE, tile + np.array([x, y, x, y])) for x, y in corner), (View.THUMBNAIL, whole)]


def _run_lengths(input_ids: Int[Tensor, "..."], token: int) -> list[int]:
    """Lengths of the runs of placeholders: one for each image and frame, as start and end tokens separate them."""
    is_token = (input_ids.reshape(-1) == token).to(torch.int8)
    edge = torch.nn.functional.pad(is_token, (1, 1)).diff()  # 1 where a run starts, -1 after its end
    return ((edge == -1).nonzero() - (edge == 1).nonzero())[:, 0].tolist()


def _grid(config: PreTrainedConfig, side: int) -> int:
    """Rows, and columns, of tokens in a tile of `side` pixels."""
    patch = config.vision_config.patch_size
    return int(side // (patch if isinstance(patch, int) else patch[0]) * config.downsample_ratio)


def _checked_side(
    config: PreTrainedConfig,
    processor: object,
    inputs: Mapping[str, Any],
    n_tokens: int,
    images: list[ImageMedia],
    videos: list[VideoMedia],
) -> int:
    """Width and height of a tile in pixels; an InputError unless the tiles fill the placeholders of the prompt."""
    pixels, side = inputs.get("pixel_values"), config.vision_config.image_size
    if pixels is None:
        return side if isinstance(side, int) else side[0]
    side = int(pixels.shape[-1])
    for part, of_kind in (("image_processor", images), ("video_processor", videos)):
        if of_kind:
            geometry.check_square(processor, part, pixels, side)
    n = _grid(config, side)
    patch = config.vision_config.patch_size
    whole = side % round((patch if isinstance(patch, int) else patch[0]) / config.downsample_ratio) == 0
    if not whole or len(pixels) * n * n != n_tokens:
        raise InputError(
            f"The processor made {len(pixels)} tiles of {side} x {side} pixels, {n} x {n} tokens each, for {n_tokens} "
            "placeholder tokens: leave size= out, or use a processor whose image_seq_length is that of its tiles."
        )
    return side
