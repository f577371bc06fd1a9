"""LLaVA-OneVision: SigLIP tower, base and high-resolution views, a newline token after each high-resolution row."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import select_best_resolution

from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.families import counts, geometry
from hooked_mllm.families.base import Family, Rows
from hooked_mllm.families.geometry import Boxes, Cells
from hooked_mllm.families.parts import QWEN_DECODER, BlockParts, TowerParts
from hooked_mllm.layout.items import ImageMedia, Media, Patches, VideoMedia, View, VisualItem


class LlavaOnevision(Family):
    """LLaVA-OneVision, transformers' own class, over a Qwen2 language model."""

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    model_classes = ("LlavaOnevisionForConditionalGeneration",)
    text = QWEN_DECODER
    vision = TowerParts(
        root="model.vision_tower",
        blocks="model.vision_tower.encoder.layers",
        block=BlockParts(
            ln1="layer_norm1",
            attn="self_attn",
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            o="self_attn.out_proj",
            ln2="layer_norm2",
            mlp="mlp",
            mlp_in="mlp.fc1",
            mlp_out="mlp.fc2",
        ),
        causal=False,
    )
    patch_embed = "model.vision_tower.embeddings.patch_embedding"
    projector = "model.multi_modal_projector"

    def vision_heads(self, config: PreTrainedConfig) -> int:
        return config.vision_config.num_attention_heads

    def patch_embed_value(self, output: Tensor) -> Tensor:
        return rearrange(output, "batch d_model row col -> batch (row col) d_model")

    def patch_embed_output(self, value: Tensor, output: Tensor) -> Tensor:
        return value.transpose(1, 2).reshape(output.shape)  # [batch patch d_model] -> [batch d_model row col]

    def vision_depth(self, model: PreTrainedModel) -> int:
        return counts.depth_of_states(model.config.vision_feature_layer, super().vision_depth(model))

    def vision_out_module(self) -> tuple[str, Literal["input", "output"]]:
        # the model selects hidden_states[vision_feature_layer], without CLS if configured so, as the projector's input
        return self.projector, "input"

    def visual_token_ids(self, config: PreTrainedConfig) -> tuple[int, ...]:
        return config.image_token_id, config.video_token_id

    def vision_rows(self, inputs: Mapping[str, Any], config: PreTrainedConfig) -> list[Rows]:
        from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

        tokens, start = inputs["input_ids"], 0
        out: list[Rows] = [[] for _ in range(len(tokens))]
        if inputs.get("pixel_values") is not None:
            image_counts = _images_of_samples(inputs, config)
            sizes = inputs["image_sizes"].tolist()
            is_tiled = [n == 1 for n in image_counts for _ in range(n)]
            side = config.vision_config.image_size
            tiles = [
                image_size_to_num_patches(size, config.image_grid_pinpoints, side) if tiled else 1
                for size, tiled in zip(sizes, is_tiled, strict=True)
            ]
            out = counts.share_out(tiles, [1] * len(tiles), image_counts)
            start = sum(tiles)
        if inputs.get("pixel_values_videos") is not None:
            videos, frames = inputs["pixel_values_videos"].shape[:2]
            placeholders = counts.counts_of(tokens, config.video_token_id)
            each = sum(placeholders) // videos
            ranges = counts.share_out([frames] * videos, [each] * videos, placeholders, start)
            out = [a + b for a, b in zip(out, ranges, strict=True)]
        return out

    def visual_items(
        self, model_config: PreTrainedConfig, processor: object, inputs: dict[str, Tensor], media: Media
    ) -> list[VisualItem]:
        vision = model_config.vision_config
        side, patch = vision.image_size, vision.patch_size
        images, videos = geometry.split_media(media)
        pixels = inputs.get("pixel_values_videos")
        if images:
            pinpoints = [list(pair) for pair in model_config.image_grid_pinpoints]
            geometry.check_options(processor, "image_processor", {"image_grid_pinpoints": pinpoints})
            geometry.check_square(processor, "image_processor", inputs.get("pixel_values"), side, crops=True)
        if videos:
            geometry.check_square(processor, "video_processor", pixels, side)
        sizes = geometry.check_rows(inputs, "image_sizes", len(images), "images")
        per_prompt = inputs.get("batch_num_images")
        # as in the model: a single image of a sample is tiled, one of several is padded to a square
        image_counts = [1] * len(images) if per_prompt is None else torch.as_tensor(per_prompt).reshape(-1).tolist()
        tiled = [n == 1 for n in image_counts for _ in range(n)]
        items = []
        for i, (m, (height, width)) in enumerate(zip(images, sizes, strict=True)):
            if (m.height, m.width) != (height, width):
                raise LayoutError(
                    f"Image {i} is {m.width} x {m.height}, but image_sizes has {width} x {height}: pass the images in "
                    "the order in which the processor received them."
                )
            if tiled[i]:
                parts = [(View.BASE, _whole(m, side, patch)), (View.HIGHRES, _highres(m, model_config))]
            else:
                parts = [(View.WHOLE, _padded_square(m, side, patch)), (View.NONE, np.full((1, 4), np.nan))]
            items.append(geometry.image_item(i, m, parts))
        for i, m in enumerate(videos):
            if pixels is None or len(pixels) != len(videos) or pixels.shape[1] != m.n_frames:
                shape = None if pixels is None else tuple(pixels.shape[:2])
                raise LayoutError(
                    f"pixel_values_videos must be [video frame ...] with {len(videos)} videos and the {m.n_frames} "
                    f"frames of video {i}; got {shape}. The processor must not sample the frames again "
                    "(do_sample_frames=False)."
                )
            frames = geometry.frame_ranges(m.n_frames)
            items.append(geometry.video_item(i, m, _pooled(m, side, patch), frames, newlines=1))
        return geometry.in_prompt_order(items, inputs["input_ids"], *self.visual_token_ids(model_config))

    def vision_patches(self, item: VisualItem, config: PreTrainedConfig) -> Patches:
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        if item.kind == "video":
            frames = geometry.frame_ranges(item.n_frames)
            boxes, views = np.stack([_whole(item, side, patch)] * len(frames)), [View.FRAME] * len(frames)
            return Patches(boxes, frames, np.array(views, np.int8))
        if not (item.views == View.BASE).any():
            boxes, views = [geometry.no_box(_padded_square(item, side, patch))], [View.WHOLE]
        else:
            tiles = _tiles(item, config)
            boxes, views = [_whole(item, side, patch), *tiles], [View.BASE] + [View.HIGHRES] * len(tiles)
        return Patches(np.stack(boxes), np.full((len(views), 2), -1), np.array(views, np.int8))


