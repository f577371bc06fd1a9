"""Which query tokens of each sample the attention rows are gathered for, from masks of positions.

Masks are kept on the host, where reading sizes does not wait for the device, and copied to the device once.
"""

from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mllm.errors import InputError
from hooked_mllm.inputs.positions import KindMasks, check_every_sample, resolve_mask
from hooked_mllm.layout import Region

#: query tokens or keys, as keys of tables: a token kind, a region or several; a mask or indices (by identity)
TokenMask = str | Region | tuple[Region, ...] | Tensor


class QuerySelection:
    """The query tokens of a batch, padded to the longest sample by repeating the last one of each."""

    def __init__(self, key: TokenMask, mask: Bool[np.ndarray, "batch pos"], device: torch.device) -> None:
        self.key = key
        self.device = device
        #: name of the mask in messages
        self.label = repr(key) if isinstance(key, str) else "given"
        #: number of query tokens of each sample, and of the longest
        self.counts = mask.sum(1)
        self.length = int(self.counts.max())
        indices = [np.flatnonzero(sample_mask) for sample_mask in mask]
        #: position of each query token [batch query]; a short sample repeats its last one
        self.positions = np.stack([np.pad(index, (0, self.length - len(index)), mode="edge") for index in indices])
        self.lowest = int(self.positions.min())
        #: whether all samples have the same number of query tokens
        self.even = bool((self.counts == self.length).all())
        start = int(self.positions[0, 0])
        together = (self.positions == np.arange(start, start + self.length)).all()
        #: (start, end) if these are the same contiguous positions in every sample: a slice instead of a gather
        self.span = (start, start + self.length) if together else None

    @cached_property
    def index(self) -> Int[Tensor, "batch query"]:
        """Position of each query token, on the device."""
        if self.span is not None:
            return torch.arange(*self.span, device=self.device).expand(len(self.positions), -1)
        return torch.from_numpy(self.positions).to(self.device, non_blocking=True)

    @cached_property
    def valid(self) -> Bool[Tensor, "batch query"]:
        """False where the repetition begins, on the device."""
        return torch.from_numpy(self._valid).to(self.device, non_blocking=True)

    @cached_property
    def weight(self) -> Float[Tensor, "batch query"]:
        """1/|Q| of the sample at its own query tokens and 0 elsewhere, float32 on the device."""
        weight = (self._valid / self.counts[:, None]).astype(np.float32)
        return torch.from_numpy(weight).to(self.device, non_blocking=True)

    def average(self, values: Float[np.ndarray, "batch query"]) -> Float[np.ndarray, " batch"]:
        """The mean over each sample's own query tokens, on the host."""
        return (values * self._valid).sum(1) / self.counts

    def take(
        self, q: Float[Tensor, "batch head pos d_head"], part: slice, first: int = 0
    ) -> Float[Tensor, "batch head query d_head"]:
        """The rows of q for a part of the query tokens; `first` is the position of the first row of q."""
        self.check(first)
        if self.span is not None:
            start = self.span[0] - first
            return q.narrow(2, start + part.start, part.stop - part.start)
        # [batch query] -> [batch head query d_head]
        index = self.index[:, None, part, None].expand(-1, q.shape[1], -1, q.shape[3])
        return q.gather(2, index - first)

    def check(self, first: int) -> None:
        """Reject query tokens before position `first`."""
        if self.lowest < first:
            raise InputError(
                f"Some of the {self.label} query tokens lie before position {first}, in a shared prefix of which only "
                "the keys were kept. Name the query tokens in the metric's attribute `queries`, or measure on "
                "plain batches (for NullQuery, reuse_prefix=False)."
            )

    @cached_property
    def _valid(self) -> Bool[np.ndarray, "batch query"]:
        return np.arange(self.length) < self.counts[:, None]


class Selections:
    """The masks `[batch pos]` of one batch, and query selections made from them; views of a forward pass share one."""

    def __init__(self, masks: KindMasks, shape: tuple[int, int], device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self._masks = masks
        # by name or by mask: a tensor is hashed by its identity
        self._hosts: dict[TokenMask, np.ndarray] = {}
        self._devices: dict[TokenMask, Tensor] = {}
        self._queries: dict[TokenMask, QuerySelection] = {}
        self._chances: dict[tuple[TokenMask, TokenMask], Tensor] = {}
        self._spans: dict[TokenMask, tuple[slice, bool]] = {}
        # padding is never a query or a key
        padding = masks("padding").cpu().numpy()
        if padding.shape != shape or padding.dtype != bool:
            raise InputError(
                f"The padding mask must be boolean {list(shape)} [batch pos]; got {padding.dtype} of shape "
                f"{list(padding.shape)}."
            )
        self._real, self._hosts["padding"] = ~padding, padding
        #: number of tokens of each sample, without padding
        self.lengths: list[int] = self._real.sum(1).tolist()
        #: whether any sample has padding
        self.padded = not bool(self._real.all())

    def host(self, name: TokenMask) -> Bool[np.ndarray, "batch pos"]:
        """The mask on the host, without padding; every sample must have such a position."""
        if name not in self._hosts:
            mask = resolve_mask(name, *self.shape, self._masks).numpy() & self._real
            check_every_sample(torch.from_numpy(mask.any(1)), name)
            self._hosts[name] = mask
        return self._hosts[name]

    def mask(self, name: TokenMask) -> Bool[Tensor, "batch pos"]:
        """The mask of `host` on the device."""
        if name not in self._devices:
            self._devices[name] = torch.from_numpy(self.host(name)).to(self.device, non_blocking=True)
        return self._devices[name]

    def span(self, name: TokenMask) -> tuple[slice, bool]:
        """From the first to the last position of that name in any sample, and whether all between are of it."""
        if name not in self._spans:
            positions = np.flatnonzero(self.host(name).any(0))
            span = slice(int(positions[0]), int(positions[-1]) + 1)
            self._spans[name] = (span, bool(self.host(name)[:, span].all()))
        return self._spans[name]

    def queries(self, name: TokenMask) -> QuerySelection:
        """The rows to gather for a mask of query tokens."""
        if name not in self._queries:
            self._queries[name] = QuerySelection(name, self.host(name), self.device)
        return self._queries[name]

    def causal_chance(self, queries: TokenMask, keys: TokenMask) -> Float[Tensor, " batch"]:
        """The mass on the keys of a head that attends evenly to positions 0 .. i, counted on the host."""
        if (queries, keys) not in self._chances:
            selection = self.queries(queries)
            visible = np.take_along_axis(self.host(keys).cumsum(1), selection.positions, axis=1)  # [batch query]
            level = selection.average(visible / (selection.positions + 1))
            self._chances[queries, keys] = torch.from_numpy(level).to(self.device, non_blocking=True)
        return self._chances[queries, keys]
