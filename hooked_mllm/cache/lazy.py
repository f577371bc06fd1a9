"""Activations that are computed when they are read: attention patterns and scores from q and k, head results from z."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.errors import HookValueError, NumericsError
from hooked_mllm.wiring.results import call, head_results, state_of


class GrowingKeys:
    """The keys of one layer over a generation: the prompt's, then each step's new ones, each kept once."""

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []

    @property
    def length(self) -> int:
        """The number of keys so far."""
        return sum(c.shape[2] for c in self.chunks)

    def upto(self, length: int) -> Float[Tensor, "batch kv_head key d_head"]:
        """The first `length` keys."""
        if len(self.chunks) > 1:
            self.chunks = [torch.cat(self.chunks, dim=2)]
        return self.chunks[0][:, :, :length]


@dataclass
class LazyKeys:
    """`hook_rot_k` of one step of a generation: `[batch pos kv_head d_head]`, over all keys so far."""

    keys: GrowingKeys
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that `tensor` will have."""
        batch, heads, _, d_head = self.keys.chunks[0].shape
        return (batch, self.length, heads, d_head)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `tensor` will have."""
        return self.keys.chunks[0].dtype

    def parts(self) -> list[Tensor]:
        """The tensors that this entry keeps alive."""
        return list(self.keys.chunks)

    def to(self, device: torch.device | str) -> Tensor:
        """The activation on another device."""
        return self.tensor().to(device)

    def samples(self, choice: slice) -> Tensor:
        """The activation of some samples of the batch."""
        return self.tensor()[choice]

    def tensor(self) -> Tensor:
        """The activation itself."""
        return self.keys.upto(self.length).transpose(1, 2)  # [batch kv_head key d_head] -> [batch key kv_head d_head]


@dataclass
class LazyPattern:
    r"""Attention rows $\mathrm{softmax}(s\, q k^\top + M)$, or masked scores, in float32 from the model's q and k.

    Query head h reads key head h // (H / H_kv). `q` has only the rows in `index` if that is given; `columns` selects
    keys. Both are -1 where a sample has fewer.
    """

    q: Float[Tensor, "batch head query d_head"]
    k: Float[Tensor, "batch kv_head key d_head"] | GrowingKeys
    mask: MaskRows
    scale: float
    name: str
    scores: bool = False
    index: Int[Tensor, "batch query"] | None = None
    columns: Int[Tensor, "batch column"] | None = None
    dtype: torch.dtype = field(default=torch.float32, init=False)

    def keys(self) -> Float[Tensor, "batch kv_head key d_head"]:
        """All keys of the call."""
        return self.k.upto(self.mask.kv_length) if isinstance(self.k, GrowingKeys) else self.k

    def parts(self) -> list[Tensor]:
        """The tensors that this entry keeps alive."""
        return [self.q, *(self.k.chunks if isinstance(self.k, GrowingKeys) else [self.k]), *self.mask.tensors()]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that `tensor` will have."""
        return (*self.q.shape[:3], self.mask.kv_length if self.columns is None else self.columns.shape[1])

    def _mapped(self, part: Callable[[Tensor], Tensor], mask: MaskRows) -> "LazyPattern":
        index, columns = (None if x is None else part(x) for x in (self.index, self.columns))
        return replace(self, q=part(self.q), k=part(self.keys()), mask=mask, index=index, columns=columns)

    def to(self, device: torch.device | str) -> "LazyPattern":
        """The same rows, computed on `device`."""
        return self._mapped(lambda x: x.to(device), self.mask.to(device))

    def samples(self, choice: slice) -> "LazyPattern":
        """The rows of some samples of the batch."""
        return self._mapped(lambda x: x[choice], self.mask.samples(torch.arange(self.mask.batch)[choice]))

    def tensor(self) -> Float[Tensor, "batch head query key"]:
        """All rows and columns of this entry."""
        return self.rows()

    def rows(
        self,
        queries: Int[Tensor, "batch query"] | None = None,
        columns: Int[Tensor, "batch column"] | None = None,
        heads: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch head query column"]:
        """Some rows (indices along the query axis of `q`), columns and heads; zeros where an index is -1."""
        q, k = self.q, self.keys()
        group = q.shape[1] // k.shape[1]
        columns = self.columns if columns is None else columns
        kept = None if columns is None else columns.to(q.device)[:, None, :]
        positions = self.index
        if queries is not None:
            queries = queries.to(q.device)
            rows = queries.clamp(min=0)
            q = torch.take_along_dim(q, rows[:, None, :, None], dim=2)
            positions = queries if positions is None else torch.where(queries >= 0, positions.gather(1, rows), -1)
        if positions is None:
            positions = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
        hidden = self._hidden(positions.clamp(min=0))
        heads = range(q.shape[1]) if heads is None else heads
        width = k.shape[2] if columns is None else columns.shape[1]
        out = torch.empty(q.shape[0], len(heads), q.shape[2], width, dtype=torch.float32, device=q.device)
        for number, head in enumerate(heads):
            # [batch query d_head] @ [batch d_head key] -> [batch query key]
            row = torch.matmul(q[:, head].float(), k[:, head // group].float().transpose(1, 2)).mul_(self.scale)
            if self.scores:
                row = row.masked_fill_(hidden(head), float("-inf"))
            else:  # as in transformers' eager attention, a query without visible keys attends evenly
                row = torch.softmax(row.masked_fill_(hidden(head), torch.finfo(torch.float32).min), dim=-1)
            if kept is not None:
                row = torch.take_along_dim(row, kept.clamp(min=0), dim=2).masked_fill_(kept < 0, 0.0)
            out[:, number] = row
        out.masked_fill_((positions < 0)[:, None, :, None], 0.0)
        if bool(torch.isnan(out).any() if self.scores else ~torch.isfinite(out).all()):
            raise NumericsError(
                f"{self.name} is not finite: q or k of this layer overflowed (they are {q.dtype}). Load the model with "
                "dtype='bfloat16' or 'float32'."
            )
        return out

    def _hidden(self, positions: Tensor) -> Callable[[int], Tensor]:
        """The keys that are masked for the queries at `positions`, by head: `[batch query key]`."""
        mask, device = self.mask, self.q.device
        if mask.dense is not None and mask.dense.shape[1] > 1:
            by_head = ~mask.head_rows(positions).to(device)
            return lambda head: by_head[:, head]
        hidden = ~mask.rows(positions).to(device)
        if mask.streaming is None:
            return lambda head: hidden
        dense, far = set(mask.streaming.dense), ~mask.streaming_rows(positions).to(device)
        return lambda head: hidden if head in dense else far


@dataclass
class LazyResult:
    """What each head writes to the residual stream: `[batch pos head d_model]`, from z and W_O."""

    z: Float[Tensor, "batch pos head d_head"]
    o_proj: nn.Module
    state: tuple[Any, ...] = ()  # of the projection in the run, where that can be seen

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that `tensor` will have."""
        d_model = getattr(self.o_proj, "out_features", None)
        if d_model is None:
            d_model = call(self.o_proj, self.z[:1, :1].flatten(-2)).shape[-1]
        return (*self.z.shape[:3], d_model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `tensor` will have."""
        return self.z.dtype

    def parts(self) -> list[Tensor]:
        """The tensors that this entry keeps alive."""
        return [self.z]

    def to(self, device: torch.device | str) -> "LazyResult":
        """The same, computed on `device`."""
        return replace(self, z=self.z.to(device))

    def samples(self, choice: slice) -> "LazyResult":
        """The results of some samples of the batch."""
        return replace(self, z=self.z[choice])

    def tensor(self) -> Tensor:
        """The activation itself.

        Raises:
            HookValueError: If the projection is no longer that of the run, or not a function of z.
        """
        if self.state and self.state != state_of(self.o_proj):
            raise HookValueError(
                "The output projection has changed since this run (its weights were written, or an adapter was "
                "enabled, disabled or merged), and head results are computed when they are read. Read `result` before "
                "the change, or run again."
            )
        return head_results(self.z, self.o_proj)


Entry = Tensor | LazyKeys | LazyPattern | LazyResult


def value_of(entry: Entry) -> Tensor:
    """The tensor of an entry, computed if need be."""
    return entry if isinstance(entry, Tensor) else entry.tensor()


def parts_of(entry: Entry) -> list[Tensor]:
    """The tensors that an entry keeps alive."""
    return [entry] if isinstance(entry, Tensor) else entry.parts()


def take(x: Tensor, index: Int[Tensor, "batch n"], dim: int) -> Tensor:
    """A copy of `x` at `index` along `dim`; zeros where the index is -1."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    index = index.view(shape)
    out = torch.take_along_dim(x, index.clamp(min=0), dim=dim)
    return out.masked_fill_(index < 0, 0) if bool((index < 0).any()) else out
