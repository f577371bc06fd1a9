"""Qwen3-VL, dense and mixture of experts: one packed vision tower, a 2 x 2 merger, DeepStack after the first blocks."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.families import counts, geometry
from hooked_mllm.families.base import Family, Rows
from hooked_mllm.families.parts import QWEN_DECODER, BlockParts, TowerParts
from hooked_mllm.layout.items import ImageMedia, Media, Patches, VideoMedia, View, VisualItem


class Qwen3VL(Family):
    """Qwen3-VL, transformers' own classes; they share their module names."""

    name = "qwen3_vl"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    model_classes = ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration")
    text = QWEN_DECODER
    vision = TowerParts(
        root="model.visual",
        blocks="model.visual.blocks",
        block=BlockParts(
            ln1="norm1",
            attn="attn",
            qkv="attn.qkv",
            o="attn.proj",
            ln2="norm2",
            mlp="mlp",
            mlp_in="mlp.linear_fc1",
            mlp_out="mlp.linear_fc2",
        ),
        causal=False,
        packed=True,
    )
    patch_embed = "model.visual.patch_embed"
    projector = "model.visual.merger"
    deepstack_arguments = ("deepstack_visual_embeds", "visual_pos_masks")

    def vision_heads(self, config: PreTrainedConfig) -> int:
        return config.vision_config.num_heads

    def n_deepstack(self, model: PreTrainedModel) -> int:
        return len(model.config.vision_config.deepstack_visual_indexes)

    def patch_embed_value(self, output: Tensor) -> Tensor:
        return output[None]  # [patch d_model] -> [1 patch d_model]

    def vision_out_module(self) -> tuple[str, Literal["input", "output"]]:
        return self.projector, "input"

    def vision_out_value(self, output: Any, model: PreTrainedModel) -> Tensor:
        return output[None]  # [pos d_model] -> [1 pos d_model]

    def vision_out_replace(self, value: Tensor, output: Any, model: PreTrainedModel) -> Any:
        return value[0]

    def visual_token_ids(self, config: PreTrainedConfig) -> tuple[int, ...]:
        return config.image_token_id, config.video_token_id

    def check_inputs(self, inputs: dict[str, Any], config: PreTrainedConfig) -> None:
        if inputs.get("mm_token_type_ids") is not None or inputs.get("position_ids") is not None:
            return
        ids = inputs.get("input_ids")
        if ids is not None and counts.placeholder_count(ids, self.visual_token_ids(config)):
            raise InputError(
                f"{self.name} needs `mm_token_type_ids` with images or videos: without them `generate` silently uses "
                "text positions for visual tokens. The processor returns them; pass everything that it returns, or use "
                "`model.prepare`."
            )

    def reset(self, model: PreTrainedModel) -> None:
        self.restore(model, None)  # otherwise the next text continuation is shifted

    def state(self, model: PreTrainedModel) -> Any:
        backbone: Any = model.get_submodule("model")
        return backbone.rope_deltas

    def restore(self, model: PreTrainedModel, state: Any) -> None:
        backbone: Any = model.get_submodule("model")
        backbone.rope_deltas = state

    def vision_rows(self, inputs: Mapping[str, Any], config: PreTrainedConfig) -> list[Rows]:
        tokens = inputs["input_ids"]
        out: list[Rows] = [[] for _ in range(len(tokens))]
        start = 0
        for name, token in (("image_grid_thw", config.image_token_id), ("video_grid_thw", config.video_token_id)):
            grid = inputs.get(name)
            if grid is None:
                continue
            patches = grid.prod(1).tolist()
            units = [n // config.vision_config.spatial_merge_size**2 for n in patches]
            ranges = counts.share_out(patches, units, counts.counts_of(tokens, token), start)
            out = [a + b for a, b in zip(out, ranges, strict=True)]
            start += sum(patches)
        return out

    def visual_items(
        self, model_config: PreTrainedConfig, processor: object, inputs: dict[str, Tensor], media: Media
    ) -> list[VisualItem]:
        vision = model_config.vision_config
        merge, per_step = vision.spatial_merge_size, vision.temporal_patch_size
        images, videos = geometry.split_media(media)
        built_for = {"patch_size": vision.patch_size, "merge_size": merge, "temporal_patch_size": per_step}
        for part, of_kind in (("image_processor", images), ("video_processor", videos)):
            if of_kind:
                geometry.check_options(processor, part, built_for)
        image_grids = geometry.check_rows(inputs, "image_grid_thw", len(images), "images")
        video_grids = geometry.check_rows(inputs, "video_grid_thw", len(videos), "videos")
        items = []
        for i, (m, (_, h, w)) in enumerate(zip(images, image_grids, strict=True)):
            boxes = _even_boxes(m, w // merge, h // merge)
            items.append(geometry.image_item(i, m, [(View.WHOLE, boxes)]))
        for i, (m, (t, h, w)) in enumerate(zip(videos, video_grids, strict=True)):
            frames = geometry.frame_ranges(m.n_frames, per_step)
            if len(frames) != t:
                raise LayoutError(
                    f"Video {i} has {m.n_frames} frames, so {len(frames)} steps of {per_step}, but the inputs hold {t} "
                    "steps. The processor must not sample the frames again (do_sample_frames=False)."
                )
            items.append(geometry.video_item(i, m, _even_boxes(m, w // merge, h // merge), frames))
        return geometry.in_prompt_order(items, inputs["input_ids"], *self.visual_token_ids(model_config))

    def vision_patches(self, item: VisualItem, config: PreTrainedConfig) -> Patches:
        # the patches of a token are neighbours in the packed row, where the merger joins them
        boxes = geometry.split_boxes(item.boxes, config.vision_config.spatial_merge_size)  # [token row col 4]
        step = len(item) // len(np.unique(item.frames[:, 0]))  # tokens of an image, or of the frames that share tokens
        return Patches(boxes.reshape(len(item) // step, -1, 4), item.frames[::step], item.views[::step])


def _even_boxes(media: ImageMedia | VideoMedia, columns: int, rows: int) -> geometry.Boxes:
    """The boxes of an even grid over a picture, row by row."""
    return geometry.grid_boxes(geometry.even_cells(columns, media.width), geometry.even_cells(rows, media.height))
