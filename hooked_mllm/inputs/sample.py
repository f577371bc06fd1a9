"""Sample and SampleBatch: a question with its pictures as model inputs, and which position is what."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from hooked_mllm.checks import as_device, checked
from hooked_mllm.display.blocks import html_block, html_table
from hooked_mllm.display.images import html_thumbnails
from hooked_mllm.display.text import shortened
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.inputs.positions import TokenKind
from hooked_mllm.inputs.video import Video
from hooked_mllm.layout import Region, TokenLayout
from hooked_mllm.layout.regions import as_regions

#: a region of the pictures, or the union of several
Target = Region | Sequence[Region]


@dataclass(frozen=True)
class Preparation:
    """What a sample was prepared with in addition to its question, pictures, answer, target and id.

    Attributes:
        system: The system prompt, or `None` for the template's own default.
        min_overlap: The least share of a token's footprint that the target covers.
        processor: Options of the processor.
        padding_side: Where a sample is padded by these options.
    """

    system: str | None = None
    min_overlap: float = 0.0
    processor: Mapping[str, Any] = field(default_factory=dict)
    padding_side: str = "left"


@checked
@dataclass(frozen=True, eq=False)
class Sample:
    """A question with its pictures, the model inputs made of them, and the layout of its tokens.

    Attributes:
        inputs: Arguments of the model's `forward`; token tensors `[1 pos]`, with padding only by `padding=` of
            `prepare`.
        layout: Which position is what.
        answer: The answer that follows the prompt (teacher forcing).
        images: The pictures, upright RGB; `layout` counts in their pixels.
        videos: The frames given to the model, with their times.
        target: The region that the question is about, or a list of them.
        target_mask: The tokens that see it, `[pos]` on the CPU.
        id: A name of the user's own.
        template: A fingerprint of the chat template.
        pad_token_id: The token that pads a batch.
        preparation: The other settings of `prepare`; `None` for a sample made by hand.
        family: The family of the model that it was prepared for; `None` for a sample made by hand.
    """

    inputs: dict[str, Tensor]
    layout: TokenLayout
    question: str
    answer: str | None = None
    images: tuple[Image.Image, ...] = ()
    videos: tuple[Video, ...] = ()
    target: Target | None = None
    target_mask: Bool[Tensor, " pos"] | None = None
    id: str | int | None = None
    template: str | None = None
    pad_token_id: int = 0
    preparation: Preparation | None = None
    family: str | None = None

    def mask(self, name: TokenKind) -> Bool[Tensor, "1 pos"]:
        """Positions of a token kind, on the device of the inputs.

        Args:
            name: "target", a name that `TokenLayout.mask` accepts, or a region or several, for the tokens that see it.

        Raises:
            InputError: "target" when no target was given, "answer" when no answer was.
            LayoutError: An unknown name, one that no position has, or a region that the pictures do not have.
        """
        return self.host_mask(name).to(self.device)

    def host_mask(self, name: TokenKind) -> Bool[Tensor, "1 pos"]:
        """The same on the CPU, where masks are made, so that no device is waited for."""
        return self._positions(name)[None]  # [pos] -> [1 pos]

    def target_regions(self) -> list[Region]:
        """The target in pixels of the pictures, as a list of regions."""
        if self.target is None:
            raise InputError(
                f"{self.who} has no target region: give `target=` to prepare, such as Box(x0, y0, x1, y1)."
            )
        return as_regions(self.target)

    def _positions(self, kind: TokenKind) -> Bool[Tensor, " pos"]:
        if not isinstance(kind, str):
            return self.layout.target(kind)
        if kind == "target":
            if self.target_mask is None:
                raise InputError(f"{self.who} has no target: give `target=` to prepare, such as Box(x0, y0, x1, y1).")
            return self.target_mask
        mask = self.layout.mask(kind)
        if kind == "padding" or mask.any():
            return mask
        if kind in ("answer", "generating"):
            raise InputError(f"{self.who} has no answer: give `answer=` to prepare.")
        why = {"visual": "its prompt has no image and no video", "system": "it was prepared without `system=`"}
        raise LayoutError(f"{self.who} has no {kind} tokens: {why.get(kind, 'no position is of that kind')}.")

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.inputs["input_ids"].device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Sample":
        """The same sample with its inputs elsewhere; `dtype` is for the pixels only."""
        return replace(self, inputs=moved(self.inputs, device, dtype))

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def who(self) -> str:
        """How an error names it."""
        return "This sample" if self.id is None else f"Sample {self.id!r}"

    def __repr__(self) -> str:
        name = "" if self.id is None else f"{self.id}: "
        return f"Sample({name}{self.question!r}, {self.layout!r})"

    def _repr_html_(self) -> str:
        facts = {"question": self.question, "answer": self.answer, "target": self.target}
        return html_block(
            f"Sample{'' if self.id is None else f' {self.id}'}: {len(self)} tokens",
            media_html(self.images, self.videos),
            html_table([(k, shortened(str(v), 2000)) for k, v in facts.items() if v is not None], named=True),
            self.layout.html_table(),
            tensors_html(self.inputs),
        )


@checked
@dataclass(frozen=True, eq=False, repr=False)
class SampleBatch:
    """Samples of unequal length, padded to one.

    Attributes:
        samples: The samples, without padding.
        inputs: Arguments of the model's `forward`, `[batch pos]`; pixels as the model's family joins them.
        layouts: The layout of each sample with its padding.
        padding_side: "left" or "right".
    """

    samples: tuple[Sample, ...]
    inputs: dict[str, Tensor]
    layouts: tuple[TokenLayout, ...]
    padding_side: str = field(default="left")

    @classmethod
    def collate(cls, samples: Iterable[Sample], padding_side: str = "left") -> "SampleBatch":
        """Join samples of one model: token tensors are padded and stacked, pictures joined in order.

        Args:
            samples: At least one, prepared by one model.
            padding_side: "left" or "right".

        Raises:
            InputError: An empty batch, an unknown side, or pictures that the model cannot take in one batch.
        """
        samples = tuple(samples)
        if not samples:
            raise InputError("The batch is empty: give one sample at least.")
        if wrong := [sample for sample in samples if not isinstance(sample, Sample)]:
            raise InputError(f"A batch is made of samples, which `model.prepare` returns; got {wrong[0]!r} among them.")
        check_side(padding_side)
        longest = max(map(len, samples))
        gaps = [longest - len(s) for s in samples]
        pads = [(gap, 0) if padding_side == "left" else (0, gap) for gap in gaps]
        names = dict.fromkeys(name for s in samples for name in s.inputs)
        inputs = {name: _join(name, samples, pads) for name in names}
        layouts = tuple(s.layout.padded(left, right) for s, (left, right) in zip(samples, pads, strict=True))
        return cls(samples, inputs, layouts, padding_side)

    def mask(self, name: TokenKind) -> Bool[Tensor, "batch pos"]:
        """Positions of a token kind as in `Sample.mask`, padded; every sample must have some."""
        return self.host_mask(name).to(self.device)

    def host_mask(self, name: TokenKind) -> Bool[Tensor, "batch pos"]:
        """The same on the CPU, where masks are made, so that no device is waited for."""
        padding = torch.stack([layout.padding for layout in self.layouts])
        if name == "padding":
            return padding
        mask = torch.zeros_like(padding)
        for sample_mask, sample in zip(mask, self.samples, strict=True):
            n = len(sample)
            own = slice(-n, None) if self.padding_side == "left" else slice(n)  # without the padding of the batch
            sample_mask[own] = sample._positions(name)
        return mask

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.inputs["input_ids"].device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "SampleBatch":
        """The same batch with its inputs elsewhere; `dtype` is for the pixels only."""
        samples = tuple(s.to(device, dtype) for s in self.samples)
        return replace(self, samples=samples, inputs=moved(self.inputs, device, dtype))

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __repr__(self) -> str:
        lengths = ", ".join(str(len(s)) for s in self.samples)
        return f"SampleBatch({len(self)} samples of {lengths} tokens, padded on the {self.padding_side})"

    def _repr_html_(self) -> str:
        most = 50
        facts = [
            (i, s.id or "", len(s), len(s.images), len(s.videos), shortened(s.question), shortened(s.answer or ""))
            for i, s in enumerate(self.samples[:most])
        ]
        header = ("sample", "id", "tokens", "images", "videos", "question", "answer")
        return html_block(
            f"SampleBatch: {len(self)} samples, padded on the {self.padding_side}",
            html_table(facts, header, align="><>>>", named=True),
            tensors_html(self.inputs),
            note=f"the first {most} are shown" if len(self) > most else "",
        )


@runtime_checkable
class Prepares(Protocol):
    """An object that makes samples: a `HookedMLLM`, or another with its `prepare`."""

    def prepare(self, question: str, images: Any = None, videos: Any = None, **options: Any) -> Sample:
        """A sample of one question."""
        ...


def moved(
    inputs: Mapping[str, Any], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Tensors on another device; floating ones, which are pixels, in another dtype as well."""

    def on_device(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device=target, dtype=dtype if value.is_floating_point() else None)

    target = None if device is None else as_device(device)
    return {name: on_device(value) for name, value in inputs.items()}


