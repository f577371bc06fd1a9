"""ImageNoise: Gaussian noise on pixels."""

from typing import Any

import numpy as np

from hooked_mllm.corruptions.base import Corruption, check_seed, drawing
from hooked_mllm.corruptions.pixels import Where, check_where, describe_where, edited
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.sample import Sample


class ImageNoise(Corruption):
    """Add Gaussian noise to pixels, each colour by itself; sums are rounded and cut off at 0 and 255.

    Causal tracing adds its noise to embeddings (Meng et al. 2022, arXiv 2202.05262); on pixels it passes through the
    vision tower as a picture does.

    Args:
        std: Standard deviation, in pixel values of 0 to 255.
        region: The pixels to change: None for all pictures whole, "target", or a region or several.
        seed: Seed of the noise. Samples with other questions or pictures get other noise from one seed.

    Examples:
        >>> ImageNoise(40, region="target", seed=1)
        ImageNoise(std=40.0, region='target', seed=1)
    """

    def __init__(self, std: float | int, region: Where = None, seed: int = 0) -> None:
        if not (np.isfinite(std) and std > 0):
            raise InputError(f"std is a positive number of pixel values (0 to 255); got {std!r}.")
        check_seed(seed)
        self.std, self.region, self.seed = float(std), check_where(region), seed

    def describe(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        region = describe_where(self.region)
        return {"corruption": "ImageNoise", "std": self.std, "region": region, "seed": self.seed}

    def changes(self, sample: Sample) -> dict[str, Any]:
        """The pictures with noise."""
        rng = drawing(self.seed, sample)

        def add(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
            out = pixels.copy()
            out[mask] += rng.normal(0, self.std, (int(mask.sum()), 3))
            return out

        return edited(sample, self.region, add)
