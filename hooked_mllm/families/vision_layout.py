"""VisionLayout: the pixels of each position of a vision tower's activations, for one sample."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedConfig

from hooked_mllm.errors import LayoutError
from hooked_mllm.families.base import Family
from hooked_mllm.layout.items import Patches, View, VisualItem, find_item, find_view
from hooked_mllm.layout.kinds import Kind
from hooked_mllm.layout.layout import TokenLayout
from hooked_mllm.layout.regions import Number, RegionInput


@dataclass(frozen=True, eq=False)
class VisionLayout:
    """The positions of a vision tower's activations, as a `TokenLayout`, row after row."""

    layout: TokenLayout
    tile: Int[Tensor, " pos"]  # number of the tile among those of its image; -1 outside of tiles
    shape: tuple[int, int]  # rows and positions of an activation

    @classmethod
    def of(cls, family: Family, config: PreTrainedConfig, layout: TokenLayout) -> "VisionLayout":
        """The positions from which the visual tokens of a sample, of token layout `layout`, are computed."""
        if not layout.items:
            raise LayoutError(
                "This input has no image and no video, so its vision tower does not run: pass a sample with one."
            )
        patches = [family.vision_patches(item, config) for item in layout.items]
        items = tuple(_item(i, p) for i, p in zip(layout.items, patches, strict=True))
        number = np.repeat(np.arange(len(items), dtype=np.int32), [len(i) for i in items])
        positions = TokenLayout(
            kinds=torch.full((len(number),), Kind.VISUAL, dtype=torch.int8),
            item=torch.from_numpy(number),
            boxes=torch.from_numpy(np.concatenate([i.boxes for i in items])).double(),
            frame_range=torch.from_numpy(np.concatenate([i.frames for i in items])).int(),
            view=torch.from_numpy(np.concatenate([i.views for i in items])),
            items=items,
            last_index=len(number) - 1,
        )
        width = len(number) if family.vision.packed else patches[0].boxes.shape[1]
        tile = torch.from_numpy(np.concatenate([_tiles(p) for p in patches]))
        return cls(positions, tile, (len(number) // width, width))

    def select(
        self,
        region: RegionInput | None = None,
        *,
        image: int | None = None,
        video: int | None = None,
        view: str | None = None,
        tile: int | None = None,
        min_overlap: Number = 0.0,
    ) -> Bool[Tensor, "row pos"]:
        """A mask of positions by the pixels that they cover; see `HookedMLLM.vision_positions`."""
        layout = self.layout
        mask = layout.pixels if region is None else layout.region(region, image, video, min_overlap)  # [pos]
        items = range(len(layout.items))
        if image is not None or video is not None:
            items = [find_item(layout.items, image, video)]
            mask = mask & (layout.item == items[0])
        if view is not None:
            with_view = [i for i in items if (layout.items[i].views == View.__members__.get(view.upper(), -1)).any()]
            mask = mask & (layout.view == find_view(layout.items[(with_view or items)[0]], view))
        if tile is not None:
            of_items = torch.isin(layout.item, torch.tensor([*items]))
            count = int(self.tile[of_items].max()) + 1
            if not 0 <= tile < count:
                have = f"they have tiles 0 to {count - 1}" if count else "they are not cut into tiles"
                names = ", ".join(layout.items[i].name for i in items)
                raise LayoutError(f"There is no tile {tile} in {names}: {have}.")
            mask = mask & (self.tile == tile)
        if not mask.any():
            raise LayoutError(f"No position of the vision tower sees {region!r} in {view=}, {tile=}.")
        return mask.reshape(self.shape)  # [pos] -> [row pos]


def _item(item: VisualItem, patches: Patches) -> VisualItem:
    """An image or video of which the tower's positions replace the tokens."""
    width = patches.boxes.shape[1]
    boxes = patches.boxes.reshape(-1, 4)  # [row pos 4] -> [row * pos 4]
    views = np.where(np.isnan(boxes[:, 0]), np.int8(View.NONE), patches.views.repeat(width))
    frames = patches.frames.repeat(width, axis=0)
    return VisualItem(item.kind, item.index, item.width, item.height, boxes, frames, views, item.times_s)


def _tiles(patches: Patches) -> Int[np.ndarray, " pos"]:
    """The number of the tile of each position."""
    tiled = np.isin(patches.views, (View.TILE, View.HIGHRES))
    return np.where(tiled, tiled.cumsum() - 1, -1).repeat(patches.boxes.shape[1])
