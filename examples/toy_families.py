"""The pages of each family's toy in training: placeholders, pixels, and a forward pass without Python loops.

Each class computes the same numbers as the processor and the official forward pass, faster; `check_format` in
`train_toy.py` and the tests compare them.
"""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers import AttentionInterface, PreTrainedModel

from hooked_mllm.toys.build import MERGE, TILE
from hooked_mllm.toys.render import GRID, PAGE
from hooked_mllm.toys.vocabulary import IMAGE_TOKEN

#: with "flash" in the name, Qwen3-VL's vision tower passes all images to attention in one call, not one by one
PACKED = "toy_flash_packed"
CELLS = GRID * GRID
SIDE = GRID * MERGE


class Medium(ABC):
    """The pages, or the moments of a video, of one family. A view is a picture that the vision tower encodes."""

    lr: ClassVar[float]
    vision_attention: ClassVar[str] = "sdpa"
    #: the processor's name of the pixels
    pixels: ClassVar[str] = "pixel_values"
    views_per_page: ClassVar[int] = 1

    @staticmethod
    @abstractmethod
    def placeholders(pages: int) -> str:
        """The text of `pages` pages in the prompt."""

    @staticmethod
    def views(pixels: UInt8[Tensor, "page 3 96 96"]) -> UInt8[Tensor, "view 3 height width"]:
        """The views of the pages."""
        return pixels

    @staticmethod
    @abstractmethod
    def model_pixels(views: UInt8[Tensor, "view 3 height width"], pages: int) -> Float[Tensor, "..."]:
        """The processor's pixels."""

    @abstractmethod
    def logits(
        self, model: PreTrainedModel, views: Tensor, ids: Int[Tensor, "sample pos"], pages: int
    ) -> Float[Tensor, "sample pos word"]:
        """The logits of samples with `pages` pages each."""

    @classmethod
    def pages(cls, views: Tensor, ids: Int[Tensor, "sample pos"]) -> int:
        """Number of pages per sample."""
        return len(views) // cls.views_per_page // len(ids)

    @staticmethod
    @abstractmethod
    def cell_tokens(pages: int) -> Int[Tensor, "page cell token"]:
        """Positions in the prompt of the tokens that see exactly one cell."""

    def seen_by(self, pages: int, cell: int) -> Int[Tensor, "page token"]:
        """Positions in the prompt of all tokens that see the cell."""
        return self.cell_tokens(pages)[:, cell]

    @staticmethod
    def official(pages: int, samples: int) -> dict[str, Tensor]:
        """The arguments of the official forward pass in addition to tokens and pixels."""
        return {}


class Qwen3VL(Medium):
    """Pages packed into one sequence of patches, with explicit positions."""

    lr, vision_attention = 3e-3, PACKED

    def __init__(self) -> None:
        AttentionInterface.register(PACKED, self.attend)

    @staticmethod
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of the packed sequence, which is a batch of pages because all pages have one size."""
        to_pages = "1 head (page patch) d_head -> page head patch d_head"
        pages = [rearrange(x, to_pages, patch=SIDE * SIDE) for x in (query, key, value)]
        z = F.scaled_dot_product_attention(*pages, scale=scaling)
        return rearrange(z, "page head patch d_head -> 1 (page patch) head d_head"), None

    @staticmethod
    def placeholders(pages: int) -> str:
        """The text of `pages` pages in the prompt."""
        return ("<|vision_start|>" + IMAGE_TOKEN * CELLS + "<|vision_end|>") * pages

    @staticmethod
    def model_pixels(views: UInt8[Tensor, "view 3 height width"], pages: int) -> Float[Tensor, "patch value"]:
        """The processor's `pixel_values`."""
        # the patches of a merged cell follow one another; a temporal patch repeats the picture
        patches = "view channel (y my py) (x mx px) -> (view y x my mx) (channel time py px)"
        return repeat(normalised(views), patches, y=GRID, my=MERGE, x=GRID, mx=MERGE, time=2)

    def logits(
        self, model: PreTrainedModel, views: Tensor, ids: Int[Tensor, "sample pos"], pages: int
    ) -> Float[Tensor, "sample pos word"]:
        """The logits of samples with `pages` pages each."""
        # all pages as one "video" of as many frames: the same numbers, without a Python loop over pages
        grid = torch.tensor([[len(views), SIDE, SIDE]], device=ids.device)
        return model(
            input_ids=ids,
            pixel_values=self.model_pixels(views, pages),
            image_grid_thw=grid,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            position_ids=self.positions(model, pages, ids.shape[1]).to(ids.device).expand(3, len(ids), -1),
            use_cache=False,
        ).logits

    @lru_cache(maxsize=512)  # noqa: B019  one object per run
    def positions(self, model: PreTrainedModel, pages: int, n: int) -> Int[Tensor, "3 1 pos"]:
        """The three rotary position ids, which are equal for every sequence of a batch."""
        ids = torch.full((1, n), model.config.text_config.pad_token_id)
        span = CELLS + 2
        for page in range(pages):
            ids[0, 3 + page * span : 3 + page * span + CELLS] = model.config.image_token_id
        grid = torch.tensor([[1, SIDE, SIDE]] * pages)
        kinds = (ids == model.config.image_token_id).int()
        return model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)[0].to(model.device)

    @staticmethod
    def cell_tokens(pages: int) -> Int[Tensor, "page cell token"]:
        """Positions in the prompt of the tokens that see exactly one cell."""
        return 3 + (CELLS + 2) * torch.arange(pages)[:, None, None] + torch.arange(CELLS)[:, None]

    @staticmethod
    def official(pages: int, samples: int) -> dict[str, Tensor]:
        """The arguments of the official forward pass in addition to tokens and pixels."""
        return {"image_grid_thw": torch.tensor([[1, SIDE, SIDE]] * pages * samples)}


