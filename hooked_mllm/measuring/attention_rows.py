"""The attention rows of a group of layers, from q and k: by a Triton kernel where it runs, else by torch in chunks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.row_statistics import attention_rows, chance_level, counted_chance
from hooked_mllm.attention.streaming import CausalBounds
from hooked_mllm.errors import HookValueError, InputError
from hooked_mllm.kernels.attention_profile import kernel_fits, kernel_runs
from hooked_mllm.measuring.query_selection import QuerySelection

#: the implementation of profiles of views that specify none: "auto", "triton" or "torch"
IMPLEMENTATION = "auto"


class Chunk(NamedTuple):
    """Rows of some layers, heads and queries, always of the whole batch."""

    layers: slice
    heads: slice
    queries: slice
    rows: Tensor


class LayerRows:
    """The tensors that an `AttentionView` is computed from, and the computation; arguments as there."""

    def __init__(
        self,
        q: Sequence[Tensor] | Mapping[str, Sequence[Tensor]],
        k: Sequence[Tensor],
        mask: Sequence[MaskRows],
        scale: Sequence[float],
        first: int,
        max_bytes: int,
        implementation: str | None,
    ) -> None:
        self._q, self._k, self._mask, self._scale = q, k, mask, list(scale)
        self._first, self._max_bytes = first, max_bytes
        example = next(iter(q.values()))[0] if isinstance(q, Mapping) else q[0]
        self.batch, self.n_heads = example.shape[:2]
        self.n_kv_heads, self.n_keys = k[0].shape[1:3]
        self.device = k[0].device
        self.plain_causal = all(rows.plain_causal for rows in mask)
        self._kinds = [()] * len(mask) if self.plain_causal else [_identity(rows) for rows in mask]
        self._known: dict[tuple[object, ...], CausalBounds | None] = {}
        implementation = IMPLEMENTATION if implementation is None else implementation
        if implementation not in ("auto", "triton", "torch"):
            raise HookValueError(f"implementation is 'auto', 'triton' or 'torch'; got {implementation!r}.")
        if implementation == "triton" and not kernel_runs(self.device):
            raise HookValueError(f"The Triton kernel runs on a GPU; k is on {self.device}. 'torch' runs anywhere.")
        self.by_kernel = implementation == "triton" or (implementation == "auto" and k[0].is_cuda)
        if self.by_kernel and not (kernel_fits(example.shape[-1], example.dtype) and self._share_bounds()):
            if implementation == "triton":
                raise HookValueError(
                    "The Triton kernel takes causal masks with padding at the ends, head dims 16 to 256 in bfloat16, "
                    f"float16 or float32; got {example.shape[-1]} in {example.dtype}. 'torch' takes any."
                )
            self.by_kernel = False

    def check(self, selection: QuerySelection) -> None:
        """Raise for queries whose rows were not kept: before the first, or of another name."""
        selection.check(self._first)
        if isinstance(self._q, Mapping) and selection.key not in self._q:
            raise InputError(
                f"The rows of the {selection.label} query tokens were not kept: the attributes `queries` of this run's "
                f"metrics list only {', '.join(self._q)}. List all names there, as a tuple, or remove the attribute."
            )

    def drop(self) -> None:
        """Free q and k."""
        self._q, self._k, self._mask, self._kinds = [], [], [], []

    def profile(self, selection: QuerySelection) -> Float[Tensor, "layer batch head key"]:
        """The mean row over the query tokens."""
        if not self.by_kernel:
            return self._profile_by_rows(selection)
        bounds = [self._bounds(number) for number in range(len(self._k))]
        start, end = (self._joined([b and getattr(b, name) for b in bounds]) for name in ("start", "end"))
        kinds = [mask.streaming for mask in self._mask]
        streaming = [None if kind is None else (kind.dense, kind.sink, kind.window) for kind in kinds]
        from hooked_mllm.kernels.attention_profile.launch import triton_attention_profile  # needs a GPU's compiler

        q = self._query_rows(selection, slice(0, len(self._k)), slice(0, selection.length))
        positions = self._key_index(selection, bounds[0])
        return triton_attention_profile(q, self._k, self._scale, positions, selection.weight, start, end, streaming)

    def _joined(self, edges: list[Tensor | None]) -> Tensor | None:
        """One edge for all layers if they share it, else `[layer batch]`."""
        if all(edge is edges[0] for edge in edges):
            return edges[0]
        return torch.stack([edge.to(self.device) for edge in edges if edge is not None])

    def _profile_by_rows(self, selection: QuerySelection) -> Tensor:
        out: Tensor | None = None
        for chunk in self.chunks(selection):
            if selection.even and chunk.rows.shape[3] == selection.length:
                piece = chunk.rows.mean(-2)
            else:
                piece = chunk.rows.mul_(selection.weight[:, None, chunk.queries, None]).sum(-2)
            if piece.shape[0] == len(self._k) and piece.shape[2] == self.n_heads and out is None:
                out = piece  # a chunk with all layers and heads
                continue
            if out is None:
                out = piece.new_zeros(len(self._k), self.batch, self.n_heads, self.n_keys)
            out[chunk.layers, :, chunk.heads] += piece
        assert out is not None
        return out

    def chance(
        self, selection: QuerySelection, keys: Bool[Tensor, "batch key"]
    ) -> Float[Tensor, "layer batch mask_head"]:
        """The mass on the keys of heads that attend evenly to all visible keys."""
        levels: dict[tuple[object, ...], Tensor] = {}
        for number, kind in enumerate(self._kinds):
            if kind not in levels:
                levels[kind] = self._mask_chance(number, selection, keys)
        heads = max(level.shape[1] for level in levels.values())
        return torch.stack([levels[kind].expand(-1, heads) for kind in self._kinds])

    def _mask_chance(
        self, number: int, selection: QuerySelection, keys: Bool[Tensor, "batch key"]
    ) -> Float[Tensor, "batch mask_head"]:
        mask, bounds = self._mask[number], self._bounds(number)
        if bounds is None:
            level = torch.zeros((), device=self.device)
            for part in _parts(selection.length, self._query_step()):
                visible = mask.head_rows(selection.index[:, part] - self._first).to(self.device)
                level = level + chance_level(visible, keys, selection.weight[:, part])
            return level
        arguments = (self._key_index(selection, bounds), keys, selection.weight, bounds.start, bounds.end)
        level = counted_chance(*arguments)[:, None]
        if mask.streaming is None:
            return level
        near = counted_chance(*arguments, near=(mask.streaming.sink, mask.streaming.window))[:, None]
        return torch.where(mask.streaming.flags(self.device), level, near)

    def chunks(self, selection: QuerySelection) -> Iterator[Chunk]:
        """All rows of the selection, in chunks: split over queries, then layers, then heads as memory requires."""
        group = self.n_heads // self.n_kv_heads
        query_step = min(selection.length, self._query_step())
        kv_step = min(self.n_kv_heads, max(1, self._max_bytes // (self._row_bytes(group) * query_step)))
        layer_step = 1
        if kv_step == self.n_kv_heads:
            layer_step = max(1, self._max_bytes // (self._row_bytes(self.n_heads) * query_step))
        share_mask = self.plain_causal or len(set(self._kinds)) == 1
        for queries in _parts(selection.length, query_step):
            shared = self._hidden(selection, queries, slice(0, 1)) if share_mask else None
            for layers in _parts(len(self._k), layer_step):
                hidden = self._hidden(selection, queries, layers) if shared is None else shared
                for kv_heads in _parts(self.n_kv_heads, kv_step):
                    heads = slice(kv_heads.start * group, kv_heads.stop * group)
                    q, k, masked = self._query_rows(selection, layers, queries), list(self._k[layers]), hidden
                    if kv_step < self.n_kv_heads:
                        q, k = [t[:, heads] for t in q], [t[:, kv_heads] for t in k]
                        masked = hidden if hidden.shape[2] == 1 else hidden[:, :, heads]
                    yield Chunk(layers, heads, queries, attention_rows(_stack(q), k, self._scale[layers], masked))

    def _row_bytes(self, heads: int) -> int:
        return self.batch * heads * self.n_keys * 9  # float32 scores, their softmax, and a mask of bytes

    def _query_step(self) -> int:
        """The number of queries of one group of heads (those of one key head) that fit into the scratch memory."""
        return max(1, self._max_bytes // self._row_bytes(self.n_heads // self.n_kv_heads))

    def _query_rows(self, selection: QuerySelection, layers: slice, part: slice) -> list[Tensor]:
        """The query rows of each layer, [batch head query d_head]."""
        if isinstance(self._q, Mapping):
            return [t[:, :, part] for t in self._q[str(selection.key)][layers]]
        return [selection.take(t, part, self._first) for t in self._q[layers]]

    def _hidden(
        self, selection: QuerySelection, part: slice, layers: slice
    ) -> Bool[Tensor, "mask_layer batch mask_head query tail"]:
        """True at those of the last `tail` keys that are masked for these queries; earlier keys are visible to all."""
        index = selection.index[:, part]
        if self.plain_causal:  # keys up to the first query are visible to all of them
            first = int(selection.positions[:, part].min()) + 1
            return (torch.arange(first, self.n_keys, device=self.device) > index[..., None])[None, :, None]
        kinds = self._kinds[layers]
        distinct = dict(zip(kinds, self._mask[layers], strict=True))
        built = {kind: ~mask.head_rows(index - self._first).to(self.device) for kind, mask in distinct.items()}
        if len(built) == 1:
            return next(iter(built.values()))[None]
        heads = max(hidden.shape[1] for hidden in built.values())
        return torch.stack([built[kind].expand(-1, heads, -1, -1) for kind in kinds])

    def _bounds(self, number: int) -> CausalBounds | None:
        """The causal bounds of a layer's mask; computed once for identical masks."""
        kind = self._kinds[number]
        if kind not in self._known:
            self._known[kind] = self._mask[number].bounds()
        return self._known[kind]

    def _share_bounds(self) -> bool:
        """Whether one launch serves all layers: causal masks with padding at the ends and one offset."""
        bounds = [self._bounds(number) for number in range(len(self._k))]
        facts = {None if b is None else (b.offset, b.start is None, b.end is None) for b in bounds}
        return None not in facts and len(facts) == 1 and min(self._scale) > 0

    def _key_index(self, selection: QuerySelection, bounds: CausalBounds | None) -> Tensor:
        """The index of each query among the keys."""
        shift = 0 if bounds is None else bounds.offset - self._first
        return selection.index + shift if shift else selection.index


def _identity(mask: MaskRows) -> tuple[object, ...]:
    """Equal for masks with the same tensors: transformers passes one mask tensor to many layers."""
    tensors = (mask.recipe, mask.dense, mask.padding)
    numbers = (mask.causal, mask.window, mask.segments, mask.q_length, mask.kv_length, mask.streaming)
    return (*map(id, tensors), *numbers)


def _parts(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _stack(tensors: list[Tensor]) -> Tensor:
    """[batch ...] per layer to [layer batch ...] in one launch; a view if there is one layer."""
    if len(tensors) == 1:
        return tensors[0][None]
    # cat copies up to 4 axes in one kernel; stacking to 5 would take one per layer
    return torch.cat(tensors).view(len(tensors), *tensors[0].shape)