#: an original picture: anything with a width and a height
Sized = ImageMedia | VideoMedia | VisualItem


def _whole(media: Sized, side: int, patch: int) -> Boxes:
    """The patches, row by row, of the picture resized to a square of `side` pixels without keeping its aspect."""
    return geometry.square_boxes(side // patch, patch, side, media.width, media.height)


def _pooled(media: VideoMedia, side: int, patch: int) -> Boxes:
    """As `_whole`, with the n x n grid resampled to ceil(n / 2) each way: each token covers an equal part of it."""
    n = side // patch
    half = math.ceil(n / 2)
    return geometry.square_boxes(half, n * patch / half, side, media.width, media.height)


def _padded_square(media: Sized, side: int, patch: int) -> Boxes:
    """The patches of the picture centred in a square of its longer edge, which is resized to `side` pixels."""
    n, square = side // patch, max(media.width, media.height)
    x, y = (
        geometry.inside(geometry.patch_cells(n, patch, side, square) - (square - length) // 2, length)
        for length in (media.width, media.height)
    )
    return geometry.grid_boxes(x, y)


def _canvas(media: Sized, config: PreTrainedConfig) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """For x and for y: pixels of the rectangle of tiles, of the picture resized into it, and of the picture.

    The picture keeps its aspect and is centred: one axis fills the canvas, the other is padded.
    """
    height, width = select_best_resolution((media.height, media.width), config.image_grid_pinpoints)
    scale_w, scale_h = width / media.width, height / media.height
    shown_w = width if scale_w < scale_h else min(math.ceil(media.width * scale_h), width)
    shown_h = min(math.ceil(media.height * scale_w), height) if scale_w < scale_h else height
    return (width, shown_w, media.width), (height, shown_h, media.height)


def _on_picture(cells: Cells, canvas: int, shown: int, length: int) -> Cells:
    """Cells in pixels of the original, clipped at its edges, from cells in pixels of the canvas."""
    return geometry.inside((cells - (canvas - shown) // 2) * (length / shown), length)


def _tiles(media: Sized, config: PreTrainedConfig) -> list[Boxes]:
    """The patches of every tile; tiles and patches are in row-major order."""
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    n = side // patch
    x, y = (
        [_on_picture(t * side + geometry.even_cells(n, n * patch), *axis) for t in range(axis[0] // side)]
        for axis in _canvas(media, config)
    )
    return [geometry.no_box(geometry.grid_boxes(column, row)) for row in y for column in x]


def _highres(media: ImageMedia, config: PreTrainedConfig) -> Boxes:
    """The tiled grid without its padding, row by row, with a newline token at the end of each row."""
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    x_axis, y_axis = _canvas(media, config)
    n, width, height = side // patch, media.width, media.height
    n_rows, n_cols = y_axis[0] // side * n, x_axis[0] // side * n
    # the model removes padding in whole patches, so a remaining patch may cover padding only
    cut_x = cut_y = 0
    if width / height > n_cols / n_rows:
        cut_y = (n_rows - int(round(height * (n_cols / width), 7))) // 2
    else:
        cut_x = (n_cols - int(round(width * (n_rows / height), 7))) // 2
    kept_w, kept_h = n_cols - 2 * cut_x, n_rows - 2 * cut_y
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(kept_h * kept_w / (most * n**2))
    out_w, out_h = (int(kept_w // ratio), int(kept_h // ratio)) if ratio > 1.1 else (kept_w, kept_h)

    x = _across_tiles(cut_x + geometry.even_cells(out_w, kept_w), n, side, patch)
    y = _across_tiles(cut_y + geometry.even_cells(out_h, kept_h), n, side, patch)
    newline = [[np.nan, np.nan]]
    return geometry.grid_boxes(np.concatenate([_on_picture(x, *x_axis), newline]), _on_picture(y, *y_axis))


def _across_tiles(cells: Cells, n: int, side: int, patch: int) -> Cells:
    """Cells in pixels of tiles `side` wide, from cells in patches, `n` a tile; a tile may end in an uncovered strip."""
    slack = 1e-9  # cells of a resampled grid end at fractions of a patch
    first_tile, last_tile = np.floor(cells[:, 0] / n + slack), np.ceil(cells[:, 1] / n - slack) - 1
    tile = np.stack([first_tile, last_tile], -1)  # [cell 2]
    return tile * side + (cells - tile * n) * patch


def _images_of_samples(inputs: Mapping[str, Any], config: PreTrainedConfig) -> list[int]:
    """Number of images of each sample of a batch."""
    has_images = [n > 0 for n in counts.counts_of(inputs["input_ids"], config.image_token_id)]
    per_prompt = inputs.get("batch_num_images")
    image_counts = [1] * sum(has_images) if per_prompt is None else per_prompt.flatten().tolist()
    if len(image_counts) != sum(has_images):
        image_counts = [n for n in image_counts if n]
    if len(image_counts) != sum(has_images) or sum(image_counts) != len(inputs["image_sizes"]):
        raise InputError(
            f"{len(inputs['image_sizes'])} images for {sum(has_images)} samples with image placeholders: pass "
            "`batch_num_images`, the number of images of each, which the processor returns."
        )
    remaining = iter(image_counts)
    return [next(remaining) if has else 0 for has in has_images]