class LlavaOnevision(Medium):
    """A single page: a base view and high-resolution rows with newlines. One of several: one view and a newline."""

    lr = 2e-3

    @staticmethod
    def placeholders(pages: int) -> str:
        """The text of `pages` pages in the prompt."""
        return "<image>" * (CELLS + GRID * (GRID + 1) if pages == 1 else pages * (CELLS + 1))

    @staticmethod
    def model_pixels(views: UInt8[Tensor, "view 3 height width"], pages: int) -> Float[Tensor, "page tile 3 96 96"]:
        """The processor's `pixel_values`: a page of 96 x 96 px is its own base view and its only tile."""
        return normalised(views)[:, None].expand(-1, 2 if pages == 1 else 1, -1, -1, -1)

    def logits(
        self, model: PreTrainedModel, views: Tensor, ids: Int[Tensor, "sample pos"], pages: int
    ) -> Float[Tensor, "sample pos word"]:
        """The logits of samples with `pages` pages each."""
        inner = model.model
        encoded = inner.vision_tower.encoder(inputs_embeds=inner.vision_tower.embeddings(normalised(views)))
        cells = inner.multi_modal_projector(encoded.last_hidden_state)  # [view cell d_model]
        if pages == 1:
            rows = rearrange(cells, "view (row col) d_model -> view row col d_model", row=GRID)
            rows = torch.cat([rows, inner.image_newline.expand(len(rows), GRID, 1, -1)], 2)
            rows = rearrange(rows, "view row col d_model -> view (row col) d_model")
            tokens = torch.cat([cells, rows], 1)
        else:
            tokens = torch.cat([cells, inner.image_newline.expand(len(cells), 1, -1)], 1)
        embeddings = inner.language_model.embed_tokens(ids)
        placeholder = (ids == model.config.image_token_id)[..., None].expand_as(embeddings)
        embeddings = embeddings.masked_scatter(placeholder, tokens.to(embeddings.dtype))
        hidden = inner.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return model.lm_head(hidden)

    @staticmethod
    def cell_tokens(pages: int) -> Int[Tensor, "page cell token"]:
        """Positions in the prompt of the tokens that see exactly one cell."""
        cell = torch.arange(CELLS)
        if pages == 1:
            return 2 + torch.stack([cell, CELLS + cell // GRID * (GRID + 1) + cell % GRID], -1)[None]
        return 2 + (CELLS + 1) * torch.arange(pages)[:, None, None] + cell[:, None]

    @staticmethod
    def official(pages: int, samples: int) -> dict[str, Tensor]:
        """The arguments of the official forward pass in addition to tokens and pixels."""
        sizes = torch.tensor([[PAGE, PAGE]] * pages * samples)
        return {"image_sizes": sizes, "batch_num_images": torch.tensor([pages] * samples)}


class InternVL(Medium):
    """Four tiles and a thumbnail per page; the official forward pass has no loop."""

    lr, views_per_page = 3e-3, 5

    @staticmethod
    def placeholders(pages: int) -> str:
        """The text of `pages` pages in the prompt."""
        return ("<img>" + "<IMG_CONTEXT>" * (CELLS + CELLS // 4) + "</img>") * pages

    @staticmethod
    def views(pixels: UInt8[Tensor, "page 3 96 96"]) -> UInt8[Tensor, "view 3 48 48"]:
        """Four quarters and the thumbnail of each page."""
        quarters = rearrange(pixels, "page c (y height) (x width) -> page (y x) c height width", y=2, x=2)
        thumbnail = resize(pixels, [TILE, TILE], interpolation=InterpolationMode.BICUBIC, antialias=True)
        views = torch.cat([quarters, thumbnail[:, None]], 1)
        return rearrange(views, "page view c height width -> (page view) c height width")

    @staticmethod
    def model_pixels(views: UInt8[Tensor, "view 3 height width"], pages: int) -> Float[Tensor, "view 3 height width"]:
        """The processor's `pixel_values`."""
        return normalised(views)

    def logits(
        self, model: PreTrainedModel, views: Tensor, ids: Int[Tensor, "sample pos"], pages: int
    ) -> Float[Tensor, "sample pos word"]:
        """The logits of samples with `pages` pages each."""
        return model(input_ids=ids, pixel_values=normalised(views), use_cache=False).logits

    def seen_by(self, pages: int, cell: int) -> Int[Tensor, "page token"]:
        """Positions in the prompt of all tokens that see the cell: one of a tile and one of the thumbnail."""
        row, col, half = cell // GRID, cell % GRID, GRID // 2
        thumbnail = CELLS + row // 2 * half + col // 2  # after the tiles, one token per 2 x 2 cells
        tile = self.cell_tokens(pages)[:, cell]
        return torch.cat([tile, self.cell_tokens(pages)[:, :1, 0] + thumbnail], -1)

    @staticmethod
    def cell_tokens(pages: int) -> Int[Tensor, "page cell token"]:
        """Positions in the prompt of the tokens that see exactly one cell."""
        row, col = torch.arange(CELLS) // GRID, torch.arange(CELLS) % GRID
        half = GRID // 2
        in_page = (row // half * 2 + col // half) * half * half + row % half * half + col % half
        return 3 + (CELLS + CELLS // 4 + 2) * torch.arange(pages)[:, None, None] + in_page[:, None]


def normalised(pixels: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels as floats from -1 to 1."""
    return (pixels.float() / 255 - 0.5) / 0.5


FAMILIES: dict[str, type[Medium]] = {"qwen3_vl": Qwen3VL, "llava_onevision": LlavaOnevision, "internvl": InternVL}
