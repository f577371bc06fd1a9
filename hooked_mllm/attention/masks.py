"""The keys that are visible to each query: the model's own mask, kept as a recipe and built row by row."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from hooked_mllm.attention.streaming import CausalBounds, StreamingHeads
from hooked_mllm.errors import NumericsError, UnsupportedModelError

#: attribute under which a mask tensor carries the recipe it was made from
RECIPE = "hooked_mllm_recipe"


PromptPart = Literal["end", "part", "generated", "both"]


def prompt_part(first: int, stop: int, prompt_length: int) -> PromptPart:
    """What the queries at positions `first` to `stop` are of a prompt, or behind it."""
    if first >= prompt_length:
        return "generated"
    return "both" if stop > prompt_length else "end" if stop == prompt_length else "part"


@dataclass(frozen=True)
class MaskRecipe:
    """The arguments from which transformers built a mask: a rule on (batch, head, query, key) and the padding."""

    rule: Callable[[Any, Any, Any, Any], Any]
    padding: Bool[Tensor, "batch key"] | None
    q_offset: int = 0
    kv_offset: int = 0
    #: what `MaskRows.bounds` found, by (batch, q_length, kv_length): all layers share one recipe
    known: dict[tuple[int, int, int], CausalBounds | None] = field(default_factory=dict, repr=False, compare=False)


def call_sizes(q: Tensor, k: Tensor) -> dict[str, Any]:
    """The sizes of the mask of one call: q `[batch head query d_head]`, k `[batch kv_head key d_head]`."""
    return {"batch": q.shape[0], "q_length": q.shape[2], "kv_length": k.shape[2], "device": q.device}


@dataclass
class MaskRows:
    """The visibility of keys, as rows of a matrix that is never built whole.

    Args:
        batch: Number of sequences.
        q_length: Number of queries.
        kv_length: Number of keys, with those of a KV cache.
        device: Device of the rows.
        recipe: The arguments from which the model's mask was made, if they are known.
        dense: The model's own 4D mask otherwise (True = visible), `[batch 1|head query key]`.
        causal: With neither: query i sees key j iff `j <= i + offset`.
        window: With `causal`: and `j > i + offset - window`.
        padding: True at real keys; keys beyond its width are not real.
        segments: Lengths of packed images; a query sees the keys of its own image only.
        streaming: Heads that see only a sink and a window; `head_rows` has the rows of each head.
        q_offset: The offset, if the last query is not at the last key: a KV cache of fixed size.
        prompt: Whether the queries are the end of a prompt, another part, generated, or both; None if that is unknown.

    Examples:
        >>> rows = MaskRows.causal_rows(batch=1, length=3, device="cpu")
        >>> rows.rows(torch.tensor([[0, 2]])).int().tolist()
        [[[1, 0, 0], [1, 1, 1]]]
    """

    batch: int
    q_length: int
    kv_length: int
    device: torch.device | str
    recipe: MaskRecipe | None = None
    dense: Tensor | None = None
    causal: bool = False
    window: int | None = None
    padding: Bool[Tensor, "batch key"] | None = None
    segments: tuple[int, ...] | None = None
    streaming: StreamingHeads | None = None
    q_offset: int | None = None
    prompt: PromptPart | None = None
    _segment_ids: Tensor | None = field(default=None, repr=False)

    @classmethod
    def causal_rows(cls, batch: int, length: int, device: torch.device | str) -> "MaskRows":
        """A causal mask without padding over `length` positions."""
        return cls(batch, length, length, device, causal=True)

    @classmethod
    def of(
        cls, mask: Any, *, batch: int, q_length: int, kv_length: int, device: torch.device, causal: bool,
        window: int | None = None, segments: tuple[int, ...] | None = None, upper_left: bool = False,
    ) -> "MaskRows":  # fmt: skip
        """The rows of the mask that the attention function received: None, 2D padding, 4D boolean or 4D additive.

        `causal`: whether None means causal. `window`: a sliding window that the attention function applies.
        `upper_left`: whether None with more keys than queries means "query i sees keys 0 to i", as in SDPA (used by
        transformers for the prefill of an empty static KV cache); in flash attention the last query sees the last key.
        An additive mask with numbers other than zero and very negative ones raises a `NumericsError`.
        """
        recipe = getattr(mask, RECIPE, None)
        common = (batch, q_length, kv_length, device)
        if segments is not None:
            return cls(*common, segments=segments)
        if recipe is not None:
            return cls(*common, recipe=recipe)
        if mask is None:
            first = 0 if causal and upper_left and 1 < q_length < kv_length else None
            return cls(*common, causal=causal and q_length > 1, window=window, q_offset=first)
        if not isinstance(mask, Tensor):
            raise UnsupportedModelError(
                f"The model's attention takes a {type(mask).__name__} for its mask, which shows no pattern: set "
                "attention='sdpa' or 'eager'."
            )
        if mask.dim() == 2:  # as wide as what was read so far, these queries included
            seen = mask.shape[1] - q_length
            first = seen if causal and 0 <= seen < kv_length - q_length else None
            return cls(*common, causal=causal, window=window, padding=mask.bool(), q_offset=first)
        if mask.dtype == torch.bool:
            return cls(*common, dense=mask)
        hidden = mask < torch.finfo(mask.dtype).min / 4
        if bool(((mask != 0) & ~hidden).any()):
            raise NumericsError(
                "The attention mask adds numbers to the scores (expected 0 for visible and a very negative number for "
                "hidden keys). Patterns recomputed from q and k would miss them: load the model with "
                "attention='eager' and hook `hook_attn_scores`, or pass a boolean mask."
            )
        return cls(*common, dense=~hidden)

    def to(self, device: torch.device | str) -> "MaskRows":
        """The same mask, its rows built on `device`."""
        moved = {name: None if x is None else x.to(device) for name, x in self._masks().items()}
        recipe = self.recipe
        if recipe is not None and recipe.padding is not None:
            recipe = MaskRecipe(recipe.rule, recipe.padding.to(device), recipe.q_offset, recipe.kv_offset)
        return replace(self, device=device, recipe=recipe, _segment_ids=None, **moved)

    def samples(self, picked: Int[Tensor, " sample"]) -> "MaskRows":
        """The mask of some samples of the batch."""
        if self.recipe is not None:
            return self.compact().samples(picked)
        picked = picked.to(self.device)
        selected = {
            name: None if x is None else x.expand(self.batch, *x.shape[1:])[picked] for name, x in self._masks().items()
        }
        return replace(self, batch=len(picked), **selected, _segment_ids=None)

    def _masks(self) -> dict[str, Tensor | None]:
        return {"dense": self.dense, "padding": self.padding}

    def tensors(self) -> list[Tensor]:
        """The tensors that this mask keeps alive."""
        tensors = (self.dense, self.padding, None if self.recipe is None else self.recipe.padding)
        return [tensor for tensor in tensors if tensor is not None]

    def resized(self, batch: int, length: int, segments: tuple[int, ...] | None = None) -> "MaskRows":
        """The same kind of mask over another batch and length, for joined calls of a vision tower."""
        return replace(self, batch=batch, q_length=length, kv_length=length, segments=segments, _segment_ids=None)

    @property
    def plain_causal(self) -> bool:
        """Whether this is the causal rule and nothing else, the same for all samples."""
        others = (self.window, self.padding, self.streaming, self.q_offset)
        return self.causal and all(other is None for other in others)

    @property
    def offset(self) -> int:
        """Keys before the first query, where no recipe states them."""
        return self.kv_length - self.q_length if self.q_offset is None else self.q_offset

    def head_rows(self, index: Int[Tensor, "batch query"]) -> Bool[Tensor, "batch mask_head query key"]:
        """The rows of the mask at `index` as each head sees them; one for all heads if none of them streams."""
        if self.dense is not None and self.dense.shape[1] > 1:
            mask = self.dense[..., : self.kv_length].expand(self.batch, -1, -1, -1)
            return torch.take_along_dim(mask, index.to(self.device)[:, None, :, None], dim=2)
        visible = self.rows(index)[:, None]
        if self.streaming is None:
            return visible
        return visible & (self._near(index, self.streaming)[:, None] | self.streaming.flags(self.device)[:, None, None])

    def streaming_rows(self, index: Int[Tensor, "batch query"]) -> Bool[Tensor, "batch query key"]:
        """The rows of the mask at `index` as a streaming head sees them; those of any head if none of them streams."""
        visible = self.rows(index)
        return visible if self.streaming is None else visible & self._near(index, self.streaming)

    def _near(self, index: Tensor, streaming: StreamingHeads) -> Bool[Tensor, "batch query key"]:
        bounds = self.bounds()
        assert bounds is not None  # checked by `streamed`
        key = torch.arange(self.kv_length, device=self.device)
        position = index.to(self.device)[..., None] + bounds.offset  # [batch query 1]
        first = 0 if bounds.start is None else bounds.start.to(self.device)[:, None, None]
        return (key > position - streaming.window) | (key < first + streaming.sink)

    def streamed(self, streaming: StreamingHeads) -> "MaskRows":
        """This mask with streaming heads; it must be causal with padding only at the ends."""
        if self.bounds() is None:
            raise UnsupportedModelError(
                "Streaming heads need a causal mask, with padding at the ends of a sequence if anywhere; this "
                "attention call has another (a vision tower, a sliding window, packed sequences, or a mask of your "
                "own). Use attention='sdpa' there."
            )
        return replace(self, streaming=streaming)

    def bounds(self) -> CausalBounds | None:
        """This mask in numbers if it is causal, with padding only at the ends; one device sync for all layers."""
        if self.recipe is not None:
            key = (self.batch, self.q_length, self.kv_length)
            if key not in self.recipe.known:
                self.recipe.known[key] = self._recipe_bounds(self.recipe)
            return self.recipe.known[key]
        if self.dense is not None:
            mask = self.dense[..., : self.kv_length].expand(self.batch, -1, -1, -1)  # [batch mask_head query key]
            guess = replace(self, dense=None, causal=True, padding=mask[:, 0, -1], _segment_ids=None)
            same = all(bool((mask[:, :, i[0]] == guess.rows(i)[:, None]).all()) for i in self._chunks())
            return guess.bounds() if same else None
        if self.segments is not None or self.window is not None or (not self.causal and self.q_length > 1):
            return None
        return _bounds(self.padding, self.offset, self.offset + self.q_length)

    def _recipe_bounds(self, recipe: MaskRecipe) -> CausalBounds | None:
        if recipe.kv_offset:
            return None
        if recipe.rule is not causal_mask_function:
            bare = replace(self, recipe=MaskRecipe(recipe.rule, None, recipe.q_offset))
            causal = replace(self, recipe=None, causal=True, q_offset=recipe.q_offset)
            if not all(torch.equal(bare.rows(index), causal.rows(index)) for index in self._chunks()):
                return None
        return _bounds(recipe.padding, recipe.q_offset, recipe.q_offset + self.q_length)

    def _chunks(self) -> tuple[Int[Tensor, "batch query"], ...]:
        return torch.arange(self.q_length, device=self.device).expand(self.batch, -1).split(1024, dim=1)

    def rows(self, index: Int[Tensor, "batch query"]) -> Bool[Tensor, "batch query key"]:
        """The rows of the mask at `index`: True where the query sees the key, in a dense head if some heads stream."""
        index = index.to(self.device)
        keys = torch.arange(self.kv_length, device=self.device)
        if self.dense is not None:
            mask = self.dense.any(1) if self.dense.shape[1] > 1 else self.dense[:, 0]
            mask = mask[..., : self.kv_length].expand(self.batch, -1, -1)
            return torch.take_along_dim(mask, index[..., None], dim=1)
        if self.segments is not None:
            if self._segment_ids is None:
                ids = torch.arange(len(self.segments), device=self.device)
                self._segment_ids = ids.repeat_interleave(torch.tensor(self.segments, device=self.device))
            return self._segment_ids[index][..., None] == self._segment_ids
        if self.recipe is not None:
            return self._recipe_rows(self.recipe, index, keys + self.recipe.kv_offset)
        visible = torch.ones(*index.shape, self.kv_length, dtype=torch.bool, device=self.device)
        last = index[..., None] + self.offset
        if self.causal:
            visible &= keys <= last
        if self.window is not None:
            visible &= keys > last - self.window
        if self.padding is not None:
            visible &= _as_wide(self.padding, self.kv_length)[:, None]
        return visible

    def _recipe_rows(self, recipe: MaskRecipe, index: Tensor, keys: Tensor) -> Tensor:
        sample = torch.arange(self.batch, device=self.device)[:, None, None]
        visible = recipe.rule(sample, torch.zeros_like(sample), index[..., None] + recipe.q_offset, keys)
        visible = visible.expand(self.batch, index.shape[1], self.kv_length)
        if recipe.padding is not None:
            real = _as_wide(recipe.padding.to(self.device), recipe.kv_offset + self.kv_length)
            visible = visible & real[:, None, recipe.kv_offset :]
        return visible

    def full(self) -> Bool[Tensor, "batch query key"]:
        """Every row: N x N booleans, for the explicit attention of one layer only."""
        return self.rows(torch.arange(self.q_length, device=self.device).expand(self.batch, -1))

    def compact(self) -> "MaskRows":
        """The same mask without closures, so that it can be saved: causal with padding if that is equivalent."""
        recipe = self.recipe
        if recipe is None:
            return self
        common = (self.batch, self.q_length, self.kv_length, self.device)
        padding = None if recipe.padding is None else _as_wide(recipe.padding, self.kv_length)
        guess = MaskRows(*common, causal=True, padding=padding, streaming=self.streaming, q_offset=recipe.q_offset)
        if self.bounds() is not None:
            return guess
        chunks = self._chunks()
        if not recipe.kv_offset and all(torch.equal(guess.rows(chunk), self.rows(chunk)) for chunk in chunks):
            return guess
        return MaskRows(*common, dense=torch.cat([self.head_rows(chunk) for chunk in chunks], dim=2))


def _as_wide(padding: Tensor, length: int) -> Tensor:
    """A mask of real keys, cut or padded with False to `length`."""
    short = length - padding.shape[1]
    return torch.nn.functional.pad(padding, (0, short)) if short > 0 else padding[:, :length]


def _bounds(padding: Tensor | None, offset: int, length: int) -> CausalBounds | None:
    """The bounds of causal attention for real keys `[batch key]`, without those from `length` on; None with holes."""
    if padding is None:
        return CausalBounds(offset)
    real = _as_wide(padding, length)
    if bool(real.all()):
        return CausalBounds(offset)
    count = real.sum(1)
    start = real.int().argmax(1)
    key = torch.arange(length, device=real.device)
    contiguous = (key >= start[:, None]) & (key < (start + count)[:, None])
    return CausalBounds(offset, start, start + count) if torch.equal(contiguous, real) else None


def with_recipe(mask: Any, **arguments: Any) -> Any:
    """Attach the recipe to a mask tensor that transformers' mask function returned for these arguments."""
    rule = arguments.get("mask_function")
    padding = arguments.get("attention_mask")
    plain = padding is None or padding.dim() == 2
    if rule is not None and plain and isinstance(mask, Tensor) and not torch.compiler.is_compiling():
        q_offset, kv_offset = (int(arguments.get(name) or 0) for name in ("q_offset", "kv_offset"))
        setattr(mask, RECIPE, MaskRecipe(rule, None if padding is None else padding.bool(), q_offset, kv_offset))
    return mask
