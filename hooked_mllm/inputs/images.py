"""Pictures in any form as upright RGB images, which is what processors take."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hooked_mllm.errors import InputError

#: one picture: a path, a PIL image, or an array `[height width channel]`, `[channel height width]` or `[height width]`
ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
#: one picture, or several; an array of four axes is several
Images = ImageInput | Sequence[ImageInput]

T = TypeVar("T")

_CHANNELS = (1, 3, 4)


def load_image(image: ImageInput) -> Image.Image:
    """One picture as a PIL image in RGB, upright.

    EXIF orientation is applied, palettes and greys are expanded, transparent pixels become white, 16-bit greys are
    reduced to 8.

    Args:
        image: A path, a PIL image, or an array `[height width channel]`, `[channel height width]` or `[height width]`,
            of integers from 0 to 255 or floats from 0 to 1.

    Raises:
        InputError: No such file, not a picture, another shape or range, NaN or infinity among the pixels.

    Examples:
        >>> import numpy as np
        >>> load_image(np.zeros((4, 6, 3), dtype=np.uint8)).size
        (6, 4)
    """
    if isinstance(image, str | os.PathLike):
        return _rgb(_open(image))
    if isinstance(image, Image.Image):
        return _rgb(image)
    if isinstance(image, np.ndarray | Tensor):
        pixels = to_uint8(image, "An image")
        if pixels.ndim == 2:
            pixels = pixels[..., None]  # [height width] -> [height width 1]
        if pixels.ndim != 3 or 0 in pixels.shape:
            raise InputError(
                "An image array has shape [height width channel], [channel height width] or [height width]; got "
                f"{tuple(image.shape)}."
            )
        pixels = channels_last(pixels, "An image")
        return _rgb(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
    raise InputError(f"An image is a PIL image, a path, or an array; got {type(image).__name__}.")


def to_uint8(array: np.ndarray | Tensor, what: str) -> np.ndarray:
    """Pixels as uint8: integers from 0 to 255 as they are, floats from 0 to 1 times 255.

    Args:
        array: Pixels of any shape.
        what: The subject of an error message.

    Raises:
        InputError: NaN, infinity, or values outside the range.
    """
    if isinstance(array, Tensor):
        tensor = array.detach().cpu()
        array = np.asarray(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)
    if array.dtype == np.uint8 or array.size == 0:
        return array.astype(np.uint8)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise InputError(f"{what} needs numbers for pixels; got an array of {array.dtype}.")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise InputError(
            f"{what} has NaN or infinity in {bad} of its {array.size} pixel values: repair or drop it before `prepare`."
        )
    low, high = float(array.min()), float(array.max())
    top = 1 if np.issubdtype(array.dtype, np.floating) else 255
    if low < 0 or high > top:
        raise InputError(
            f"{what} of {array.dtype} must lie in 0 to {top}; got values from {low:g} to {high:g}. Give uint8 from 0 "
            "to 255 or floats from 0 to 1, before any normalisation: the model's own processor normalises."
        )
    return np.round(array * 255).astype(np.uint8) if top == 1 else array.astype(np.uint8)


def channels_last(pixels: np.ndarray, what: str) -> np.ndarray:
    """The last three axes as `[height width channel]`, from that or from `[channel height width]`.

    Args:
        pixels: An array of three axes at least.
        what: The subject of an error message.

    Raises:
        InputError: When neither the first nor the last of the three can be the channels.
    """
    if pixels.shape[-1] in _CHANNELS:
        return pixels
    if pixels.shape[-3] in _CHANNELS:
        # [... channel height width] -> [... height width channel]
        return np.ascontiguousarray(np.moveaxis(pixels, -3, -1))
    raise InputError(f"{what} needs 1, 3 or 4 channels, first or last; got shape {tuple(pixels.shape)}.")


def as_list(images: ImageInput | Sequence[T] | None) -> list[ImageInput | T]:
    """One picture or a sequence of pictures as a list; `None` gives an empty one.

    Raises:
        InputError: For something else.
    """
    if images is None:
        return []
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    if isinstance(images, Sequence) and not isinstance(images, bytes):
        return list(images)
    raise InputError(f"Images are one picture or a list of them; got {type(images).__name__}.")


def _open(path: str | os.PathLike[str]) -> Image.Image:
    if "://" in str(path):
        raise InputError(f"Images are read from files, not from addresses: download {str(path)!r} first.")
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"No image file at {str(path)!r}.")
    try:
        with Image.open(file) as image:
            image.load()  # the header of a truncated file is read without an error
            return image.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{str(path)!r} cannot be read as an image: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"An image must be at least 1 x 1 pixel; got {image.size[0]} x {image.size[1]}.")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return load_image(np.asarray(image))
    if image.mode.startswith("I"):  # 16-bit greys: PIL's own conversion would clip them to white
        values = np.asarray(image).astype(np.int64)
        return load_image(values // 257 if values.max() > 255 else values)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
