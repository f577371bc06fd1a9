"""From masks of positions to the rows to gather: which query tokens each sample of a batch asks about."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mllm.errors import InputError


@dataclass(frozen=True)
class QuerySelection:
    """The query tokens of a batch, padded to the longest sample by repeating the last one of each.

    Args:
        key: What identifies the selection in a cache.
        index: Position of each query token.
        valid: False where the repetition begins.
        weight: 1/|Q| of the sample at valid places, 0 elsewhere.
        span: (start, end) if these are the same contiguous positions in every sample: a slice instead of a gather.
    """

    key: object
    index: Int[Tensor, "batch query"]
    valid: Bool[Tensor, "batch query"]
    weight: Float[Tensor, "batch query"]
    even: bool
    span: tuple[int, int] | None

    @property
    def length(self) -> int:
        """Number of query tokens of the longest sample."""
        return self.index.shape[1]

    def take(self, q: Float[Tensor, "batch head pos d_head"], part: slice) -> Float[Tensor, "batch head query d_head"]:
        """The chosen rows of q."""
        if self.span is not None:
            return q[:, :, self.span[0] + part.start : self.span[0] + part.stop]
        index = self.index[:, None, part, None].expand(-1, q.shape[1], -1, q.shape[3])
        return q.gather(2, index)


class Selections:
    """The masks of one batch by name, on the host and on the device, and the query selections made from them.

    Args:
        masks: Gives the mask of a name, [batch pos].
        shape: (batch, pos) that every mask must have.
        device: Where the attention is computed.
    """

    def __init__(
        self, masks: Callable[[str], Bool[Tensor, "batch pos"]], shape: tuple[int, int], device: torch.device
    ) -> None:
        self._source = masks
        self._shape = shape
        self._device = device
        self._masks: dict[object, tuple[Tensor, Tensor]] = {}  # key: (on the host, on the device)
        self._queries: dict[object, QuerySelection] = {}
        self._kept: list[Tensor] = []  # tensors given as masks stay alive, so that their id stays theirs
        self._real: Tensor | None = None
        padding = self._fetch("padding")[0]
        self._real = ~padding
        self.lengths: list[int] = self._real.sum(1).tolist()
        self.padding: Tensor | None = self._masks["padding"][1] if bool(padding.any()) else None

    def mask(self, name: str | Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """The mask on the device; refused if a sample has no such position."""
        return self._fetch(name)[1]

    def queries(self, name: str | Bool[Tensor, "batch pos"]) -> QuerySelection:
        """The rows to gather for a mask of query tokens."""
        key = name if isinstance(name, str) else id(name)
        if key not in self._queries:
            host = self._fetch(name)[0]
            self._queries[key] = _select(key, host, self._device)
        return self._queries[key]

    def _fetch(self, name: str | Tensor) -> tuple[Tensor, Tensor]:
        key = name if isinstance(name, str) else id(name)
        if key not in self._masks:
            mask = self._source(name) if isinstance(name, str) else name
            label = repr(name) if isinstance(name, str) else "given"
            if tuple(mask.shape) != self._shape or mask.dtype != torch.bool:
                raise InputError(
                    f"The {label} mask must be boolean of shape {list(self._shape)} [batch pos]; "
                    f"got {mask.dtype} of shape {list(mask.shape)}."
                )
            host = mask.cpu()
            if self._real is not None:
                host = host & self._real  # padding is never a query or a key
            empty = (~host.any(1)).nonzero().flatten().tolist()
            if empty and name != "padding":
                raise InputError(
                    f"The {label} mask is empty for sample {empty[0]} of the batch: at least one such token is needed "
                    "in every sample. Give the sample what is missing, or choose other queries or keys."
                )
            if not isinstance(name, str):
                self._kept.append(name)
            self._masks[key] = (host, host.to(self._device, non_blocking=True))
        return self._masks[key]


def _select(key: object, mask: Bool[Tensor, "batch pos"], device: torch.device) -> QuerySelection:
    positions = [row.nonzero().flatten() for row in mask]
    counts = torch.tensor([len(position) for position in positions])
    longest = int(counts.max())
    index = torch.stack([torch.cat([p, p[-1:].expand(longest - len(p))]) for p in positions])
    valid = torch.arange(longest) < counts[:, None]
    start = int(index[0, 0])
    same = bool((index == torch.arange(start, start + longest)).all())
    return QuerySelection(
        key=key,
        index=index.to(device, non_blocking=True),
        valid=valid.to(device, non_blocking=True),
        weight=(valid / counts[:, None]).to(device, non_blocking=True),
        even=bool(valid.all()),
        span=(start, start + longest) if same else None,
    )
