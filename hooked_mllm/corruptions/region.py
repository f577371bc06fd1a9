"""BlurRegion, MeanRegion and ImageNoise: corruptions that change the pixels of a region."""

from typing import Any

import numpy as np
from scipy.ndimage import find_objects, gaussian_filter

from hooked_mllm.checks import checked
from hooked_mllm.corruptions.base import Corruption, check_seed, drawing
from hooked_mllm.corruptions.pixels import Where, check_where, describe_where, edited
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.sample import Sample

#: standard deviations at which the Gaussian is cut off
REACH = 4.0


@checked
class BlurRegion(Corruption):
    r"""Blur the target's pixels with a Gaussian; all other pixels stay.

    The picture is convolved with $e^{-(x^2 + y^2) / 2 \sigma^2}$, its edges repeated outwards, and the region takes the
    result, in which its surroundings are mixed in at the border.

    Args:
        sigma: Standard deviation, in pixels of the original.
        region: The pixels to blur: "target", a region or several, or None for all pictures whole. Of a video, `Frames`
            and `Tube` blur the frames that they hold.

    Examples:
        >>> BlurRegion(8)
        BlurRegion(sigma=8.0, region='target')
    """

    def __init__(self, sigma: float | int, region: Where = "target") -> None:
        if not (np.isfinite(sigma) and sigma > 0):
            raise InputError(f"sigma is a positive number of pixels; got {sigma!r}.")
        self.sigma, self.region = float(sigma), check_where(region)

    def describe(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        return {"corruption": "BlurRegion", "sigma": self.sigma, "region": describe_where(self.region)}

    def changes(self, sample: Sample) -> dict[str, Any]:
        """The pictures with the region blurred."""
        return edited(sample, self.region, self._blur)

    def _blur(self, pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
        reach = int(REACH * self.sigma + 0.5)
        # of a large picture only the part that the result depends on
        window = tuple(slice(max(0, s.start - reach), s.stop + reach) for s in find_objects(mask.astype(int))[0])
        out = pixels.copy()
        out[window] = gaussian_filter(pixels[window], (self.sigma, self.sigma, 0), mode="nearest", truncate=REACH)
        return out


@checked
class MeanRegion(Corruption):
    """Replace the target's pixels by one colour, the mean of the rest of the picture; all other pixels stay.

    The mean of the region itself would keep some of its content. Where the region is the whole picture there is no
    rest, and the colour is the picture's own mean. Of a video, each frame has its own.

    Args:
        region: The pixels to replace: "target", a region or several, or None for all pictures whole.
        of: "rest" for the mean of the pixels outside the region, "region" for that of those inside.

    Examples:
        >>> MeanRegion(of="region")
        MeanRegion(region='target', of='region')
    """

    def __init__(self, region: Where = "target", of: str = "rest") -> None:
        if of not in ("rest", "region"):
            raise InputError(f"of is 'rest' or 'region', the pixels whose mean colour is taken; got {of!r}.")
        self.region, self.of = check_where(region), of

    def describe(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        return {"corruption": "MeanRegion", "region": describe_where(self.region), "of": self.of}

    def changes(self, sample: Sample) -> dict[str, Any]:
        """The pictures with the region in one colour."""
        return edited(sample, self.region, self._fill)

    def _fill(self, pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
        source = mask if self.of == "region" or mask.all() else ~mask
        return np.broadcast_to(pixels[source].mean(0), pixels.shape)


@checked
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
