"""Coordinate images: pictures whose red is x, green is y and blue is one, at the centre of every pixel.

After a real processor without rescaling, the values of each patch are its position in the original picture. After the
model's own packing code, the values of a token are the pixels that it covers; no weight is involved.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from transformers import (
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
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel, image_size_to_num_patches
from transformers.video_utils import VideoMetadata

from helpers.tiny_text import no_processor, tiny_tokenizer
from hooked_mllm.families import family_of
from hooked_mllm.layout import ImageMedia, TokenLayout, VideoMedia

PINPOINTS = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]
RAW = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
NEWLINE = -7.0


def coordinate_image(width: int, height: int, blue: float = 1.0) -> torch.Tensor:
    """float [channel height width]: x, y and a constant."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y, torch.full_like(x, blue)])


def coordinate_video(n: int, width: int, height: int) -> torch.Tensor:
    """float [frame channel height width]; blue counts the frames from 1."""
    return torch.stack([coordinate_image(width, height, blue=i + 1) for i in range(n)])


def real(family: str, *, max_patches: int = 12):
    """Config and processor of the real sizes (patches, tiles, views, pixel limits), around a tiny tokenizer.

    Raises:
        ValueError: For a family without a processor here.
    """
    tokenizer = tiny_tokenizer(family)
    ids = tokenizer.convert_tokens_to_ids
    if family == "qwen3_vl":
        patches = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
        config = Qwen3VLConfig(
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_config={"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
        )
        processor = Qwen3VLProcessor(
            Qwen2VLImageProcessor(size={"shortest_edge": 65536, "longest_edge": 16777216}, **patches),
            tokenizer,
            Qwen3VLVideoProcessor(size={"shortest_edge": 4096, "longest_edge": 25165824}, **patches),
        )
    elif family == "llava_onevision":
        config = LlavaOnevisionConfig(
            image_token_index=ids("<image>"),
            video_token_index=ids("<video>"),
            image_grid_pinpoints=PINPOINTS,
            vision_config={"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14},
        )
        view = {"height": 384, "width": 384}
        processor = LlavaOnevisionProcessor(
            # the mean is what squares are padded with: zero, which no pixel of the picture has
            LlavaOnevisionImageProcessor(size=view, image_grid_pinpoints=PINPOINTS, image_mean=[0.0, 0.0, 0.0]),
            tokenizer,
            LlavaOnevisionVideoProcessor(size=view),
            num_image_tokens=729,
            vision_feature_select_strategy="full",
        )
    elif family == "internvl":
        config = InternVLConfig(image_token_id=ids("<IMG_CONTEXT>"))
        tile = {"height": 448, "width": 448}
        processor = InternVLProcessor(
            GotOcr2ImageProcessor(size=tile, crop_to_patches=True, min_patches=1, max_patches=max_patches),
            tokenizer,
            InternVLVideoProcessor(size=tile),
            image_seq_length=256,
        )
    else:
        raise no_processor(family)
    return config, processor


@dataclass
class Seen:
    """What tokens saw: mean x, y; the centre of the picture in them (nan if none), its share; the outermost pixels."""

    mean: np.ndarray  # [token 2]
    centre: np.ndarray  # [token 2]
    weight: np.ndarray  # [token]
    low: np.ndarray  # [token 2]
    high: np.ndarray  # [token 2]
    newline: np.ndarray  # [token]


def per_patch(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """[n channel side side] -> [n grid grid 7]: sums of x, y, one over the patch's pixels, and their extremes."""
    grid = pixels.shape[-1] // patch
    cut = pixels[..., : grid * patch, : grid * patch]
    cells = cut.reshape(len(cut), 3, grid, patch, grid, patch)
    return _measure(cells, (3, 5)).permute(0, 2, 3, 1)


def _measure(cells: torch.Tensor, over: tuple[int, ...]) -> torch.Tensor:
    """[n channel ... pixel ...] -> [n 7 ...]."""
    xy, seen = cells[:, :2], cells[:, 2:3] > 0.5
    everywhere = bool(seen.all())
    low = (xy if everywhere else torch.where(seen, xy, torch.inf)).amin(over)
    high = (xy if everywhere else torch.where(seen, xy, -torch.inf)).amax(over)
    return torch.cat([cells.mean(over), low, high], 1)


def seen(tokens: torch.Tensor) -> Seen:
    """From [token 7]."""
    t = tokens.double().numpy()
    newline = t[:, 2] == NEWLINE
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = np.where((t[:, 2:3] > 0.02), t[:, :2] / t[:, 2:3], np.nan)
    return Seen(t[:, :2], centre, t[:, 2], t[:, 3:5], t[:, 5:7], newline)


def _merge(groups: torch.Tensor) -> torch.Tensor:
    """[token member 7] -> [token 7]: patches that make one token together."""
    return torch.cat([groups[..., :3].mean(1), groups[..., 3:5].amin(1), groups[..., 5:7].amax(1)], -1)


def qwen_tokens(pixel_values: torch.Tensor, frame: int = 0) -> torch.Tensor:
    """[patch channel*time*16*16] -> [token 7], of the first or second frame of each pair."""
    cells = pixel_values.reshape(-1, 3, 2, 256)[:, :, frame]
    return _merge(_measure(cells, (2,)).reshape(-1, 4, 7))


def llava_tokens(config, inputs: dict) -> list[torch.Tensor]:
    """Tokens of each image by the model's own packing: tiles stitched, unpadded, resampled, newlines put in."""
    alone = [n == 1 for n in inputs["batch_num_images"].tolist() for _ in range(n)]
    features = []
    for tiles, single, size in zip(inputs["pixel_values"], alone, inputs["image_sizes"], strict=True):
        n = image_size_to_num_patches(size, config.image_grid_pinpoints, 384) if single else 1
        features.append(per_patch(tiles[:n], 14).flatten(1, 2))
    host = SimpleNamespace(config=config)
    newline = torch.full((7,), NEWLINE)
    return LlavaOnevisionModel.pack_image_features(host, features, inputs["image_sizes"], image_newline=newline)[0]


def llava_video_tokens(config, pixels: torch.Tensor) -> torch.Tensor:
    """[frame channel 384 384] -> [token 7] by the model's own pooling; the newline is not part of it."""
    host = SimpleNamespace(config=config)
    return LlavaOnevisionModel.apply_pooling(host, per_patch(pixels, 14).flatten(1, 2)).flatten(0, 1)


def internvl_tokens(pixels: torch.Tensor) -> torch.Tensor:
    """[tile channel 448 448] -> [token 7] by the model's own pixel shuffle."""
    shuffled = InternVLModel.pixel_shuffle(SimpleNamespace(), per_patch(pixels, 14).contiguous())
    return _merge(shuffled.reshape(-1, 4, 7))


def layout_of(config, processor, inputs, media) -> TokenLayout:
    """The layout that the family's geometry makes of what the processor returned."""
    family = family_of(config)
    items = family.visual_items(config, processor, dict(inputs), tuple(media))
    return TokenLayout.build(inputs["input_ids"][0], items, family.visual_token_ids(config), {})


def media_of(*originals: torch.Tensor, fps: float = 2.0) -> list[ImageMedia | VideoMedia]:
    """Sizes of images [channel height width] and videos [frame channel height width]."""
    out = []
    for o in originals:
        height, width = o.shape[-2:]
        times = tuple(i / fps for i in range(len(o)))
        out.append(ImageMedia(width, height) if o.ndim == 3 else VideoMedia(width, height, len(o), times))
    return out


def metadata(n: int, fps: float = 2.0) -> VideoMetadata:
    """As for frames that are already sampled."""
    return VideoMetadata(total_num_frames=n, fps=fps, frames_indices=list(range(n)))


def centre_error(boxes: np.ndarray, saw: Seen) -> np.ndarray:
    """Largest of |dx|, |dy| in original pixels, for each token."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.abs(centre - saw.centre).max(-1)
