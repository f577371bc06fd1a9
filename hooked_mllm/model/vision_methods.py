"""Positions of the vision tower by what they see, for interventions and hooks there."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.families.base import Family
from hooked_mllm.families.vision_layout import VisionLayout
from hooked_mllm.inputs.resolve import RunInput, as_run_input, prepared_samples
from hooked_mllm.inputs.sample import Sample
from hooked_mllm.layout import Region, TokenLayout


class VisionMethods:
    """From regions of pictures to positions of the vision tower; a part of `HookedMLLM`."""

    hf_model: Any
    family: Family

    def vision_positions(
        self,
        inputs: RunInput,
        region: Region | str | Sequence[Any] | None = None,
        *,
        image: int | None = None,
        video: int | None = None,
        view: str | None = None,
        tile: int | None = None,
        min_overlap: float | int = 0.0,
    ) -> Bool[Tensor, "row pos"]:
        """The positions of the vision tower whose patches see a region, a picture, or one of its views or tiles.

        The mask `[1 patch]` (Qwen3-VL, whose tower takes all pictures in one row) or `[tile position]` (the others) is
        accepted wherever positions of the tower are specified, such as
        `HeadAblation(..., tower="vision", positions=mask)`. Class tokens and patches on padding are never in it.
        After the first block, attention has mixed in information of other patches of the tile or frame.

        Args:
            inputs: A sample, a batch, or a list of samples; made by `prepare`, since the sizes of the originals are
                needed.
            region: A region or several, in pixels of the original; "target" for the sample's own; None for all that
                sees a picture. For a batch "target", None, or a list with one of these for each sample.
            image: Only in this image, and where the region itself names no image.
            video: The same of a video.
            view: Only through this view: "whole", "base", "highres", "thumbnail", "tile", "frame".
            tile: Only in this tile of an image, counted row by row, without the thumbnail or the base view.
            min_overlap: The least share of a patch that the region must cover.

        Raises:
            InputError: For a mapping, or a target that a sample lacks.
            LayoutError: When there is no such picture, view or tile, when nothing sees the region, or for images and
                videos together where the model calls its tower for each.

        Examples:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> at = model.vision_positions(sample, "target")
            >>> at.shape, int(at.sum())
            (torch.Size([1, 144]), 4)
        """
        where = {"image": image, "video": video, "view": view, "tile": tile, "min_overlap": min_overlap}
        samples = prepared_samples(as_run_input(inputs))
        regions: Sequence[Any] = [region] * len(samples)
        if not isinstance(inputs, Sample) and region is not None and not isinstance(region, str):
            regions = region if isinstance(region, Sequence) else ()
            if len(regions) != len(samples):
                count = f"{len(regions)} regions" if isinstance(region, Sequence) else type(region).__name__
                raise InputError(
                    f"For a batch give 'target' or a list of {len(samples)} regions, one a sample; got {count}."
                )
        self._check_calls(samples)
        masks = [
            VisionLayout.of(self.family, self.hf_model.config, s.layout).select(_region(s, r), **where)
            for s, r in zip(samples, regions, strict=True)
            if s.layout.items or r is not None or len(samples) == 1
        ]
        if not masks:
            raise LayoutError("No sample of this batch has an image or a video: the vision tower does not run.")
        return torch.cat(masks, dim=1 if self.family.vision.packed else 0).to(samples[0].device)

    def vision_layout(self, sample: Sample) -> TokenLayout:
        """What every position of the vision tower sees, row after row: its regions, and painting as of tokens.

        Args:
            sample: A sample with pictures: images or, where the tower is called for each, videos.

        Examples:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> _, cache = model.run_with_cache(sample, "vision.hook_out")
            >>> norms = cache["vision", "out"].norm(dim=-1).flatten()
            >>> model.vision_layout(sample).to_image(norms).shape
            (96, 96)
        """
        self._check_calls([sample])
        return VisionLayout.of(self.family, self.hf_model.config, sample.layout).layout

    def _check_calls(self, samples: Sequence[Sample]) -> None:
        kinds = {item.kind for s in samples for item in s.layout.items}
        if len(kinds) > 1 and len(self.family.pixel_inputs) > 1:
            raise LayoutError(
                "These inputs have images and videos, for each of which the model calls its vision tower, so that no "
                "one mask fits both calls. Prepare images and videos apart."
            )


def _region(sample: Sample, region: Any) -> Any:
    if not isinstance(region, str):
        return region
    if region != "target":
        message = f"The only region name of the vision tower is 'target'; got {region!r}. Give a region or a view."
        raise LayoutError(message)
    sample.mask("target")  # raises if there is none
    return sample.target
