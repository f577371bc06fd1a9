"""What differs between the families when a toy is trained: page placeholders, pixels, and a forward without loops.

Each class gives the same numbers as the processor and the official forward, faster; `check_format` in `train_toy.py`
and the tests compare them.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers import AttentionInterface

from hooked_mllm.toys.configs import MERGE, PATCH, TILE
from hooked_mllm.toys.render import GRID, PAGE
from hooked_mllm.toys.vocabulary import IMAGE_TOKEN

# a name with "flash" in it has Qwen3-VL's vision tower hand over all images in one call instead of one by one
PACKED = "toy_flash_packed"
CELLS = GRID * GRID
SIDE = GRID * MERGE


class Qwen3VL:
    """Pages packed into one sequence of patches, positions given."""

    lr, vision_attention, pixels = 3e-3, PACKED, "pixel_values"

    def __init__(self) -> None:
        AttentionInterface.register(PACKED, self.attend)

    @staticmethod
    def attend(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        """All pages are of one size, so the packed sequence is a plain batch of pages."""
        pages = [t.unflatten(2, (-1, SIDE * SIDE))[0].transpose(0, 1) for t in (query, key, value)]
        z = F.scaled_dot_product_attention(*pages, scale=scaling)
        return z.transpose(1, 2).flatten(0, 1)[None], None

    @staticmethod
    def placeholders(pages: int) -> str:
        """The text of so many pages in the prompt."""
        return ("<|vision_start|>" + IMAGE_TOKEN * CELLS + "<|vision_end|>") * pages

    @staticmethod
    def views(pixels: torch.Tensor) -> torch.Tensor:
        """What of the pages `[page 3 96 96]`, uint8, the vision tower is shown."""
        return pixels

    @staticmethod
    def model_pixels(views: torch.Tensor, pages: int) -> torch.Tensor:
        """The processor's `pixel_values`."""
        x = normalised(views).view(-1, 3, GRID, MERGE, PATCH, GRID, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
        return x[:, :, :, :, :, :, None].expand(*x.shape[:6], 2, PATCH, PATCH).reshape(-1, 3 * 2 * PATCH * PATCH)

    def logits(self, model, views: torch.Tensor, ids: torch.Tensor, pages: int) -> torch.Tensor:
        """`[sample pos word]`."""
        # the pages as one "video" of so many frames: the same numbers, without a Python loop over the pages
        grid = torch.tensor([[len(views), SIDE, SIDE]], device=ids.device)
        return model(
            input_ids=ids,
            pixel_values=self.model_pixels(views, pages),
            image_grid_thw=grid,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            position_ids=self.positions(model, pages, ids.shape[1]).to(ids.device).expand(3, len(ids), -1),
            use_cache=False,
        ).logits

    @lru_cache(maxsize=512)  # noqa: B019  one object a run
    def positions(self, model, pages: int, n: int) -> torch.Tensor:
        """The three rotary position ids, the same for every sequence of a batch: `[3 1 pos]`."""
        ids = torch.full((1, n), model.config.text_config.pad_token_id)
        span = CELLS + 2
        for page in range(pages):
            ids[0, 3 + page * span : 3 + page * span + CELLS] = model.config.image_token_id
        grid = torch.tensor([[1, SIDE, SIDE]] * pages)
        kinds = (ids == model.config.image_token_id).int()
        return model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)[0].to(model.device)

    def seen_by(self, pages: int, cell: int) -> torch.Tensor:
        """Where in the prompt the tokens that see the cell are, one row a page."""
        return self.cell_tokens(pages)[:, cell]

    @staticmethod
    def pages(views: torch.Tensor, ids: torch.Tensor) -> int:
        """Pages a sample."""
        return len(views) // len(ids)

    @staticmethod
    def cell_tokens(pages: int) -> torch.Tensor:
        """Where in the prompt the tokens that see one cell each are: `[page cell token]`."""
        return 3 + (CELLS + 2) * torch.arange(pages)[:, None, None] + torch.arange(CELLS)[:, None]

    @staticmethod
    def official(pages: int, samples: int) -> dict:
        """What the official forward needs besides tokens and pixels."""
        return {"image_grid_thw": torch.tensor([[1, SIDE, SIDE]] * pages * samples)}


