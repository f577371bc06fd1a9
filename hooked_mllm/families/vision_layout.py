"""Which position of a vision tower sees what: the layout of its activations, for one sample."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_mllm.errors import LayoutError
from hooked_mllm.families.base import Family
from hooked_mllm.layout.find import find_item, find_view
from hooked_mllm.layout.items import Patches, View, VisualItem
from hooked_mllm.layout.kinds import Kind
from hooked_mllm.layout.layout import TokenLayout
from hooked_mllm.layout.regions import Number


@dataclass(frozen=True, eq=False)
class VisionLayout:
    """The positions of a vision tower's activations.

    Attributes:
        layout: A `TokenLayout` of them, row after row.
        tile: The number of the tile that a position lies in, among those of its image; -1 elsewhere.
        shape: Rows and positions of an activation.
    """

    layout: TokenLayout
    tile: Int[Tensor, " pos"]
    shape: tuple[int, int]

    @classmethod
    def of(cls, family: Family, config: Any, layout: TokenLayout) -> "VisionLayout":
        """The positions that make the visual tokens of a sample.

        Raises:
            LayoutError: for a sample without pictures.
        """
        if not layout.items:
            raise LayoutError("This input has no image and no video: its vision tower does not run.")
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
        region: Any = None,
        *,
        image: int | None = None,
        video: int | None = None,
        view: str | None = None,
        tile: int | None = None,
        min_overlap: Number = 0.0,
    ) -> Bool[Tensor, "row pos"]:
        """Positions by what they see; see `HookedMLLM.vision_positions`."""
        layout = self.layout
        found = layout.pixels if region is None else layout.region(region, image, video, min_overlap)
        chosen = range(len(layout.items))
        if image is not None or video is not None:
            chosen = [find_item(layout.items, image, video)]
            found = found & (layout.item == chosen[0])
        if view is not None:
            named = [i for i in chosen if (layout.items[i].views == View.__members__.get(view.upper(), -1)).any()]
            found = found & (layout.view == find_view(layout.items[(named or chosen)[0]], view))
        if tile is not None:
            inside = torch.isin(layout.item, torch.tensor([*chosen]))
            count = int(self.tile[inside].max()) + 1
            if not 0 <= tile < count:
                have = f"they have tiles 0 to {count - 1}" if count else "they are not cut into tiles"
                names = ", ".join(layout.items[i].name for i in chosen)
                raise LayoutError(f"There is no tile {tile} in {names}: {have}.")
            found = found & (self.tile == tile)
        if not found.any():
            raise LayoutError(f"No position of the vision tower sees {region!r} in {view=}, {tile=}.")
        return found.reshape(self.shape)


def _item(item: VisualItem, patches: Patches) -> VisualItem:
    """An image or video with the tower's positions in place of its tokens."""
    width = patches.boxes.shape[1]
    boxes = patches.boxes.reshape(-1, 4)
    views = np.where(np.isnan(boxes[:, 0]), np.int8(View.NONE), patches.views.repeat(width))
    frames = patches.frames.repeat(width, axis=0)
    return VisualItem(item.kind, item.index, item.width, item.height, boxes, frames, views, item.times_s)


def _tiles(patches: Patches) -> Int[np.ndarray, " pos"]:
    tiled = np.isin(patches.views, (View.TILE, View.HIGHRES))
    return np.where(tiled, tiled.cumsum() - 1, -1).repeat(patches.boxes.shape[1])
