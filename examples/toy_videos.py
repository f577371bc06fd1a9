"""The videos of each family's toy, with the methods that `toy_families.py` has for pages; `pages` are moments here.

Each class gives the same numbers as the processor and the official forward, faster; `check_format` in `train_toy.py`
and the tests compare them.
"""

from functools import lru_cache

import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from toy_families import CELLS, SIDE, InternVL, LlavaOnevision, Qwen3VL, normalised

from hooked_mllm.toys.configs import MERGE, PATCH, TILE
from hooked_mllm.toys.render import FRAMES, GRID, VIDEO_GRID, VIDEO_SCALE
from hooked_mllm.toys.video_task import MOMENT_S
from hooked_mllm.toys.vocabulary import VIDEO_TOKEN

VIDEO_CELLS = VIDEO_GRID**2
# "< 0 . 2 seconds > <|vision_start|>" before the tokens of a moment, and "<|vision_end|>" after them
STAMP = 7


class Qwen3VLVideo(Qwen3VL):
    """A moment is one temporal patch of two frames: 36 tokens, 2 x 2 a cell, after its time in words."""

    pixels = "pixel_values_videos"

    @staticmethod
    def placeholders(pages: int) -> str:
        """The text of a video of so many moments in the prompt."""
        shown = "<|vision_start|>" + VIDEO_TOKEN * CELLS + "<|vision_end|>"
        middle = MOMENT_S * (FRAMES - 1) / FRAMES / 2
        moments = (f"<{moment * MOMENT_S + middle:.1f} seconds>{shown}" for moment in range(pages))
        return "<|vision_start|>" + "".join(moments) + "<|vision_end|>"

    @staticmethod
    def model_pixels(views: torch.Tensor, pages: int) -> torch.Tensor:
        """The processor's `pixel_values_videos`."""
        x = normalised(views).view(-1, FRAMES, 3, GRID, MERGE, PATCH, GRID, MERGE, PATCH)
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * FRAMES * PATCH * PATCH)

    def logits(self, model, views: torch.Tensor, ids: torch.Tensor, pages: int) -> torch.Tensor:
        """`[sample pos word]`."""
        grid = torch.tensor([[len(views) // FRAMES, SIDE, SIDE]], device=ids.device)
        return model(
            input_ids=ids,
            pixel_values_videos=self.model_pixels(views, pages),
            video_grid_thw=grid,
            mm_token_type_ids=2 * (ids == model.config.video_token_id).int(),
            position_ids=self.positions(model, pages, ids.shape[1]).to(ids.device).expand(3, len(ids), -1),
            use_cache=False,
        ).logits

    @lru_cache(maxsize=512)  # noqa: B019  one object a run
    def positions(self, model, pages: int, n: int) -> torch.Tensor:
        """The three rotary position ids, the same for every sequence of a batch: `[3 1 pos]`."""
        ids = torch.full((1, n), model.config.text_config.pad_token_id)
        ids[0, self.cell_tokens(pages).flatten()] = model.config.video_token_id
        grid = torch.tensor([[pages, SIDE, SIDE]])
        kinds = 2 * (ids == model.config.video_token_id).int()
        return model.model.get_rope_index(ids, mm_token_type_ids=kinds, video_grid_thw=grid)[0].to(model.device)

    @staticmethod
    def pages(views: torch.Tensor, ids: torch.Tensor) -> int:
        """Moments a sample."""
        return len(views) // FRAMES // len(ids)

    @staticmethod
    def cell_tokens(pages: int) -> torch.Tensor:
        """Where in the prompt the tokens that see one cell each are: `[moment cell token]`."""
        cell, part = torch.arange(VIDEO_CELLS)[:, None], torch.arange(VIDEO_SCALE**2)
        row = cell // VIDEO_GRID * VIDEO_SCALE + part // VIDEO_SCALE
        col = cell % VIDEO_GRID * VIDEO_SCALE + part % VIDEO_SCALE
        return 3 + STAMP + (STAMP + CELLS + 1) * torch.arange(pages)[:, None, None] + row * GRID + col

    @staticmethod
    def official(pages: int, samples: int) -> dict:
        """What the official forward needs besides tokens and pixels."""
        return {"video_grid_thw": torch.tensor([[pages, SIDE, SIDE]] * samples)}


class LlavaOnevisionVideo(LlavaOnevision):
    """A frame is 3 x 3 tokens, its 6 x 6 patches pooled; one newline token ends the video."""

    pixels = "pixel_values_videos"

    @staticmethod
    def placeholders(pages: int) -> str:
        """The text of a video of so many moments in the prompt."""
        return "<video>" * (pages * FRAMES * VIDEO_CELLS + 1)

    @staticmethod
    def model_pixels(views: torch.Tensor, pages: int) -> torch.Tensor:
        """The processor's `pixel_values_videos`."""
        return normalised(views).unflatten(0, (-1, pages * FRAMES))

    def logits(self, model, views: torch.Tensor, ids: torch.Tensor, pages: int) -> torch.Tensor:
        """`[sample pos word]`."""
        return model(input_ids=ids, pixel_values_videos=self.model_pixels(views, pages), use_cache=False).logits

    @staticmethod
    def pages(views: torch.Tensor, ids: torch.Tensor) -> int:
        """Moments a sample."""
        return len(views) // FRAMES // len(ids)

    @staticmethod
    def cell_tokens(pages: int) -> torch.Tensor:
        """Where in the prompt the tokens that see one cell each are: `[moment cell token]`."""
        frame = FRAMES * torch.arange(pages)[:, None, None] + torch.arange(FRAMES)
        return 2 + VIDEO_CELLS * frame + torch.arange(VIDEO_CELLS)[:, None]

    @staticmethod
    def official(pages: int, samples: int) -> dict:
        """What the official forward needs besides tokens and pixels."""
        return {}


class InternVLVideo(InternVL):
    """A frame is one tile of 48 x 48 px, 3 x 3 tokens, after its number in words."""

    @staticmethod
    def placeholders(pages: int) -> str:
        """The text of a video of so many moments in the prompt."""
        shown = "<img>" + "<IMG_CONTEXT>" * VIDEO_CELLS + "</img>"
        return "\n".join(f"Frame{frame + 1}: {shown}" for frame in range(pages * FRAMES))

    @staticmethod
    def views(pixels: torch.Tensor) -> torch.Tensor:
        """What of the frames `[frame 3 96 96]`, uint8, the vision tower is shown."""
        return resize(pixels, [TILE, TILE], interpolation=InterpolationMode.BICUBIC, antialias=True)

    @staticmethod
    def pages(views: torch.Tensor, ids: torch.Tensor) -> int:
        """Moments a sample."""
        return len(views) // FRAMES // len(ids)

    def seen_by(self, pages: int, cell: int) -> torch.Tensor:
        """Where in the prompt the tokens that see the cell are, one row a moment."""
        return self.cell_tokens(pages)[:, cell]

    @staticmethod
    def cell_tokens(pages: int) -> torch.Tensor:
        """Where in the prompt the tokens that see one cell each are: `[moment cell token]`."""
        frame = FRAMES * torch.arange(pages)[:, None, None] + torch.arange(FRAMES)
        # "frame 1 : <img>" before the tokens of a frame, and "</img>" after them
        return 2 + 4 + (VIDEO_CELLS + 5) * frame + torch.arange(VIDEO_CELLS)[:, None]


VIDEOS = {"qwen3_vl": Qwen3VLVideo, "llava_onevision": LlavaOnevisionVideo, "internvl": InternVLVideo}