class LlavaOnevision:
    """One page: base view and high-resolution rows with newlines. Several: one view and one newline each."""

    lr, vision_attention, pixels = 2e-3, "sdpa", "pixel_values"

    @staticmethod
    def placeholders(pages: int) -> str:
        """The text of so many pages in the prompt."""
        return "<image>" * (CELLS + GRID * (GRID + 1) if pages == 1 else pages * (CELLS + 1))

    @staticmethod
    def views(pixels: torch.Tensor) -> torch.Tensor:
        """What of the pages `[page 3 96 96]`, uint8, the vision tower is shown."""
        return pixels

    @staticmethod
    def model_pixels(views: torch.Tensor, pages: int) -> torch.Tensor:
        """The processor's `pixel_values`: a page of 96 x 96 px is its own base view and its only tile."""
        return normalised(views)[:, None].expand(-1, 2 if pages == 1 else 1, -1, -1, -1)

    def logits(self, model, views: torch.Tensor, ids: torch.Tensor, pages: int) -> torch.Tensor:
        """`[sample pos word]`."""
        inner = model.model
        seen = inner.vision_tower.encoder(inputs_embeds=inner.vision_tower.embeddings(normalised(views)))
        cells = inner.multi_modal_projector(seen.last_hidden_state)
        if pages == 1:
            rows = cells.unflatten(1, (GRID, GRID))
            rows = torch.cat([rows, inner.image_newline.expand(len(rows), GRID, 1, -1)], 2).flatten(1, 2)
            tokens = torch.cat([cells, rows], 1)
        else:
            tokens = torch.cat([cells, inner.image_newline.expand(len(cells), 1, -1)], 1)
        embeddings = inner.language_model.embed_tokens(ids)
        placeholder = (ids == model.config.image_token_id)[..., None].expand_as(embeddings)
        embeddings = embeddings.masked_scatter(placeholder, tokens.to(embeddings.dtype))
        hidden = inner.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return model.lm_head(hidden)

    def seen_by(self, pages: int, cell: int) -> torch.Tensor:
        """Where in the prompt the tokens that see the cell are, one row a page."""
        return self.cell_tokens(pages)[:, cell]

    @staticmethod
    def pages(views: torch.Tensor, ids: torch.Tensor) -> int:
        """Pages a sample."""
        return len(views) // len(ids)

    @staticmethod
    def cell_tokens(pages: int) -> torch.Tensor:
        """Where in the prompt the tokens that see one cell each are: `[page cell token]`."""
        cell = torch.arange(CELLS)
        if pages == 1:
            return 2 + torch.stack([cell, CELLS + cell // GRID * (GRID + 1) + cell % GRID], -1)[None]
        return 2 + (CELLS + 1) * torch.arange(pages)[:, None, None] + cell[:, None]

    @staticmethod
    def official(pages: int, samples: int) -> dict:
        """What the official forward needs besides tokens and pixels."""
        sizes = torch.tensor([[PAGE, PAGE]] * pages * samples)
        return {"image_sizes": sizes, "batch_num_images": torch.tensor([pages] * samples)}


class InternVL:
    """Four tiles and a thumbnail a page; the official forward has no loop."""

    lr, vision_attention, pixels = 3e-3, "sdpa", "pixel_values"

    @staticmethod
    def placeholders(pages: int) -> str:
        """The text of so many pages in the prompt."""
        return ("<img>" + "<IMG_CONTEXT>" * (CELLS + CELLS // 4) + "</img>") * pages

    @staticmethod
    def views(pixels: torch.Tensor) -> torch.Tensor:
        """What of the pages `[page 3 96 96]`, uint8, the vision tower is shown: four quarters and the thumbnail."""
        quarters = pixels.unflatten(2, (2, TILE)).unflatten(4, (2, TILE)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        small = resize(pixels, [TILE, TILE], interpolation=InterpolationMode.BICUBIC, antialias=True)
        return torch.cat([quarters, small[:, None]], 1).flatten(0, 1)

    @staticmethod
    def model_pixels(views: torch.Tensor, pages: int) -> torch.Tensor:
        """The processor's `pixel_values`."""
        return normalised(views)

    def logits(self, model, views: torch.Tensor, ids: torch.Tensor, pages: int) -> torch.Tensor:
        """`[sample pos word]`."""
        return model(input_ids=ids, pixel_values=normalised(views), use_cache=False).logits

    def seen_by(self, pages: int, cell: int) -> torch.Tensor:
        """Where in the prompt the tokens that see the cell are, one row a page."""
        row, col, half = cell // GRID, cell % GRID, GRID // 2
        thumbnail = CELLS + row // 2 * half + col // 2  # after the tiles, one token for 2 x 2 cells
        tile = self.cell_tokens(pages)[:, cell]
        return torch.cat([tile, self.cell_tokens(pages)[:, :1, 0] + thumbnail], -1)

    @staticmethod
    def pages(views: torch.Tensor, ids: torch.Tensor) -> int:
        """Pages a sample."""
        return len(views) // 5 // len(ids)

    @staticmethod
    def cell_tokens(pages: int) -> torch.Tensor:
        """Where in the prompt the tokens that see one cell each are: `[page cell token]`."""
        row, col = torch.arange(CELLS) // GRID, torch.arange(CELLS) % GRID
        half = GRID // 2
        in_page = (row // half * 2 + col // half) * half * half + row % half * half + col % half
        return 3 + (CELLS + CELLS // 4 + 2) * torch.arange(pages)[:, None, None] + in_page[:, None]

    @staticmethod
    def official(pages: int, samples: int) -> dict:
        """What the official forward needs besides tokens and pixels."""
        return {}


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1]."""
    return (pixels.float() / 255 - 0.5) / 0.5


FAMILIES = {"qwen3_vl": Qwen3VL, "llava_onevision": LlavaOnevision, "internvl": InternVL}
