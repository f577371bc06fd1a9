"""Activations that are computed when they are read: attention patterns and scores from q and k, head results from z."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.errors import NumericsError
from hooked_mllm.wiring.results import head_results


class GrowingKeys:
    """The keys of one layer over a generation: the prompt's, then each step's new ones, each kept once."""

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []

    @property
    def length(self) -> int:
        """Keys seen so far."""
        return sum(c.shape[2] for c in self.chunks)

    def append(self, chunk: Float[Tensor, "batch kv_head key d_head"]) -> None:
        """Add the keys that a step brought."""
        self.chunks.append(chunk)

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
        b, h, _, d = self.keys.chunks[0].shape
        return (b, self.length, h, d)

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
        return self.keys.upto(self.length).transpose(1, 2)


@dataclass
class LazyPattern:
    r"""Attention rows, recomputed in float32 from the q and k that the model used, under the mask that it used.

    $A = \mathrm{softmax}(s\, q k^\top + M)$. Query head h reads key head h // (H / H_kv).

    Args:
        q: `[batch head query d_head]`, only the rows in `index` if that is given.
        k: `[batch kv_head key d_head]`, or the growing keys of a generation.
        mask: Visibility, by rows.
        scale: s.
        name: The hook's name, for messages.
        scores: Give the masked scores instead of the pattern.
        index: Which queries `q` holds, `[batch query]`; -1 where a sample has fewer.
        columns: Which keys are wanted, `[batch column]`; -1 where a sample has fewer.
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
        b, h, q, _ = self.q.shape
        return (b, h, q, self.mask.kv_length if self.columns is None else self.columns.shape[1])

    def to(self, device: torch.device | str) -> "LazyPattern":
        """The same rows, computed on `device`."""
        return LazyPattern(
            self.q.to(device),
            self.keys().to(device),
            self.mask.to(device),
            self.scale,
            self.name,
            self.scores,
            None if self.index is None else self.index.to(device),
            None if self.columns is None else self.columns.to(device),
        )

    def samples(self, choice: slice) -> "LazyPattern":
        """The rows of some samples of the batch."""
        picked = torch.arange(self.mask.batch)[choice]
        return LazyPattern(
            self.q[choice],
            self.keys()[choice],
            self.mask.samples(picked),
            self.scale,
            self.name,
            self.scores,
            None if self.index is None else self.index[choice],
            None if self.columns is None else self.columns[choice],
        )

    def tensor(self) -> Float[Tensor, "batch head query key"]:
        """All rows and columns of this entry."""
        return self.rows()

    def rows(
        self,
        queries: Int[Tensor, "batch query"] | None = None,
        columns: Int[Tensor, "batch column"] | None = None,
        heads: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch head query column"]:
        """Some rows (places in `q`), columns and heads.

        Args:
            queries: Rows wanted, as places along q's query axis; -1 gives a row of zeros.
            columns: Columns wanted; -1 gives a column of zeros.
            heads: Query heads wanted.

        Raises:
            NumericsError: when a row is not finite, as after an overflow in float16.
        """
        q, k = self.q, self.keys()
        groups = q.shape[1] // k.shape[1]
        device = q.device
        columns = self.columns if columns is None else columns
        place = self.index
        if queries is not None:
            queries = queries.to(device)
            q = torch.take_along_dim(q, queries.clamp(min=0)[:, None, :, None], dim=2)
            place = queries if place is None else torch.where(queries >= 0, place.gather(1, queries.clamp(min=0)), -1)
        if place is None:
            place = torch.arange(q.shape[2], device=device).expand(q.shape[0], -1)
        hidden = self._hidden(place.clamp(min=0))
        chosen = range(q.shape[1]) if heads is None else heads
        width = k.shape[2] if columns is None else columns.shape[1]
        out = torch.empty(q.shape[0], len(chosen), q.shape[2], width, dtype=torch.float32, device=device)
        for place_out, head in enumerate(chosen):
            row = torch.matmul(q[:, head].float(), k[:, head // groups].float().transpose(1, 2)).mul_(self.scale)
            if self.scores:
                row = row.masked_fill_(hidden(head), float("-inf"))
            else:
                # As in transformers' eager attention, a query that sees nothing spreads evenly.
                row = torch.softmax(row.masked_fill_(hidden(head), torch.finfo(torch.float32).min), dim=-1)
            if columns is not None:
                picked = torch.take_along_dim(row, columns.to(device).clamp(min=0)[:, None, :], dim=2)
                row = picked.masked_fill_((columns < 0).to(device)[:, None, :], 0.0)
            out[:, place_out] = row
        out.masked_fill_((place < 0)[:, None, :, None], 0.0)
        bad = torch.isnan(out).any() if self.scores else ~torch.isfinite(out).all()
        if bool(bad):
            raise NumericsError(
                f"{self.name} is not finite: q or k of this layer overflowed (they are {q.dtype}). Load the model with "
                "dtype='bfloat16' or 'float32'."
            )
        return out

    def _hidden(self, place: Tensor) -> Callable[[int], Tensor]:
        """Which keys the queries at `place` do not see, by head: `[batch query key]`."""
        mask, device = self.mask, self.q.device
        if mask.dense is not None and mask.dense.shape[1] > 1:
            by_head = ~mask.head_rows(place).to(device)
            return lambda head: by_head[:, head]
        hidden = ~mask.rows(place).to(device)
        if mask.streaming is None:
            return lambda head: hidden
        dense, far = set(mask.streaming.dense), ~mask.streaming_rows(place).to(device)
        return lambda head: hidden if head in dense else far


@dataclass
class LazyResult:
    """What each head writes to the residual stream: `[batch pos head d_model]`, from z and W_O."""

    z: Float[Tensor, "batch pos head d_head"]
    o_proj: nn.Module

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that `tensor` will have."""
        b, p, h, _ = self.z.shape
        return (b, p, h, self.o_proj.weight.shape[0])  # type: ignore[union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `tensor` will have."""
        return self.z.dtype

    def parts(self) -> list[Tensor]:
        """The tensors that this entry keeps alive."""
        return [self.z]

    def to(self, device: torch.device | str) -> "LazyResult":
        """The same, computed on `device`."""
        return LazyResult(self.z.to(device), self.o_proj)

    def samples(self, choice: slice) -> "LazyResult":
        """The results of some samples of the batch."""
        return LazyResult(self.z[choice], self.o_proj)

    def tensor(self) -> Tensor:
        """The activation itself."""
        return head_results(self.z, self.o_proj, self.z.device)


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
