"""Positions of the vision tower by what they see, for interventions and hooks there."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.families.base import Family
from hooked_mllm.families.vision_layout import VisionLayout
from hooked_mllm.inputs.resolve import ModelInput
from hooked_mllm.inputs.sample import Sample, SampleBatch
from hooked_mllm.layout import Region, TokenLayout


class VisionMethods:
    """From regions of pictures to positions of the vision tower; a part of `HookedMLLM`."""

    hf_model: Any
    family: Family

    def vision_positions(
        self,
        inputs: ModelInput,
        region: Region | str | Sequence[Any] | None = None,
        *,
        image: int | None = None,
        video: int | None = None,
        view: str | None = None,
        tile: int | None = None,
        min_overlap: float | int = 0.0,
    ) -> Bool[Tensor, "row pos"]:
        """The positions of the vision tower whose patches see a region, a picture, or one of its views or tiles.

        The mask has the first two axes of the tower's activations: `[1 patch]` for Qwen3-VL, whose tower takes all
        pictures in one row, `[tile position]` for the others. It is accepted wherever positions of the tower are
        specified: `HeadAblation(..., tower="vision", positions=mask)`, `ActivationPatch`, `Steer`, or the index of a
        hook. Positions that see no pixel, such as class tokens and patches on padding, are never in it. Attention mixes
        patches within a picture (in each tile or frame), so after the first block a position also contains information
        of other patches.

        Args:
            inputs: A sample, or a batch; made by `prepare`, since the sizes of the originals are needed.
            region: A region or several, in pixels of the original; "target" for the sample's own; None for all that
                sees a picture. For a batch "target", None, or a list with one of these for each sample.
            image: Only in this image, and where the region has none of its own to name.
            video: The same of a video.
            view: Only through this view: "whole", "base", "highres", "thumbnail", "tile", "frame".
            tile: Only in this tile of an image, counted row by row, without the thumbnail or the base view.
            min_overlap: The least share of a patch that the region must cover.

        Raises:
            InputError: for a mapping, or a target that a sample lacks.
            LayoutError: when there is no such picture, view or tile, when nothing sees the region, or for images and
                videos together where the model calls its tower once for either.

        Examples:
            >>> from hooked_mllm import HeadAblation, HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> at = model.vision_positions(sample, "target")
            >>> at.shape, int(at.sum())
            (torch.Size([1, 144]), 4)
            >>> ablation = HeadAblation(["L0H1"], mode="zero", phase="prefill", tower="vision", positions=at)
            >>> with model.intervene(ablation):
            ...     logits = model(sample)
        """
        where = {"image": image, "video": video, "view": view, "tile": tile, "min_overlap": min_overlap}
        samples, regions = _samples(inputs), [region]
        if isinstance(inputs, SampleBatch):
            regions = [region] * len(samples) if region is None or isinstance(region, str) else _each(region, inputs)
        self._check_calls(samples)
        masks = [
            self._vision_layout(s).select(_region(s, r), **where)
            for s, r in zip(samples, regions, strict=True)
            if s.layout.items or r is not None or len(samples) == 1
        ]
        if not masks:
            raise LayoutError("No sample of this batch has an image or a video: the vision tower does not run.")
        return torch.cat(masks, dim=1 if self.family.vision.packed else 0).to(samples[0].device)

    def vision_layout(self, sample: ModelInput) -> TokenLayout:
        """What every position of the vision tower sees, row after row: its regions, and painting as of tokens.

        Args:
            sample: A sample.

        Raises:
            InputError: for something else.
            LayoutError: for a sample without pictures, or with images and videos where the tower is called for either.

        Examples:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> _, cache = model.run_with_cache(sample, "vision.hook_out")
            >>> norms = cache["vision", "out"].norm(dim=-1).flatten()
            >>> model.vision_layout(sample).to_image(norms).shape
            (96, 96)
        """
        if not isinstance(sample, Sample):
            raise InputError(f"Expected one Sample; got {type(sample).__name__}.")
        self._check_calls([sample])
        return self._vision_layout(sample).layout

    def _vision_layout(self, sample: Sample) -> VisionLayout:
        return VisionLayout.of(self.family, self.hf_model.config, sample.layout)

    def _check_calls(self, samples: Sequence[Sample]) -> None:
        kinds = {item.kind for s in samples for item in s.layout.items}
        if len(kinds) > 1 and len(self.family.pixel_inputs) > 1:
            raise LayoutError(
                "These inputs have images and videos, for each of which the model calls its vision tower, so that no "
                "one mask fits both calls. Prepare images and videos apart."
            )


def _samples(inputs: object) -> list[Sample]:
    if isinstance(inputs, Sample):
        return [inputs]
    if isinstance(inputs, SampleBatch):
        return list(inputs)
    raise InputError(
        f"Expected a Sample or a SampleBatch, which know the sizes of their pictures; got {type(inputs).__name__}. "
        "`model.prepare(question, images=...)` makes one."
    )


def _each(regions: object, batch: SampleBatch) -> list[Any]:
    if not isinstance(regions, Sequence) or len(regions) != len(batch):
        count = f"{len(regions)} regions" if isinstance(regions, Sequence) else type(regions).__name__
        raise InputError(f"For a batch give 'target' or a list of {len(batch)} regions, one a sample; got {count}.")
    return list(regions)


def _region(sample: Sample, region: Any) -> Any:
    if not isinstance(region, str):
        return region
    if region != "target":
        raise LayoutError(
            f"The only region name of the vision tower is 'target'; got {region!r}. Give a region or a view."
        )
    sample.mask("target")  # an error at the door if there is none
    return sample.target
