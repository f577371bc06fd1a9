"""Pictures in any form as upright RGB images, which is what processors take."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hooked_mllm.errors import InputError

#: one picture: a path, a PIL image, or an array `[height width channel]`, `[channel height width]` or `[height width]`
ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
#: one picture, or several; an array of four axes is several
Images = ImageInput | Sequence[ImageInput]

_CHANNELS = (1, 3, 4)


def load_image(image: ImageInput) -> Image.Image:
    """One picture as an upright PIL image in RGB; transparent pixels become white.

    An EXIF orientation, of a file or of a PIL image, is applied. An array is `[height width channel]`,
    `[channel height width]` or `[height width]`, of integers from 0 to 255, floats from 0 to 1, or uint16 from 0 to
    65535. Greys of PIL's modes I;16 and I are 0 to 65535, those of F 0 to 1, whatever the brightest pixel is.
    """
    if isinstance(image, str | os.PathLike):
        file = existing_file(image, "image")
        try:
            with Image.open(file) as picture:
                picture.load()  # the header of a truncated file is read without an error
                image = picture.copy()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{str(file)!r} cannot be read as an image: {error}") from error
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
    """Pixels as uint8: integers from 0 to 255 as they are, floats from 0 to 1 times 255, uint16 by 257."""
    if isinstance(array, Tensor):
        tensor = array.detach().cpu()
        array = np.asarray(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)
    if array.dtype == np.uint8 or array.size == 0:
        return array.astype(np.uint8)
    if array.dtype == np.uint16:
        return (array // 257).astype(np.uint8)
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
    """The last three axes as `[height width channel]`, from that or from `[channel height width]`."""
    if pixels.shape[-1] in _CHANNELS:
        return pixels
    if pixels.shape[-3] in _CHANNELS:
        # [... channel height width] -> [... height width channel]
        return np.ascontiguousarray(np.moveaxis(pixels, -3, -1))
    raise InputError(f"{what} needs 1, 3 or 4 channels, first or last; got shape {tuple(pixels.shape)}.")


def media_list(media: object, single: type = Image.Image, axes: int = 3, kind: str = "image") -> list[Any]:
    """One picture or video, or a sequence of them, as a list; an array of more than `axes` axes is a sequence."""
    if media is None:
        return []
    if isinstance(media, np.ndarray | Tensor):
        return list(media) if media.ndim == axes + 1 else [media]
    if isinstance(media, str | os.PathLike | single):
        return [media]
    if isinstance(media, Sequence) and not isinstance(media, bytes):
        return list(media)
    raise InputError(f"{kind.title()}s are one {kind} or a list of them; got {type(media).__name__}.")


def existing_file(path: str | os.PathLike[str], kind: str) -> Path:
    """The path of an image or video file, with `~` expanded."""
    if "://" in str(path):
        raise InputError(f"{kind.title()}s are read from files, not from addresses: download {str(path)!r} first.")
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"No {kind} file at {str(path)!r}.")
    return file


def _rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"An image must be at least 1 x 1 pixel; got {image.size[0]} x {image.size[1]}.")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return load_image(np.asarray(image))
    if image.mode.startswith("I"):  # 16-bit greys: PIL's own conversion would clip them to white
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(
                f"A picture of mode {image.mode!r} has greys of 16 bits, 0 to 65535; got values from {values.min()} to "
                f"{values.max()}. Scale them, or give an array of floats from 0 to 1."
            )
        return load_image(values.astype(np.uint16))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
