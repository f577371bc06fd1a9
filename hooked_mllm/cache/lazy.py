"""Activations that are computed when they are read: attention patterns and scores from q and k, head results from z."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.errors import HookValueError, NumericsError
from hooked_mllm.wiring.results import call, head_results, state_of


class GrowingKeys:
    """The keys of one layer over a generation: the prompt's, then each step's new ones, each kept once."""

    def __init__(self, chunks: Iterable[Tensor] = ()) -> None:
        self.chunks = list(chunks)

    @property
    def length(self) -> int:
        """The number of keys so far."""
        return sum(c.shape[2] for c in self.chunks)

    def upto(self, length: int) -> Float[Tensor, "batch kv_head key d_head"]:
        """The first `length` keys."""
        if len(self.chunks) > 1:
            self.chunks = [torch.cat(self.chunks, dim=2)]
        return self.chunks[0][:, :, :length]

    def mapped(self, part: Callable[[Tensor], Tensor], known: "Mapped | None") -> "GrowingKeys":
        """`part` of every chunk; steps that share these keys share the result by `known`."""
        known = {} if known is None else known
        if id(self) not in known:
            known[id(self)] = GrowingKeys(map(part, self.chunks))
        return known[id(self)]


#: keys that were moved or cut already, by the id of the original
Mapped: TypeAlias = dict[int, GrowingKeys]


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

    def to(self, device: torch.device | str, known: Mapped | None = None) -> "LazyKeys":
        """The activation on another device."""
        return LazyKeys(self.keys.mapped(lambda x: x.to(device), known), self.length)

    def samples(self, choice: slice, known: Mapped | None = None) -> "LazyKeys":
        """The activation of some samples of the batch."""
        return LazyKeys(self.keys.mapped(lambda x: x[choice], known), self.length)

    def tensor(self) -> Tensor:
        """The activation itself."""
        return self.keys.upto(self.length).transpose(1, 2)  # [batch kv_head key d_head] -> [batch key kv_head d_head]


@dataclass
class LazyPattern:
    r"""Attention rows $\mathrm{softmax}(s\, q k^\top + M)$, or masked scores, in float32 from the model's q and k.

    Query head h reads key head h // (H / H_kv). `q` has only the rows in `index` if that is given; `columns` selects
    keys by their position in the sequence, of which the first key is at `key_offset`. Both are -1 where a sample has
    fewer.
    """

    q: Float[Tensor, "batch head query d_head"]
    k: Float[Tensor, "batch kv_head key d_head"] | GrowingKeys
    mask: MaskRows
    scale: float
    name: str
    scores: bool = False
    index: Int[Tensor, "batch query"] | None = None
    columns: Int[Tensor, "batch column"] | None = None
    key_offset: int = 0
    even: int | None = None  # keys over which a query without visible keys attends evenly; None for all of the call
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

    def _mapped(self, part: Callable[[Tensor], Tensor], mask: MaskRows, known: Mapped | None) -> "LazyPattern":
        index, columns = (None if x is None else part(x) for x in (self.index, self.columns))
        k = self.k.mapped(part, known) if isinstance(self.k, GrowingKeys) else part(self.k)
        return replace(self, q=part(self.q), k=k, mask=mask, index=index, columns=columns)

    def to(self, device: torch.device | str, known: Mapped | None = None) -> "LazyPattern":
        """The same rows, computed on `device`."""
        return self._mapped(lambda x: x.to(device), self.mask.to(device), known)

    def samples(self, choice: slice, known: Mapped | None = None) -> "LazyPattern":
        """The rows of some samples of the batch."""
        return self._mapped(lambda x: x[choice], self.mask.samples(torch.arange(self.mask.batch)[choice]), known)

    def tensor(self) -> Float[Tensor, "batch head query key"]:
        """All rows and columns of this entry."""
        return self.rows()

    def rows(
        self,
        queries: Int[Tensor, "batch query"] | None = None,
        columns: Int[Tensor, "batch column"] | None = None,
        heads: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch head query column"]:
        """Some rows (along the query axis of `q`), columns and heads; for -1, NaN in rows, and hidden columns."""
        q, k = self.q, self.keys()
        group = q.shape[1] // k.shape[1]
        columns = self.columns if columns is None else columns
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
            blind = None if self.even is None or self.scores else hidden(head).all(-1, keepdim=True)
            if columns is not None:
                row = take_columns(row, columns, self.key_offset, float("-inf") if self.scores else 0.0)
                if blind is not None and self.even is not None:
                    reached = ((columns >= 0) & (columns < self.even))[:, None].to(row.device)
                    row = torch.where(blind, reached / self.even, row)
            out[:, number] = row
        if bool(torch.isnan(out).any() if self.scores else ~torch.isfinite(out).all()):
            raise NumericsError(
                f"{self.name} is not finite: q or k of this layer overflowed (they are {q.dtype}). Load the model with "
                "dtype='bfloat16' or 'float32'."
            )
        return out.masked_fill_((positions < 0)[:, None, :, None], torch.nan)

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
class LazyRows:
    """Attention rows of several calls on one sequence, such as the chunks of a prompt or the steps of a generation.

    `index` has the number of each row among those of all calls, -1 where a sample has fewer; `columns` selects keys.
    """

    calls: list[LazyPattern]
    index: Int[Tensor, "batch query"]
    length: int
    columns: Int[Tensor, "batch column"] | None = None
    dtype: torch.dtype = field(default=torch.float32, init=False)

    @classmethod
    def joined(cls, entries: "Sequence[LazyPattern | LazyRows]", counts: Sequence[int]) -> "LazyRows":
        """The first rows of several entries, below one another."""
        calls, numbers = [], []
        for entry, count in zip(entries, counts, strict=True):
            start = sum(call.q.shape[2] for call in calls)
            own = entry if isinstance(entry, LazyRows) else cls.of([entry])
            calls += own.calls
            numbers.append(torch.where(own.index >= 0, own.index + start, -1)[:, :count])
        joined = cls.of(calls)
        return replace(joined, index=torch.cat(numbers, dim=1))

    @classmethod
    def of(cls, calls: list[LazyPattern], owned: Sequence[Tensor] | None = None) -> "LazyRows":
        """The rows of several calls; `owned`: which of the selected rows each call has `[batch query]`."""
        counts = [call.q.shape[2] for call in calls]
        if owned is None:
            index = torch.arange(sum(counts)).expand(calls[0].q.shape[0], -1)
        else:
            numbers = [torch.arange(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]
            rows = [n.expand(len(own), -1) for n, own in zip(numbers, owned, strict=True)]
            index = by_position([row + 1 for row in rows], owned, dim=1) - 1  # zero, for absent rows, becomes -1
        length = max(call.key_offset + call.mask.kv_length for call in calls)
        return cls(calls, index, length, calls[0].columns)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that `tensor` will have."""
        batch, heads = self.calls[0].q.shape[:2]
        return (batch, heads, self.index.shape[1], self.length if self.columns is None else self.columns.shape[1])

    def parts(self) -> list[Tensor]:
        """The tensors that this entry keeps alive."""
        return [part for call in self.calls for part in call.parts()]

    def to(self, device: torch.device | str, known: Mapped | None = None) -> "LazyRows":
        """The same rows, computed on `device`."""
        known = {} if known is None else known
        return replace(self, calls=[call.to(device, known) for call in self.calls])

    def samples(self, choice: slice, known: Mapped | None = None) -> "LazyRows":
        """The rows of some samples of the batch."""
        known = {} if known is None else known
        columns = None if self.columns is None else self.columns[choice]
        calls = [call.samples(choice, known) for call in self.calls]
        return LazyRows(calls, self.index[choice], self.length, columns)

    def tensor(self) -> Float[Tensor, "batch head query key"]:
        """All rows and columns of this entry."""
        return self.rows()

    def rows(
        self,
        queries: Int[Tensor, "batch query"] | None = None,
        columns: Int[Tensor, "batch column"] | None = None,
        heads: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch head query column"]:
        """Some rows, columns and heads, as of a `LazyPattern`."""
        index = self.index.cpu()
        if queries is not None:
            queries = queries.cpu()
            index = torch.where(queries >= 0, index.gather(1, queries.clamp(min=0)), -1)
        columns = self.columns if columns is None else columns
        if columns is None:
            columns = torch.arange(self.length).expand(len(index), -1)
        n_heads, device = self.calls[0].q.shape[1] if heads is None else len(heads), self.calls[0].q.device
        values, owned, first = [], [], 0
        for part in self.calls:
            own = (index >= first) & (index < first + part.q.shape[2])
            if bool(own.any()):
                values.append(part.rows(torch.where(own, index - first, -1)[:, own.any(0)], columns, heads).to(device))
                owned.append(own)
            first += part.q.shape[2]
        if not values:
            return torch.full((len(index), n_heads, index.shape[1], columns.shape[1]), torch.nan, device=device)
        return by_position(values, owned, dim=2).masked_fill_((index < 0)[:, None, :, None].to(device), torch.nan)


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

    def to(self, device: torch.device | str, known: Mapped | None = None) -> "LazyResult":
        """The same, computed on `device`."""
        return replace(self, z=self.z.to(device))

    def samples(self, choice: slice, known: Mapped | None = None) -> "LazyResult":
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


Entry = Tensor | LazyKeys | LazyPattern | LazyRows | LazyResult


def value_of(entry: Entry) -> Tensor:
    """The tensor of an entry, computed if need be."""
    return entry if isinstance(entry, Tensor) else entry.tensor()


def parts_of(entry: Entry) -> list[Tensor]:
    """The tensors that an entry keeps alive."""
    return [entry] if isinstance(entry, Tensor) else entry.parts()


def moved(entry: Entry, device: torch.device | str, known: Mapped) -> Entry:
    """An entry on another device."""
    return entry.to(device) if isinstance(entry, Tensor) else entry.to(device, known)


def samples_of(entry: Entry, choice: slice, known: Mapped) -> Entry:
    """An entry of some samples of the batch."""
    return entry[choice] if isinstance(entry, Tensor) else entry.samples(choice, known)


def by_position(values: Sequence[Tensor], owned: Sequence[Tensor] | None, dim: int) -> Tensor:
    """Rows of several calls in the order of the sequence; `owned`: which selected rows `[batch n]` each call has."""
    if owned is None:
        return torch.cat(list(values), dim=dim)
    shape = list(values[0].shape)
    shape[dim] = owned[0].shape[1]
    out = values[0].new_zeros(shape)
    for value, own in zip(values, owned, strict=True):
        slots = own.any(0)
        view = [len(own), *[1] * (value.dim() - 1)]
        view[dim] = int(slots.sum())
        mine = own[:, slots].view(view).to(value.device)
        slots = slots.nonzero().flatten().to(value.device)
        out.index_copy_(dim, slots, torch.where(mine, value, out.index_select(dim, slots)))
    return out


def take_columns(x: Tensor, columns: Int[Tensor, "batch n"], offset: int, hidden: float) -> Tensor:
    """Keys by position, of which the first of `x` is at `offset`; `hidden` for keys that `x` lacks, and for -1."""
    index = columns.to(x.device).view(len(columns), *[1] * (x.dim() - 2), -1)  # [batch n] -> [batch 1... n]
    local = index - offset
    lacking = (local < 0) | (local >= x.shape[-1])
    out = torch.take_along_dim(x, local.clamp(0, x.shape[-1] - 1), dim=-1)
    return out.masked_fill_(lacking | (index < 0), hidden)


def take(x: Tensor, index: Int[Tensor, "batch n"], dim: int, absent: float = 0.0) -> Tensor:
    """A copy of `x` at `index` along `dim`; `absent` where the index is -1."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    index = index.view(shape)
    out = torch.take_along_dim(x, index.clamp(min=0), dim=dim)
    return out.masked_fill_(index < 0, absent) if bool((index < 0).any()) else out