def check_side(padding_side: str) -> None:
    """Raise an InputError for another side than left and right."""
    if not isinstance(padding_side, str) or padding_side not in ("left", "right"):
        raise InputError(f"padding_side is 'left' or 'right'; got {padding_side!r}.")


def is_per_token(value: Tensor, n_tokens: int) -> bool:
    """Whether a tensor of one sample's inputs holds a value for each token."""
    return value.ndim == 2 and value.shape == (1, n_tokens)


def _join(name: str, samples: Sequence[Sample], pads: Sequence[tuple[int, int]]) -> Tensor:
    present = [(s.inputs[name], len(s)) for s in samples if name in s.inputs]
    if is_per_token(*present[0]):
        if len(present) < len(samples):
            raise InputError(f"Some samples of the batch have {name!r} and some have not: prepare them with one model.")
        fill = samples[0].pad_token_id if name == "input_ids" else 0
        pad: Callable[..., Tensor] = torch.nn.functional.pad
        return torch.cat([pad(value, sides, value=fill) for (value, _), sides in zip(present, pads, strict=True)])
    values = [value for value, _ in present]
    if name == "pixel_values" and values[0].ndim == 5:  # [image tile channel height width]; the model drops spare tiles
        tiles = max(v.shape[1] for v in values)
        values = [torch.cat([v, v.new_zeros(len(v), tiles - v.shape[1], *v.shape[2:])], 1) for v in values]
    if len({v.shape[1:] for v in values}) > 1:
        shapes = ", ".join(str(tuple(v.shape)) for v in values)
        raise InputError(
            f"{name!r} cannot be joined in one batch: shapes {shapes}. This model takes videos of one number of frames "
            "in a batch: give num_frames= to prepare, or run the samples one by one."
        )
    return torch.cat(values)


def media_html(images: Sequence[Image.Image], videos: Sequence[Video]) -> str:
    """Thumbnails of the images, and of the first frame of each video."""
    named = [(f"image {i}, {x.width}x{x.height} px", x) for i, x in enumerate(images)]
    named += [(f"video {i}, first of {len(x)} frames", Image.fromarray(x.frames[0])) for i, x in enumerate(videos)]
    return html_thumbnails(named)


def tensors_html(inputs: Mapping[str, object]) -> str:
    """Name, shape, dtype and device of each tensor; other values by their type."""
    return html_table(
        [
            (name, list(x.shape), f"{str(x.dtype).removeprefix('torch.')} on {x.device}")
            if isinstance(x, Tensor)
            else (name, "", type(x).__name__)
            for name, x in inputs.items()
        ],
        ("input", "shape", "dtype"),
        named=True,
    )
