"""From masks of positions to the rows to gather: which query tokens each sample of a batch asks about.

The masks of a batch are small and known before the forward pass. They are kept on the host, so that sizes and positions
are read without waiting for the device, and copied to the device once, when first needed there.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mllm.errors import InputError


class QuerySelection:
    """The query tokens of a batch, padded to the longest sample by repeating the last one of each.

    Args:
        key: What identifies the selection in a cache.
        mask: True at the query tokens, on the host; at least one in every sample.
        device: Where the attention is computed.
    """

    def __init__(self, key: object, mask: Bool[np.ndarray, "batch pos"], device: torch.device) -> None:
        self.key = key
        self.device = device
        #: name of the mask in messages
        self.label = repr(key) if isinstance(key, str) else "given"
        #: number of query tokens of each sample
        self.counts = mask.sum(1)
        #: that of the longest
        self.length = int(self.counts.max())
        rows = [np.flatnonzero(row) for row in mask]
        #: position of each query token [batch query]
        self.positions = np.stack([np.pad(row, (0, self.length - len(row)), mode="edge") for row in rows])
        #: the first position of all
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
        """1/|Q| of the sample at valid places and 0 elsewhere, float32 on the device."""
        weight = (self._valid / self.counts[:, None]).astype(np.float32)
        return torch.from_numpy(weight).to(self.device, non_blocking=True)

    def average(self, values: Float[np.ndarray, "batch query"]) -> Float[np.ndarray, " batch"]:
        """The mean over each sample's own query tokens, on the host."""
        return (values * self._valid).sum(1) / self.counts

    def take(
        self, q: Float[Tensor, "batch head pos d_head"], part: slice, first: int = 0
    ) -> Float[Tensor, "batch head query d_head"]:
        """The chosen rows of q, which begins at position `first`.

        Raises:
            InputError: for a query before that.
        """
        self.check(first)
        if self.span is not None:
            start = self.span[0] - first
            return q.narrow(2, start + part.start, part.stop - part.start)
        index = self.index[:, None, part, None].expand(-1, q.shape[1], -1, q.shape[3])
        return q.gather(2, index - first)

    def check(self, first: int) -> None:
        """Refuse query tokens before position `first`.

        Raises:
            InputError: for a query before that.
        """
        if self.lowest < first:
            raise InputError(
                f"Some of the {self.label} query tokens stand before position {first}, and of that shared prefix only "
                "the keys were kept. Let the metric name its query tokens in an attribute `queries`, or measure on "
                "plain batches (for NullQuery, reuse_prefix=False)."
            )

    @cached_property
    def _valid(self) -> Bool[np.ndarray, "batch query"]:
        return np.arange(self.length) < self.counts[:, None]


class Selections:
    """The masks of one batch by name, and the query selections made from them; the views of a forward pass share one.

    Args:
        masks: Gives the mask of a name, [batch pos]; must know "padding". On the CPU they spare waiting for the device.
        shape: (batch, pos) that every mask must have.
        device: Where the attention is computed.
    """

    def __init__(
        self, masks: Callable[[str], Bool[Tensor, "batch pos"]], shape: tuple[int, int], device: torch.device
    ) -> None:
        self.shape = shape
        self.device = device
        self._source = masks
        self._hosts: dict[object, np.ndarray] = {}
        self._devices: dict[object, Tensor] = {}
        self._queries: dict[object, QuerySelection] = {}
        self._chances: dict[tuple[object, object], Tensor] = {}
        self._spans: dict[object, tuple[slice, bool]] = {}
        self._kept: list[Tensor] = []  # tensors given as masks stay alive, so that their id stays theirs
        self._real: np.ndarray | None = None
        self._real = ~self.host("padding")
        #: number of tokens of each sample, without padding
        self.lengths: list[int] = self._real.sum(1).tolist()
        #: whether any sample has padding
        self.padded = not bool(self._real.all())

    def host(self, name: str | Bool[Tensor, "batch pos"]) -> Bool[np.ndarray, "batch pos"]:
        """The mask on the host; refused if a sample has no such position."""
        key = name if isinstance(name, str) else id(name)
        if key not in self._hosts:
            self._hosts[key] = self._read(name)
            if not isinstance(name, str):
                self._kept.append(name)
        return self._hosts[key]

    def mask(self, name: str | Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """The mask on the device; refused if a sample has no such position."""
        key = name if isinstance(name, str) else id(name)
        if key not in self._devices:
            self._devices[key] = torch.from_numpy(self.host(name)).to(self.device, non_blocking=True)
        return self._devices[key]

    def span(self, name: str | Bool[Tensor, "batch pos"]) -> tuple[slice, bool]:
        """From the first to the last position of that name in any sample, and whether all between are of it."""
        key = name if isinstance(name, str) else id(name)
        if key not in self._spans:
            found = np.flatnonzero(self.host(name).any(0))
            span = slice(int(found[0]), int(found[-1]) + 1)
            self._spans[key] = (span, bool(self.host(name)[:, span].all()))
        return self._spans[key]

    def queries(self, name: str | Bool[Tensor, "batch pos"]) -> QuerySelection:
        """The rows to gather for a mask of query tokens."""
        key = name if isinstance(name, str) else id(name)
        if key not in self._queries:
            self._queries[key] = QuerySelection(key, self.host(name), self.device)
        return self._queries[key]

    def causal_chance(
        self, queries: str | Bool[Tensor, "batch pos"], keys: str | Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, " batch"]:
        """The mass on the keys of a head that attends evenly to positions 0 .. i, counted on the host."""
        selection = self.queries(queries)
        name = (selection.key, keys if isinstance(keys, str) else id(keys))
        if name not in self._chances:
            hit = np.take_along_axis(self.host(keys).cumsum(1), selection.positions, axis=1)
            level = selection.average(hit / (selection.positions + 1))
            self._chances[name] = torch.from_numpy(level).to(self.device, non_blocking=True)
        return self._chances[name]

    def _read(self, name: str | Tensor) -> np.ndarray:
        mask = self._source(name) if isinstance(name, str) else name
        label = repr(name) if isinstance(name, str) else "given"
        if tuple(mask.shape) != self.shape or mask.dtype != torch.bool:
            raise InputError(
                f"The {label} mask must be boolean of shape {list(self.shape)} [batch pos]; "
                f"got {mask.dtype} of shape {list(mask.shape)}."
            )
        host = mask.cpu().numpy()
        if self._real is None:  # the padding itself
            return host
        host = host & self._real  # padding is never a query or a key
        found = host.any(1)
        if not found.all():
            raise InputError(
                f"The {label} mask is empty for sample {int(found.argmin())} of the batch: at least one such token is "
                "needed in every sample. Give the sample what is missing, or choose other queries or keys."
            )
        return host
