"""TokenLayout: what each position of the input is, and which pixels of the original each visual token sees."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from hooked_mllm.checks import checked, numbers
from hooked_mllm.display.blocks import html_block, html_table
from hooked_mllm.display.text import text_table
from hooked_mllm.errors import LayoutError, nearest
from hooked_mllm.layout.items import View, VisualItem, find_item, find_view
from hooked_mllm.layout.kinds import Kind, kinds_of_spans
from hooked_mllm.layout.paint import paint
from hooked_mllm.layout.regions import Frames, Number, Pages, RegionInput, as_regions, moved
from hooked_mllm.layout.shares import shares

HEADER = ("what", "positions", "")
#: names that `TokenLayout.mask` accepts in addition to the kinds
DERIVED = ("text", "last", "generating", "pixels")
#: shares closer than this count as equal: token edges are fractions of pixels, which rounding moves
TOLERANCE = 1e-9


@checked
@dataclass(frozen=True, eq=False, repr=False)
class TokenLayout:
    """What each position of one sample is, and what the visual ones see.

    Attributes:
        kinds, view: A `Kind` and a `View` for each position.
        item: The index in `items` of the image or video that a visual position belongs to; -1 elsewhere.
        boxes: x0, y0, x1, y1 in pixels of the original image that a visual token sees (pixel i spans [i, i + 1]);
            NaN for text, and for visual tokens that see none: newlines, and tokens that see only padding.
        frame_range: The first and the last frame a video token sees, both included; -1 elsewhere.
        items: The images and videos, in prompt order.
        last_index: The last position before any answer.

    Examples:
        >>> from hooked_mllm.layout import Box
        >>> boxes = np.array([[0.0, 0.0, 4.0, 4.0], [4.0, 0.0, 8.0, 4.0]])
        >>> item = VisualItem("image", 0, 8, 4, boxes, np.full((2, 2), -1), np.full(2, View.WHOLE, np.int8))
        >>> layout = TokenLayout.build(torch.tensor([5, 9, 9, 6, 7]), [item], (9,), {"question": [(3, 5)]})
        >>> layout.target(Box(5, 1, 6, 2)).tolist()
        [False, False, True, False, False]
    """

    kinds: Int8[Tensor, " pos"]
    item: Int[Tensor, " pos"]
    boxes: Float[Tensor, "pos 4"]
    frame_range: Int[Tensor, "pos 2"]
    view: Int8[Tensor, " pos"]
    items: tuple[VisualItem, ...]
    last_index: int

    @classmethod
    def build(
        cls,
        input_ids: Int[Tensor, " pos"],
        items: Sequence[VisualItem],
        visual_ids: Iterable[int],
        spans: Mapping[str, Sequence[tuple[int, int]]],
    ) -> "TokenLayout":
        """Build the layout from token ids, what the visual tokens see, and the ranges of the texts.

        Args:
            input_ids: The ids of one sample, without padding.
            items: Its images and videos in prompt order; their tokens take the placeholder positions in order.
            visual_ids: Ids of the placeholder tokens.
            spans: Ranges (start, end), end exclusive, for "system", "question" and "answer". Other text is template.

        Raises:
            LayoutError: When tokens and placeholders differ in number, or a span is unknown, outside, or overlaps.
        """
        ids = input_ids.cpu()
        n, items = len(ids), tuple(items)
        if n == 0:
            raise LayoutError("The input has no tokens.")
        for position, item in enumerate(items):
            index = sum(earlier.kind == item.kind for earlier in items[:position])
            if item.index != index:
                raise LayoutError(f"Expected {item.kind} {index}, got {item.name}: list the items in prompt order.")
        positions = torch.isin(ids, torch.tensor(sorted(visual_ids), dtype=ids.dtype)).nonzero()[:, 0]
        n_tokens = sum(map(len, items))
        if len(positions) != n_tokens:
            what = ", ".join(f"{item.name}: {len(item)}" for item in items) or "no images or videos"
            raise LayoutError(
                f"The input has {len(positions)} placeholder tokens, but its images and videos give {n_tokens} visual "
                f"tokens ({what})."
            )
        kinds = kinds_of_spans(n, spans)
        kinds[positions] = Kind.VISUAL
        # text keeps these values
        item_of = torch.full((n,), -1, dtype=torch.int32)
        boxes = torch.full((n, 4), torch.nan, dtype=torch.float64)
        frame_range = torch.full((n, 2), -1, dtype=torch.int32)
        view = torch.zeros(n, dtype=torch.int8)
        if items:
            lengths = torch.tensor([len(item) for item in items])
            # the tokens of all items, concatenated, in the order of the placeholders
            item_of[positions] = torch.arange(len(items), dtype=torch.int32).repeat_interleave(lengths)
            boxes[positions] = torch.from_numpy(np.concatenate([item.boxes for item in items])).double()
            frame_range[positions] = torch.from_numpy(np.concatenate([item.frames for item in items])).int()
            view[positions] = torch.from_numpy(np.concatenate([item.views for item in items]))
        answer = (kinds == Kind.ANSWER).nonzero()
        last = int(answer[0]) - 1 if len(answer) else n - 1
        if last < 0:
            raise LayoutError("The answer starts at the first position: no position is left to predict it.")
        return cls(kinds, item_of, boxes, frame_range, view, items, last)

    def padded(self, left: int = 0, right: int = 0) -> "TokenLayout":
        """The same layout with padding positions before and after it."""
        if left < 0 or right < 0:
            raise LayoutError(f"Padding must be zero or more positions; got left={left}, right={right}.")

        def pad(values: Tensor, fill: float | int) -> Tensor:
            """`[pos ...] -> [left + pos + right ...]`."""
            before, after = (values.new_full((k, *values.shape[1:]), fill) for k in (left, right))
            return torch.cat([before, values, after])

        return TokenLayout(
            pad(self.kinds, Kind.PADDING),
            pad(self.item, -1),
            pad(self.boxes, torch.nan),
            pad(self.frame_range, -1),
            pad(self.view, View.NONE),
            self.items,
            self.last_index + left,
        )

    def __len__(self) -> int:
        return len(self.kinds)

    def mask(self, name: str | RegionInput) -> Bool[Tensor, " pos"]:
        """The positions with a name, or the tokens that see a region.

        Args:
            name: A region or several, as for `target`; a kind, or "text" (neither visual nor padding), "last",
                "generating" (those that predict the answer's tokens: the last, and all of the answer but its end),
                "pixels" (visual, with a footprint).
        """
        if not isinstance(name, str):
            return self.target(name)
        names = [k.name.lower() for k in Kind]
        if name in names:
            return self.kinds == Kind[name.upper()]
        if name == "text":
            return (self.kinds != Kind.VISUAL) & (self.kinds != Kind.PADDING)
        if name == "last":
            return torch.arange(len(self)) == self.last_index
        if name == "generating":  # the answer, shifted one position to the left
            return torch.cat([self.answer[1:], self.answer.new_zeros(1)])
        if name == "pixels":
            return ~self.boxes[:, 0].isnan()
        known = [*names, *DERIVED]
        raise LayoutError(f"No positions are called {name!r}. {nearest(name, known)} Known: {', '.join(known)}.")

    @property
    def question(self) -> Bool[Tensor, " pos"]:
        """The user's question, without the template around it."""
        return self.mask("question")

    @property
    def answer(self) -> Bool[Tensor, " pos"]:
        """The answer, if there is one."""
        return self.mask("answer")

    @property
    def system(self) -> Bool[Tensor, " pos"]:
        """The system prompt."""
        return self.mask("system")

    @property
    def template(self) -> Bool[Tensor, " pos"]:
        """Tokens that the chat template adds around the other texts."""
        return self.mask("template")

    @property
    def visual(self) -> Bool[Tensor, " pos"]:
        """All visual tokens, newline tokens included."""
        return self.mask("visual")

    @property
    def padding(self) -> Bool[Tensor, " pos"]:
        """Padding positions."""
        return self.mask("padding")

    @property
    def text(self) -> Bool[Tensor, " pos"]:
        """All positions that are neither visual nor padding."""
        return self.mask("text")

    @property
    def last(self) -> Bool[Tensor, " pos"]:
        """The last position before any answer."""
        return self.mask("last")

    @property
    def pixels(self) -> Bool[Tensor, " pos"]:
        """Visual tokens that see a pixel of the original: all but newlines and tokens that see only padding."""
        return self.mask("pixels")

    @property
    def n_images(self) -> int:
        """Number of images of the sample."""
        return sum(i.kind == "image" for i in self.items)

    @property
    def n_videos(self) -> int:
        """Number of videos of the sample."""
        return sum(i.kind == "video" for i in self.items)

    @property
    def times(self) -> Float[Tensor, " pos"]:
        """The time of each video token in seconds: the mean over the frames it sees; NaN elsewhere."""
        times = torch.full((len(self),), torch.nan, dtype=torch.float64)
        for number, item in enumerate(self.items):
            positions = ((self.item == number) & (self.frame_range[:, 0] >= 0)).nonzero()[:, 0]
            if item.kind == "image" or not len(positions):
                continue
            # sums over frame ranges are differences of cumulative sums
            total = torch.tensor((0.0, *item.times_s), dtype=torch.float64).cumsum(0)
            first, last = self.frame_range[positions].long().unbind(1)
            times[positions] = (total[last + 1] - total[first]) / (last + 1 - first)
        return times

    def spans(self, kind: Kind | str) -> list[tuple[int, int]]:
        """The contiguous ranges (start, end), end exclusive, of a kind or of a name that `mask` accepts."""
        return runs(self.mask(kind.name.lower() if isinstance(kind, Kind) else kind))

    def tokens(
        self, image: int | None = None, video: int | None = None, view: str | None = None
    ) -> Bool[Tensor, " pos"]:
        """All tokens of one image or video, or those of one of its views."""
        number = find_item(self.items, image, video)
        mask = self.item == number
        return mask if view is None else mask & (self.view == find_view(self.items[number], view))

    def target(self, region: RegionInput, min_overlap: Number = 0.0) -> Bool[Tensor, " pos"]:
        """The tokens whose pixels overlap a region, or the union of several.

        A token is a target iff the region covers a positive share of its footprint, and at least `min_overlap`; for a
        video token, the share is the mean over the frames that it sees. Newline tokens are never targets.

        Args:
            region: A region, or several.
            min_overlap: The least share, from 0 to 1.

        Raises:
            LayoutError: No such image or video, a region outside of it, a mask of another size, or no target.
        """
        if not 0 <= min_overlap <= 1:
            raise LayoutError(f"min_overlap is a share of the token's footprint, from 0 to 1; got {min_overlap}.")
        regions = as_regions(region)
        if not self.items:
            raise LayoutError("This input has no visual tokens: a region needs an image or a video in the prompt.")
        share = shares(self.items, self.item.numpy(), self.boxes.numpy(), self.frame_range.numpy(), regions)
        mask = torch.from_numpy(share > TOLERANCE if min_overlap == 0 else share >= min_overlap - TOLERANCE)
        if not mask.any():
            names = ", ".join(map(repr, regions[:3])) + (f" and {len(regions) - 3} more" if len(regions) > 3 else "")
            raise LayoutError(
                f"No token has more than {min_overlap} of its footprint in {names}: the most covered "
                f"one has {share.max():.3g}. Lower min_overlap, or give a region that the model sees."
            )
        return mask

    def region(
        self, region: RegionInput, image: int | None = None, video: int | None = None, min_overlap: Number = 0.0
    ) -> Bool[Tensor, " pos"]:
        """`target`, with `image` or `video` in place of the region's own."""
        return self.target([moved(item, image, video) for item in as_regions(region)], min_overlap)

    def frames(
        self, video: int = 0, start_s: Number | None = None, end_s: Number | None = None
    ) -> Bool[Tensor, " pos"]:
        """The tokens of a video that see a frame with a time in [start_s, end_s]; `None` leaves an end open."""
        return self.target(Frames(start_s, end_s, video))

    def pages(self, images: Iterable[int]) -> Bool[Tensor, " pos"]:
        """The tokens of whole images, by their numbers from 0."""
        return self.target(Pages(images))

    def chance(self, mask: Bool[Tensor, " pos"], queries: str | Bool[Tensor, " pos"] = "question") -> float:
        r"""The attention mass on `mask` of a head that attends evenly to all visible keys (causal, without padding).

        $$\frac{1}{|Q|} \sum_{i \in Q} \frac{|\{j \in K : j \le i\}|}{|\{j : j \le i, j \text{ not padding}\}|}$$

        Args:
            mask: The keys K.
            queries: The queries Q, at least one, as a name that `mask` accepts or as a mask.
        """
        query_mask = self.mask(queries) if isinstance(queries, str) else queries
        query_mask = query_mask & ~self.padding
        if not query_mask.any():
            raise LayoutError(f"There are no query positions: {queries!r} is empty in this layout.")
        # at position i: the number of keys j <= i, in the mask and in all
        in_mask, visible = (mask & ~self.padding).cumsum(0), (~self.padding).cumsum(0)
        return float((in_mask[query_mask].double() / visible[query_mask]).mean())

    def to_image(
        self,
        values: Tensor | np.ndarray | Sequence[float],
        image: int | None = None,
        video: int | None = None,
        frame: int = 0,
        view: str | None = None,
    ) -> Float[np.ndarray, "height width"]:
        """Paint one value per token onto the original image, or onto one frame of a video.

        Each pixel takes the value of the token that sees its centre, of the finest view where several do; pixels that
        no token sees are NaN. In a very small picture "base" and "thumbnail" may be finer than "highres" and "tile".

        Args:
            values: One number per position `[pos]`, tensor or array.
            image: The number of the image; 0 if no video is specified either.
            video: The number of the video.
            frame: The number of the frame among those of the video that the model receives.
            view: One of the item's views; by default the finest that sees the pixel.

        Raises:
            LayoutError: For another number of values, or when there is no such image, video, frame or view.
        """
        if isinstance(values, Tensor):
            values = values.detach().to("cpu", torch.float64).numpy()
        values = numbers(values, "values")
        if values.shape != (len(self),):
            raise LayoutError(f"to_image takes one value per position, shape ({len(self)},); got {values.shape}.")
        number = find_item(self.items, 0 if image is None and video is None else image, video)
        item = self.items[number]
        mask = (self.item == number) & self.pixels
        if item.kind == "video":
            if not 0 <= frame < item.n_frames:
                raise LayoutError(f"{item.name} has frames 0 to {item.n_frames - 1}; got frame {frame}.")
            mask &= (self.frame_range[:, 0] <= frame) & (frame <= self.frame_range[:, 1])
        if view is not None:
            mask &= self.view == find_view(self.items[number], view)
        tokens = mask.numpy()  # [pos] -> [token]
        return paint(item.width, item.height, self.boxes.numpy()[tokens], values[tokens], self.view.numpy()[tokens])

    def describe(self) -> str:
        """One line per span, image and video."""
        return text_table([HEADER, *self._overview(), ("last", self.last_index, "")])

    def __repr__(self) -> str:
        texts = [f"{name} {where}" + (f" ({what})" if what else "") for name, where, what in self._overview()]
        return f"TokenLayout({len(self)} tokens: {'; '.join(texts)})"

    def _repr_html_(self) -> str:
        return html_block(f"TokenLayout: {len(self)} tokens", self.html_table())

    def html_table(self) -> str:
        """The table of `describe` in HTML, without a title."""
        return html_table([*self._overview(), ("last", self.last_index, "")], HEADER, named=True)

    def _overview(self) -> list[tuple[str, str, str]]:
        """Name, positions and remarks of each image, each video and each kind of text."""
        table = []
        for number, item in enumerate(self.items):
            positions = self.item == number
            size = f"{item.width}x{item.height} px"
            if item.kind == "video":
                size += f", {item.n_frames} frames, {min(item.times_s):g} to {max(item.times_s):g} s"
            views = [f"{int((item.views == v).sum())} {v.name.lower()}" for v in View if v and (item.views == v).any()]
            n_blank = int((~self.pixels[positions]).sum())
            views += [f"{n_blank} without pixels"] if n_blank else []
            table.append((item.name, _ranges(runs(positions), 2), f"{size}; {', '.join(views)}"))
        spans = {name: self.spans(name) for name in ("system", "template", "question", "answer", "padding")}
        return table + [(name, _ranges(ranges), "") for name, ranges in spans.items() if ranges]


def runs(mask: Bool[Tensor, " pos"]) -> list[tuple[int, int]]:
    """The contiguous true ranges (start, end), end exclusive."""
    edge = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff()  # 1 where a range starts, -1 where it ends
    starts, ends = (edge == 1).nonzero()[:, 0], (edge == -1).nonzero()[:, 0]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _ranges(spans: list[tuple[int, int]], most: int = 3) -> str:
    text = " ".join(f"{a}:{b}" for a, b in spans[:most])
    return text if len(spans) <= most else f"{text} ... {spans[-1][0]}:{spans[-1][1]} ({len(spans)} spans)"
